"""Reformer: tokens whose hashes agree attend to each other, found by sorting.

Reformer: The Efficient Transformer (arXiv 2001.04451, section 2). Notable: queries and keys share a
map, keys have length 1; a hash is the greatest entry of [xR; -xR]; a token sees itself only where
it sees nothing else; `rounds` of hashes are joined by their sums of exponentials, so a key that
several rounds find counts as often. Deviations: in a round a token sees the last `window` tokens of
its bucket up to itself, where the paper cuts the sorted row in chunks and looks at two of them:
edges of such chunks depend on all tokens of the row, so no token could be decoded before the last
is known. The rotations are drawn once, not for every batch, and hashes are computed in float32.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from kernels import segments as boundaries
from models import checks, layers, mixer, weights
from models.parts import aligned, sparse_heads

SELF = 1e5  # what a token's own score is lowered by (section 2, "Causal masking")


@dataclasses.dataclass
class Config:
    """The paper's language models have 64 to 128 tokens a chunk and 2 to 8 rounds."""

    heads: int = 4
    head_dim: int = 0  # 0: width / heads
    buckets: int = 8  # an even number; the paper: tokens / chunk
    rounds: int = 2
    window: int = 32  # tokens of its bucket that a query sees, itself included

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where a count or the heads do not fit."""
        return Mixer(self, width, rngs)


CASES = {"reformer": Config()}


class Mixer(mixer.Mixer):
    """o_i = sum over rounds and keys j of i's bucket of softmax(q_i . k_j / sqrt(K)) v_j."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        dim = config.head_dim or checks.split_heads(width, config.heads)
        half = config.buckets // 2
        if config.buckets < 2 or config.buckets % 2:
            raise ValueError(
                f"buckets={config.buckets} is no even number from 2. Use {max(2, 2 * half + 2)}."
            )
        sparse_heads.at_least("rounds", config.rounds, 1)
        sparse_heads.at_least("window", config.window, 2, " to see another token")
        self.qk = weights.inward(rngs, width, (config.heads, dim), ("heads", "key"))
        self.v = weights.inward(rngs, width, (config.heads, dim), ("heads", "value"))
        self.o = weights.outward(rngs, (config.heads, dim), width, ("heads", "value"))
        planes, names = (config.rounds, config.heads, dim, half), ("parts", "heads", "key", "rank")
        self.planes = weights.weight(rngs, weights.normal(1.0), planes, names)
        self.window, self.buckets = config.window, config.buckets
        self.head_shape = (config.heads, dim)
        self.hash_shape = (config.rounds, config.heads)

    def __call__(self, x, *, segments=None, state=None):
        exact = x.astype(mixer.wide(x.dtype))
        tokens = {
            "qk": weights.project("btd,dhk->bthk", x, self.qk),
            "v": weights.project("btd,dhv->bthv", x, self.v),
            "hash": self._hash(weights.project("btd,dhk->bthk", exact, self.qk)),
        }
        batch, count = x.shape[:2]
        old = state or self.init_state(batch, count, x.dtype)
        new = aligned.write(old, tokens, {}, segments, 1)
        document = jnp.ones((batch, count), jnp.int32)
        if segments is not None:
            document = (boundaries.ordinals(segments) + 1) * boundaries.is_real(segments)

        def alone():
            return self._sorted(tokens, document)

        def beside():
            held = jnp.arange(old["qk"].shape[1]) < old["length"][:, None]
            both = {n: jnp.concatenate([old[n].astype(t.dtype), t], 1) for n, t in tokens.items()}
            documents = jnp.concatenate([held.astype(jnp.int32), document], axis=1)
            return self._sorted(both, documents)[:, -count:]

        if state is None:
            o_BTHV = alone()
        elif count == 1 and segments is None:
            o_BTHV = self._last(tokens["qk"], new)
        else:
            o_BTHV = jax.lax.cond(jnp.all(old["length"] == 0), alone, beside)
        return weights.project("bthv,hvd->btd", o_BTHV.astype(x.dtype), self.o), new

    def _hash(self, qk_BTHK) -> Array:
        """(B, T, R, H): 1 + the bucket in each round (0 is an empty slot)."""
        planes = jax.lax.stop_gradient(self.planes[...].astype(qk_BTHK.dtype))
        side_BTRHE = jnp.einsum("bthk,rhke->btrhe", jax.lax.stop_gradient(qk_BTHK), planes)
        return 1 + jnp.argmax(jnp.concatenate([side_BTRHE, -side_BTRHE], -1), -1).astype(jnp.int32)

    def _sorted(self, tokens, document_BT) -> Array:
        """What every token reads, round by round: each sorts the tokens of a head by bucket."""
        run_BTRH = tokens["hash"] + self.buckets * document_BT[:, :, None, None]
        run_BTRH = jnp.where(document_BT[:, :, None, None] > 0, run_BTRH, 0)  # padding
        one_head = jax.vmap(jax.checkpoint(self._one_round), in_axes=1, out_axes=1)
        one_row = jax.vmap(one_head)
        runs = jnp.moveaxis(run_BTRH, 2, 0)
        o_RBTHV, z_RBTH = jax.lax.map(lambda run: one_row(tokens["qk"], tokens["v"], run), runs)
        share_RBTH = jax.nn.softmax(z_RBTH, axis=0)
        return jnp.sum(share_RBTH[..., None] * o_RBTHV, axis=0)

    def _one_round(self, qk_TK, v_TV, run_T) -> tuple[Array, Array]:
        """(what each token reads, log of its sum of exponentials) among the last of its run.

        In sorted order these are neighbours: chunks of `window` look at themselves and one before.
        """
        count, size = len(run_T), self.window
        order_T = jnp.argsort(run_T, stable=True)
        back_T = jnp.argsort(order_T)
        cut = lambda x: _pad(x, 0, -count % size).reshape(-1, size, *x.shape[1:])
        pair = lambda x: jnp.concatenate([_pad(x, 1, 0)[:-1], x], axis=1)
        q_NCK, v_NCV, run_NC = (cut(x[order_T]) for x in (qk_TK, v_TV, run_T))
        distance_CS = jnp.arange(size)[:, None] + size - jnp.arange(2 * size)
        seen_NCS = (pair(run_NC)[:, None] == run_NC[:, :, None]) & (run_NC > 0)[:, :, None]
        seen_NCS &= (distance_CS >= 0) & (distance_CS < size)
        wide = mixer.wide(q_NCK.dtype)
        s_NCS = jnp.einsum(
            "nck,nsk->ncs", q_NCK, pair(layers.l2_norm(q_NCK)), preferred_element_type=wide
        )
        s_NCS = _scores(s_NCS, seen_NCS, distance_CS == 0, q_NCK.shape[-1])
        p_NCS, z_NC = _softmax(s_NCS)
        o_NCV = jnp.einsum("ncs,nsv->ncv", p_NCS * seen_NCS, pair(v_NCV).astype(wide))
        join = lambda y: y.reshape(-1, *y.shape[2:])[back_T]
        return join(o_NCV), join(z_NC)

    def _last(self, q_B1HK, state) -> Array:
        """The same for the newest token of each row, against its state."""
        wide = mixer.wide(q_B1HK.dtype)
        last_B = state["length"] - 1
        slot = jnp.arange(state["qk"].shape[1])
        held_BS11 = (slot <= last_B[:, None])[:, :, None, None]
        own_BRH = jnp.take_along_axis(state["hash"], last_B[:, None, None, None], axis=1)
        same_BSRH = (state["hash"] == own_BRH) & held_BS11
        later_BSRH = jnp.cumsum(same_BSRH[:, ::-1], axis=1)[:, ::-1] - same_BSRH
        seen_BRHS = jnp.moveaxis(same_BSRH & (later_BSRH < self.window), 1, 3)
        k_BSHK = layers.l2_norm(state["qk"].astype(q_B1HK.dtype))
        s_BHS = jnp.einsum("bhk,bshk->bhs", q_B1HK[:, 0], k_BSHK, preferred_element_type=wide)
        is_self = (slot == last_B[:, None])[:, None, None]
        s_BRHS = _scores(s_BHS[:, None], seen_BRHS, is_self, q_B1HK.shape[-1])
        p_BRHS, z_BRH = _softmax(s_BRHS)
        p_BHS = jnp.sum(jax.nn.softmax(z_BRH, axis=1)[..., None] * p_BRHS, axis=1)
        return jnp.einsum("bhs,bshv->bhv", p_BHS, state["v"].astype(wide))[:, None]

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Shared queries and keys, values and hashes of a document of `capacity` tokens."""
        tokens = {"qk": self.head_shape, "v": self.head_shape}
        state = aligned.empty(batch, capacity, 1, dtype, tokens)
        return state | {"hash": jnp.zeros((batch, capacity, *self.hash_shape), jnp.int32)}


def _pad(x: Array, before: int, after: int) -> Array:
    """Zeros at the ends of the first axis."""
    return jnp.pad(x, ((before, after),) + ((0, 0),) * (x.ndim - 1))


def _scores(s, seen, is_self, dim: int) -> Array:
    s = jnp.where(is_self, s * dim**-0.5 - SELF, s * dim**-0.5)
    return jnp.where(seen, s, jnp.finfo(s.dtype).min)


def _softmax(s) -> tuple[Array, Array]:
    """(softmax, log of the sum of exponentials) of the last axis."""
    z = jax.nn.logsumexp(s, axis=-1)
    return jnp.exp(s - z[..., None]), z
