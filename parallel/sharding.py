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
    "router": None,  # biases of experts, which balance their loads (see training/update.py)
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
    axes = (None if WEIGHTS[name] == WEIGHTS["embed"] else WEIGHTS[name] for name in dims)
    return jax.lax.with_sharding_constraint(weight, P(*axes))


def row_ways(mesh: jax.sharding.Mesh) -> int:
    """Over how many devices the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in ACTIVATIONS["batch"] or ())


def shard_states(mesh: jax.sharding.Mesh, state: Any, batch_axis: int = 0) -> Any:
    """Shardings of a pytree of states: rows over data and fsdp, the rest whole; scalars whole."""

    def one(leaf):
        if leaf.ndim <= batch_axis:
            return NamedSharding(mesh, P())
        return NamedSharding(mesh, P(*(None,) * batch_axis, ACTIVATIONS["batch"]))

    return jax.tree.map(one, state)


def place(mesh: jax.sharding.Mesh, tree: Any, params: Any, dims: Any) -> Any:
    """`tree` of shapes with a sharding on every leaf: what belongs to a weight lies where it does.

    `params` are the weights' shapes and `dims` the names of their dimensions, as nested dicts. A
    leaf belongs to the weight whose keys its own end in, such as a moment; what belongs to none is
    whole. ValueError where a weight's dimension does not split evenly.
    """

    def sharded(path, leaf, names):
        return weight_sharding(mesh, ".".join(map(str, _keys(path))), leaf.shape, names).spec

    specs = jax.tree_util.tree_map_with_path(sharded, params, dims)
    weights = {
        _keys(path): (leaf.shape, spec)
        for (path, leaf), spec in zip(
            jax.tree_util.tree_leaves_with_path(params),
            jax.tree.leaves(specs, is_leaf=lambda node: isinstance(node, P)),
            strict=True,
        )
    }

    def one(path, leaf):
        keys = _keys(path)
        owner = next((keys[i:] for i in range(len(keys)) if keys[i:] in weights), None)
        spec = P() if owner is None else _spec_like(mesh, leaf.shape, *weights[owner])
        where = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree_util.tree_map_with_path(one, tree)


def _keys(path) -> tuple:
    return tuple(part.key for part in path if isinstance(part, jax.tree_util.DictKey))


def _spec_like(mesh, shape: tuple[int, ...], weight: tuple[int, ...], spec: P) -> P:
    """The partition of what a rule keeps of a weight: its own, but for dimensions summed to 1.

    Of any other shape, such as square factors (..., n, n), rows are split as the stream's are.
    """
    if len(shape) == len(weight) and all(n in (1, m) for n, m in zip(shape, weight, strict=True)):
        same = zip(shape, weight, spec, strict=True)
        return P(*(axis if size == whole else None for size, whole, axis in same))
    axis = WEIGHTS["embed"]
    if len(shape) < 2 or axis is None or shape[-2] % mesh.shape[axis]:
        return P()
    return P(*(None,) * (len(shape) - 2), axis)


def place_rows(mesh: jax.sharding.Mesh, state: Any, batch_axis: int = 0) -> Any:
    """States of shapes with a sharding on every leaf: rows lie where the rows of the batch do."""

    def one(leaf, where):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(one, state, shard_states(mesh, state, batch_axis))
