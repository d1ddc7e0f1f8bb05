"""Layers of equal build: stacked in one module to be scanned, taken apart again, and resumed."""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Int

from models import mixer


def stack(part: Any, width: int, periods: int, rngs: nnx.Rngs) -> mixer.Mixer:
    """`periods` independent blocks in one module, each weight with a leading "layers" dimension."""
    graph = nnx.split(nnx.eval_shape(lambda: part.build(width, nnx.Rngs(0))))[0]

    def one(key):
        return nnx.to_pure_dict(nnx.split(part.build(width, nnx.Rngs(key)))[1])

    return nnx.merge(graph, jax.vmap(one)(jax.random.split(rngs.params(), periods)))


def unrolled(model: Any) -> Any:
    """The same model with its layers apart: decoding then copies no weights out of the stacks."""
    splits = [nnx.split(stack) for stack in model.stacks]
    periods = len(jax.tree.leaves(splits[0][1])[0]) if splits else 0

    def layer(graph, stack, i):
        return nnx.merge(graph, jax.tree.map(lambda w: w[i], stack))

    apart = [layer(*split, i) for i in range(periods) for split in splits]
    flat = nnx.clone(model)
    flat.stacks, flat.rest = nnx.List([]), nnx.List(apart + list(flat.rest))
    return flat


def resumed(state: Any, segments: Int[Array, "B T"]) -> Any:
    """`state` with those rows made fresh whose first document is not the one it left off in."""
    first, _ = mixer.first_and_last(segments)
    keep = (state["segment"] == 0) | (first == 0) | (first == state["segment"])
    kept = {
        name: mixer.keep_rows(keep, part, axis=int(name == "stacks"))  # there layers lead
        for name, part in state.items()
        if name != "segment"
    }
    return state | kept
