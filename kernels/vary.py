"""Inside `jax.shard_map` an array varies over some mesh axes; loops need all of theirs alike."""

from typing import Any

import jax


def axes(tree: Any) -> frozenset[str]:
    """The mesh axes over which any of the arrays varies; none outside a `shard_map`."""
    found = (jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(tree))
    return frozenset().union(*found)


def like(tree: Any, example: Any) -> Any:
    """The arrays, made to vary over every axis that any of `example` varies over."""
    wanted = axes(example)

    def cast(leaf):
        missing = tuple(sorted(wanted - axes(leaf)))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree)


def together(tree: Any) -> Any:
    """The arrays, made to vary over every axis that any of them varies over."""
    return like(tree, tree)
