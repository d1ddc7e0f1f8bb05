"""Two short tables map the names of dimensions to mesh axes; a name that is missing is an error."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kernels import setting

WEIGHTS: dict[str, str | None] = {
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "channels": "tensor",  # hidden units of a channel mixer, channels of a recurrence
    "key": None,
    "value": None,
    "groups": None,  # few: B and C of Mamba-2
    "experts": None,  # of a mixture, each whole in its rows and columns
    "parts": None,  # projections that share one weight
    "state": None,
    "rank": None,
    "router": None,  # biases of experts, which balance their loads (see training/optimizer.py)
    "width": None,  # taps of a short convolution
    "layers": None,
}
ACTIVATIONS: dict[str, tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "time": None,
    "embed": None,
}


@contextlib.contextmanager
def on(mesh: jax.sharding.Mesh) -> Iterator[None]:
    """Within the block programs are traced for `mesh`, TPU kernels included."""
    heads = WEIGHTS["heads"]
    split = setting.layout(batch=ACTIVATIONS["batch"] or (), heads=(heads,) if heads else ())
    with jax.set_mesh(mesh), split:
        yield


def weight_spec(dims: tuple[str, ...]) -> P:
    """The partition of a weight whose dimensions are named `dims`."""
    unknown = [name for name in dims if name not in WEIGHTS]
    if unknown:
        known = ", ".join(WEIGHTS)
        raise ValueError(f"unknown weight dimension {unknown[0]!r}; name one of {known}.")
    return P(*(WEIGHTS[name] for name in dims))


def ways(mesh: jax.sharding.Mesh, name: str) -> int:
    """Over how many devices a weight's dimension of that name is split."""
    axis = WEIGHTS[name]
    return mesh.shape[axis] if axis else 1


def weight_sharding(mesh: jax.sharding.Mesh, path: str, shape, dims) -> NamedSharding:
    """Sharding of one weight; raises ValueError where a dimension does not split evenly."""
    spec = weight_spec(dims)
    for size, name, axis in zip(shape, dims, spec, strict=True):
        parts = ways(mesh, name)
        if size % parts:
            raise ValueError(
                f"{path}: dimension {name}={size} cannot be split over mesh axis {axis!r} of size "
                f"{parts}; use {name}={math.ceil(size / parts) * parts} or another mesh.{axis}."
            )
    return NamedSharding(mesh, spec)


def batch_spec(rank: int) -> P:
    """The partition of a batch-major array of that rank: rows over data and fsdp."""
    return P(ACTIVATIONS["batch"], *(None,) * (rank - 1))


def constrain(x: jax.Array, *names: str) -> jax.Array:
    """Pin the layout of an activation at a block's boundary; nothing without a mesh in context."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(*(ACTIVATIONS[name] for name in names)))


def gathered(weight: jax.Array, *dims: str) -> jax.Array:
    """The weight whole along fsdp, as a lookup needs it: rows of a batch also live on that axis."""
    if jax.sharding.get_abstract_mesh().empty:
        return weight
    axes = (None if WEIGHTS[name] == "fsdp" else WEIGHTS[name] for name in dims)
    return jax.lax.with_sharding_constraint(weight, P(*axes))


def shard_states(mesh: jax.sharding.Mesh, state: Any, batch_axis: int = 0) -> Any:
    """Shardings of a pytree of states: rows over data and fsdp, the rest whole; scalars whole."""

    def one(leaf):
        if leaf.ndim <= batch_axis:
            return NamedSharding(mesh, P())
        return NamedSharding(mesh, P(*(None,) * batch_axis, ACTIVATIONS["batch"]))

    return jax.tree.map(one, state)
