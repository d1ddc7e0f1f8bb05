"""What a compiled program sends between devices, and the share of a call that links need for it.

A mesh over hosts sends the same bytes over slower links; which links, the program does not say.
"""

from jax.sharding import Mesh

from programs.collectives import Traffic, traffic
from resources import devices
from resources.row import Row, not_available

__all__ = ["Traffic", "rows", "traffic"]


def rows(
    kind: str,
    found: Traffic,
    tokens: int,
    mesh: Mesh,
    device: devices.Device | None,
    seconds: float | None,
) -> list[Row]:
    """Bytes that a device sends in one call on `tokens` tokens, by collective and axis, and the
    share of the call's `seconds` that the device's links need for them.
    """
    note = "; ".join(sorted(found.notes)) if mesh.size > 1 else "one device"
    rows = [
        Row(f"{kind} network, {c.kind} over {'+'.join(c.axes)}", c.bytes, "B", "compiled")
        for c in found.collectives
    ]
    rows.append(Row(f"{kind} network, all", found.bytes, "B", "compiled", note))
    per_token = found.bytes * mesh.size / tokens
    rows.append(Row(f"{kind} network, per token", per_token, "B/token", "compiled", note))
    name, unit = f"{kind} network, share of the call", "%"
    speed = device and device.link_bytes_per_s
    if mesh.size == 1:
        rows.append(Row(name, 0.0, unit, "compiled", note))
    elif seconds is None:
        rows.append(not_available(name, unit, "the call was not timed"))
    elif not speed:
        kind_of = mesh.devices.flat[0].device_kind
        rows.append(not_available(name, unit, f"no link speed is known for {kind_of!r}"))
    else:
        share = 100 * found.bytes / speed / seconds
        told = f"at {speed / 1e9:.4g} GB/s, all links together; nothing overlaps"
        rows.append(Row(name, share, unit, "modelled", told))
    return rows
