"""Reversible layers: the backward pass works the activations out again, so depth costs no memory.

RevNet (arXiv 1707.04585, eqs. 6 and 7) as in Reformer (arXiv 2001.04451, section 3). Notable: two
streams take turns; what is kept between the passes is the last pair alone. The streams are float32,
so that working back loses nothing that matters; layers see them in the compute dtype. With a state
(prefill, decoding, carried states) gradients are taken in the ordinary way.
"""

import dataclasses
import functools

import jax
import numpy as np
from flax import nnx

from models import auxiliary, mixer
from models.parts import sublayer
from parallel.sharding import constrain


@dataclasses.dataclass
class Config(sublayer.Mixers):
    """Configs of mixers, run one after another; memory is saved over all of them."""

    def build(self, width: int, rngs: nnx.Rngs) -> "Block":
        """The module."""
        return Block(self, width, rngs)


class Block(sublayer.Chain, mixer.Block):
    """(a, b) <- (b, a + f_i(norm(b))) for each layer from a = b = x; the output is (a + b) / 2."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        self.parts = sublayer.sublayers(config.mixers, width, rngs, config.norm_eps)

    def __call__(self, x, *, segments=None, state=None):
        splits = [nnx.split(part) for part in self.parts]
        graphs = tuple(graph for graph, _ in splits)
        params = tuple(nnx.to_pure_dict(weights) for _, weights in splits)
        a = b = x.astype(mixer.wide(x.dtype))
        if state is None:
            (a, b), found = _run(graphs, x.dtype, params, (a, b), segments)  # pyright: ignore[reportGeneralTypeIssues]
            for one in found:
                auxiliary.repeat(one)
            new = ((),) * len(graphs)
        else:
            new = []
            for graph, weights, old in zip(graphs, params, state, strict=True):
                y, after = nnx.merge(graph, weights)(
                    b.astype(x.dtype), segments=segments, state=old
                )
                a, b = b, a + y
                new.append(after)
        return constrain(((a + b) / 2).astype(x.dtype), "batch", "time", "embed"), tuple(new)


def _layer(graph, dtype, params, b, segments):
    """f_i(norm(b)) in float32, and its auxiliary losses and metrics."""
    with auxiliary.collecting() as found:
        y, _ = nnx.merge(graph, params)(b.astype(dtype), segments=segments)
    return y.astype(b.dtype), found


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(graphs, dtype, params, streams, segments):
    (a, b), found = streams, []
    for graph, weights in zip(graphs, params, strict=True):
        y, more = _layer(graph, dtype, weights, b, segments)
        a, b = b, a + y
        found.append(more)
    return (a, b), found


def _run_forward(graphs, dtype, params, streams, segments):
    out = _run(graphs, dtype, params, streams, segments)
    return out, (params, out[0], segments)  # pyright: ignore[reportIndexIssue]


def _run_backward(graphs, dtype, residuals, gradient):
    params, (a, b), segments = residuals
    (da, db), dfound = gradient
    dparams = []
    for graph, weights, dmore in reversed(list(zip(graphs, params, dfound, strict=True))):
        layer = functools.partial(_layer, graph, dtype, segments=segments)
        (y, _), transpose = jax.vjp(layer, weights, a)
        a, b = b - y, a
        dweights, dread = transpose((db, dmore))
        da, db = db, da + dread
        dparams.append(dweights)
    none = None if segments is None else np.zeros(segments.shape, jax.dtypes.float0)
    return tuple(reversed(dparams)), (da, db), none


_run.defvjp(_run_forward, _run_backward)
