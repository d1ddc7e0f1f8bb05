"""FLOPs of what runs (executed), of the reference (model FLOPs), and by XLA's count; their share
of what the devices can do.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from programs.flops import Flops, executed_flops, model_flops
from resources import memory, scaling, throughput
from resources.devices import Device
from resources.row import Row, not_available

__all__ = [
    "Flops",
    "executed_flops",
    "matmul_peak",
    "measured_peak",
    "model_flops",
    "rows",
    "utilisation_rows",
    "xla_flops",
]


def xla_flops(compiled: Any) -> float | None:
    """XLA's own count for a compiled program: every loop's body once; None where it has none."""
    found = (compiled.cost_analysis() or {}).get("flops", -1.0)
    return float(found) if found >= 0 else None


def rows(
    kind: str, tokens: int, devices: int, model: float, executed: Flops, compiled: Any
) -> list[Row]:
    """FLOPs per token of a call on `tokens` tokens: needed, executed, and by XLA's count."""
    unit = "FLOP/token"
    name = f"{kind} FLOPs, by XLA"
    counted = xla_flops(compiled)
    if counted is None:
        last = not_available(name, unit, "the compiler does not say")
    else:
        counted *= devices / tokens
        last = Row(name, counted, unit, "compiled", "each loop's body once, however often it runs")
    return [
        Row(f"{kind} FLOPs, model", model / tokens, unit, "modelled"),
        Row(
            f"{kind} FLOPs, executed",
            executed.total / tokens,
            unit,
            "modelled",
            "; ".join(sorted(executed.notes)),
        ),
        last,
    ]


NOISY = 1.2  # median over least seconds of equal calls from which on a machine counts as noisy


class Peak(NamedTuple):
    """FLOP/s of the fastest call, and how far the usual call was from it."""

    flops: float
    noise: float  # median over least seconds

    @property
    def note(self) -> str:
        """ "" on a quiet machine."""
        if self.noise < NOISY:
            return ""
        return f"; a noisy machine: the median call took {self.noise:.2f} x as long"


def matmul_peak(dtype: str) -> float:
    """FLOP/s of one device in a product of two square matrices, by the best of ten calls."""
    return measured_peak(dtype).flops


@functools.cache
def measured_peak(dtype: str, size: int | None = None) -> Peak:
    """`matmul_peak` and its noise.

    The size is 2,048 on a CPU and 8,192 elsewhere; entries are normal, as zeros run faster.
    """
    n = size or (2048 if jax.default_backend() == "cpu" else 8192)
    a, b = (jax.random.normal(jax.random.key(i), (n, n)).astype(dtype) for i in range(2))
    timing = throughput.time_call(jax.jit(jnp.matmul), a, b, warmup=2, repeats=10)
    least = min(timing.seconds)
    return Peak(2 * n**3 / least, timing.median / least)


def _listed_peak(dtype: str, listed: Device | None) -> float | None:
    """FLOP/s by the maker's list; float32 products run as TensorFloat-32 where a GPU has it."""
    if listed is None:
        return None
    if dtype == "float32" and listed.tensorfloat32:
        return listed.tensorfloat32
    return getattr(listed, dtype)


def utilisation_rows(
    dtype: str, seconds: float, needed: float, executed: float, count: int, listed: Device | None
) -> list[Row]:
    """MFU and HFU of a training step: FLOPs needed, and executed, over those of `count` devices.

    MFU = needed / (seconds * count * peak), HFU with the executed FLOPs (arXiv 2204.02311,
    appendix B). Twice: the peak that the maker lists, and that of a matrix product here.
    """
    name = jax.devices()[0].device_kind
    by_maker = _listed_peak(dtype, listed)
    measured = measured_peak(dtype)
    rows = []
    for short, flops in (("MFU", needed), ("HFU", executed)):
        label = f"train {short}, of the listed peak"
        if by_maker:
            share = 100 * flops / (seconds * count * by_maker)
            note = f"{by_maker / 1e12:.4g} TFLOP/s, {dtype}"
            rows.append(Row(label, share, "%", "modelled", note))
        else:
            reason = f"no listed {dtype} peak is known for {name!r}"
            rows.append(not_available(label, "%", reason))
        share = 100 * flops / (seconds * count * measured.flops)
        note = (
            f"a matrix product reached {measured.flops / 1e9:.4g} GFLOP/s, {dtype}{measured.note}"
        )
        rows.append(Row(f"train {short}, of the measured peak", share, "%", "modelled", note))
    return rows


def roofline_rows(
    dtype: str, seconds: float, executed: float, moved: float, listed: Device | None
) -> list[Row]:
    """Where a training step lies: one device executes and moves so much in so many seconds.

    attainable FLOP/s = min(roof of compute, FLOP/B * roof of memory), both roofs measured here.
    """
    peak, bandwidth = measured_peak(dtype), memory.copy_bandwidth()
    found = scaling.roofline(executed, moved, peak.flops, bandwidth)
    word = f"bound by {found.bound}: the ridge is at {found.ridge:.3g} FLOP/B"
    listed_bandwidth = listed and listed.memory_bytes_per_s
    note = f"{listed_bandwidth / 1e9:.4g} GB/s listed" if listed_bandwidth else ""
    return [
        Row("train bytes moved", moved, "B", "compiled", "operands and results, no cache"),
        Row("train intensity", found.intensity, "FLOP/B", "modelled", word),
        Row("train achieved", executed / seconds, "FLOP/s", "modelled", "executed, a device"),
        Row("train share of the roofline", 100 * found.seconds / seconds, "%", "modelled"),
        Row(
            "roof, compute",
            peak.flops,
            "FLOP/s",
            "measured",
            f"a matrix product, {dtype}{peak.note}",
        ),
        Row("roof, memory", bandwidth, "B/s", "measured", note or "256 MiB changed in place"),
    ]
