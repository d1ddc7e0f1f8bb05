"""Hyper-connections: several residual streams, mixed by learned weights at every layer.

Hyper-Connections (arXiv 2409.19606) in the manifold-constrained form, mHC (arXiv 2512.24880,
section 4): the map from streams to streams is made doubly stochastic by Sinkhorn's iterations, so
that depth neither grows nor shrinks the streams; the maps into and out of a layer are positive.
Notable: at the start the whole is the plain pre-norm residual network. Deviation: the streams begin
as copies of x and end as their mean inside this block, so it can stand anywhere in a pattern; give
it all layers to have the paper's.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from models import mixer, weights
from models.parts import sublayer
from parallel.sharding import constrain

ITERATIONS = 20  # of Sinkhorn, as in mHC
NEAR_IDENTITY = 8.0  # the diagonal of the stream map's logits at the start


@dataclasses.dataclass
class Config(sublayer.Mixers):
    """Configs of mixers, run one after another over `streams` streams."""

    streams: int = 4

    def build(self, width: int, rngs: nnx.Rngs) -> "Block":
        """The module; ValueError for less than two streams."""
        return Block(self, width, rngs)


class Block(sublayer.Chain, mixer.Block):
    """X <- R X + p f(norm(w X)) over the streams X (n, D), with R, w, p read from X."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        if config.streams < 2:
            raise ValueError(f"streams={config.streams} must be at least 2; 4 is usual.")
        self.parts = sublayer.sublayers(config.mixers, width, rngs, config.norm_eps)
        n, count = config.streams, len(self.parts)
        # One map a layer: n weights in, n out, n x n between, a hundredth of their biases.
        shape = (count, n, width, n * (n + 2))
        init = lambda key, shape: 0.01 * weights.fan_in(n * width)(key, shape)
        self.maps = weights.weight(rngs, init, shape, ("parts", "state", "embed", "rank"))
        into = jnp.full((n,), -jnp.log(n - 1.0))  # sigmoid: 1 / n
        start = jnp.concatenate([into, jnp.zeros(n), (NEAR_IDENTITY * jnp.eye(n)).reshape(-1)])
        bias = lambda key, shape: jnp.broadcast_to(start, shape)
        self.bias = weights.weight(rngs, bias, (count, n * (n + 2)), ("parts", "rank"))
        self.streams = n

    def __call__(self, x, *, segments=None, state=None):
        wide = x.astype(mixer.wide(x.dtype))
        x_BTND = jnp.repeat(wide[:, :, None], self.streams, axis=2)
        new = []
        for i, old in enumerate(sublayer.before(state, self.parts)):
            into_BTN, out_BTN, between_BTNM = self._weights(x_BTND, i)
            u = jnp.einsum("btn,btnd->btd", into_BTN, x_BTND).astype(x.dtype)
            y, after = self.parts[i](u, segments=segments, state=old)
            x_BTND = jnp.einsum("btnm,btmd->btnd", between_BTNM, x_BTND)
            x_BTND = x_BTND + out_BTN[..., None] * y[:, :, None]
            new.append(after)
        return constrain(x_BTND.mean(2).astype(x.dtype), "batch", "time", "embed"), tuple(new)

    def _weights(self, x_BTND, layer):
        """Weights into the layer (sigmoid), out of it (2 sigmoid) and between the streams."""
        n = self.streams
        u = x_BTND * jax.lax.rsqrt(jnp.mean(jnp.square(x_BTND), axis=(2, 3), keepdims=True) + 1e-6)
        logits = jnp.einsum("btnd,ndr->btr", u, self.maps[...][layer]) + self.bias[...][layer]
        between = sinkhorn(logits[..., 2 * n :].reshape(*logits.shape[:2], n, n))
        into, out = jax.nn.sigmoid(logits[..., :n]), 2 * jax.nn.sigmoid(logits[..., n : 2 * n])
        return into, out, between


def sinkhorn(logits):
    """exp(logits) with columns and rows divided by their sums in turn: doubly stochastic (eq. 9).

    Rows come last: each stream of R X is a weighted mean of those of X.
    """

    def step(_, logits):
        logits = logits - jax.nn.logsumexp(logits, axis=-2, keepdims=True)
        return logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)

    return jnp.exp(jax.lax.fori_loop(0, ITERATIONS, step, logits))
