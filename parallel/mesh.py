"""The device mesh: named axes, every device used, mistakes said in one line."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType

AXES = ("data", "fsdp", "tensor")


def make_mesh(*, devices: Sequence[Any] | None = None, **sizes: int) -> jax.sharding.Mesh:
    """A mesh with all `AXES` over all of `devices` (None: all of JAX's); sizes are 1 by default.

    One size may be -1: it takes the devices that the others leave, as the first axis does unless it
    is named. Raises ValueError when the sizes do not multiply to the number of devices. Axes are
    Auto: XLA places what we do not constrain.
    """
    unknown = [axis for axis in sizes if axis not in AXES]
    if unknown:
        raise ValueError(f"unknown mesh axis {unknown[0]!r}; name one of {', '.join(AXES)}.")
    sizes = {axis: sizes.get(axis, 1 if i else -1) for i, axis in enumerate(AXES)}
    count = len(jax.devices() if devices is None else devices)
    free = [axis for axis, size in sizes.items() if size == -1]
    wrong = [f"mesh.{a}={s}" for a, s in sizes.items() if s != -1 and s < 1]
    if wrong:
        raise ValueError(f"{wrong[0]} must be -1 (take the rest) or at least 1.")
    if len(free) > 1:
        raise ValueError(f"only one mesh axis may be -1, not {' and '.join(free)}.")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if count % fixed or (not free and fixed != count):
        shape = ", ".join(f"{a}={s}" for a, s in sizes.items())
        raise ValueError(f"the mesh {shape} does not divide {count} devices; use divisors of it.")
    if free:
        sizes[free[0]] = count // fixed
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types, devices=devices)
