"""What an update may do to a weight, from the names of its dimensions alone.

A map reads or writes the residual stream: "embed" and a dimension of features. How many of a thing
there are (layers, parts, experts, heads, taps) makes no map: a gain a part, a number a head and a
router stay what they are. Maps decay, and nothing else does: a weight that is no map and has no
gradient, such as a hash's directions, never moves.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

FEATURES = {"vocab", "channels", "key", "value", "state", "rank"}
SEPARATE = {"layers", "parts", "experts"}  # along these a weight is many matrices
TABLES = {"vocab"}  # a row a token: embedding and head are maps, and no matrices of features


class Matrix(NamedTuple):
    """The axes of a weight that are many matrices, their rows (the stream's) and their columns."""

    batch: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]


def is_map(dims: tuple[str, ...]) -> bool:
    """Whether a weight maps from or to the residual stream."""
    return "embed" in dims and not FEATURES.isdisjoint(dims)


def matrix(dims: tuple[str, ...]) -> Matrix | None:
    """How a map is a matrix; None for what is no map.

    Taps ("width") stand with the stream, whose tokens they read; heads with what they hold.
    """
    if not is_map(dims):
        return None
    axes = lambda kept: tuple(i for i, name in enumerate(dims) if kept(name))
    stream = {"embed", "width"}
    return Matrix(
        axes(SEPARATE.__contains__),
        axes(stream.__contains__),
        axes(lambda name: name not in SEPARATE | stream),
    )


def inner_matrix(dims: tuple[str, ...]) -> Matrix | None:
    """`matrix`, None for embedding and head too: their rows are tokens."""
    return matrix(dims) if TABLES.isdisjoint(dims) else None


def each(rule: Callable[[tuple[str, ...]], Any], dims: Any) -> Any:
    """`rule` of the names of every weight, as a tree like the weights."""
    return jax.tree.map(rule, dims, is_leaf=lambda node: isinstance(node, tuple))


def fold(x: jax.Array, axes: Matrix) -> jax.Array:
    """A weight as matrices (N, rows, columns)."""
    order = axes.batch + axes.rows + axes.columns
    sizes = [math.prod(x.shape[i] for i in group) for group in axes]
    return x.transpose(order).reshape(sizes)


def unfold(matrices: jax.Array, axes: Matrix, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `fold`, to a weight of `shape`."""
    order = axes.batch + axes.rows + axes.columns
    back = sorted(range(len(order)), key=order.__getitem__)
    return matrices.reshape([shape[i] for i in order]).transpose(back)
