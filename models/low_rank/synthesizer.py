"""Synthesizer: attention weights that a token writes by itself, without looking at the others.

Synthesizer: Rethinking Self-Attention for Transformer Models (arXiv 2005.00743, section 3).
Notable: the dense form maps a token to one score for each of `length` positions of its document,
the random form learns them (a weight a pair of positions and head, the same for every input).
Scores are T^2 numbers a row by nature. The causal form masks what comes later and caches values,
for it needs no keys. Positions from `length` on are seen by nobody; a longer document is refused
where the length of the row or the capacity tells.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels import segments as boundaries
from models import cache, checks, mixer, weights
from models.parts import documents


@dataclasses.dataclass
class Config:
    """Dense or random scores over up to `length` positions."""

    heads: int = 4
    head_dim: int = 0  # 0: width / heads
    length: int = 512  # positions of the longest document
    form: str = "dense"  # or "random"
    causal: bool = False

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where heads, length or form do not fit."""
        return Mixer(self, width, rngs) if self.causal else Encoder(self, width, rngs)


CASES = {
    "synthesizer": Config(),
    "synthesizer_random": Config(form="random"),
    "synthesizer_causal": Config(causal=True),
}


class Mixer(mixer.Mixer):
    """o_t = softmax_s(B_t[s]) v_s, B_t = relu(x_t W_1 + b_1) W_2 + b_2 (dense) or R[t] (random)."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        heads, length = config.heads, config.length
        dim = config.head_dim or checks.split_heads(width, heads)
        if length < 1:
            raise ValueError(f"length={length} must be at least 1 position; usual: 512.")
        if config.form not in ("dense", "random"):
            raise ValueError(f"form={config.form!r} is unknown. Use 'dense' or 'random'.")
        self.v = weights.inward(rngs, width, (heads, dim), ("heads", "value"))
        self.o = weights.outward(rngs, (heads, dim), width, ("heads", "value"))
        self.is_random = config.form == "random"
        if config.form == "dense":
            self.hidden = weights.inward(rngs, width, (heads, dim), ("heads", "key"))
            self.hidden_bias = weights.filled(rngs, 0.0, (heads, dim), ("heads", "key"))
            self.score = weights.weight(
                rngs, weights.fan_in(dim), (heads, dim, length), ("heads", "key", "state")
            )
            self.score_bias = weights.filled(rngs, 0.0, (heads, length), ("heads", "state"))
        else:
            self.table = weights.weight(
                rngs, weights.normal(1.0), (heads, length, length), ("heads", "width", "state")
            )
        self.length = length

    def __call__(self, x, *, segments=None, state=None):
        if state is not None and not self.causal:
            raise documents.no_state("synthesizer")
        batch, count = x.shape[:2]
        if segments is None:
            documents.check_length(count, self.length)
        v_BTHV = weights.project("btd,dhv->bthv", x, self.v)
        begun_B = jnp.zeros(batch, jnp.int32) if state is None else state["begun"]
        position_BT, begun_B = cache.document_positions(begun_B, segments, count)
        if not self.causal:
            return self._read(x, v_BTHV, position_BT, position_BT, _together(segments)), ()
        if state is None:
            old = cache.empty(batch, min(count, self.length), x.dtype, v=v_BTHV.shape[2:])
        else:
            old = {name: state[name] for name in ("v", "position", "length")}
        row_BT = cache.positions(old["length"], segments, count)

        def beside(seen, *, positions, kv_positions, segments, kv_segments):
            here_BTS = kv_positions[:, None] <= positions[..., None]
            here_BTS &= (kv_positions >= 0)[:, None] & _same(segments, kv_segments)
            # A slot's position in the row, less the tokens of the row before its document.
            at_BTS = kv_positions[:, None] - (positions - position_BT)[..., None]
            return self._read(x, seen["v"], position_BT, at_BTS, here_BTS)

        def alone():
            here_BTS = jnp.tril(jnp.ones((1, count, count), bool)) & _together(segments)
            return self._read(x, v_BTHV, position_BT, position_BT, here_BTS)

        y, new = cache.attend(
            {"v": v_BTHV},
            old,
            row_BT,
            segments,
            training=state is None,
            alone=alone,
            beside=beside,
        )
        return y, new | {"begun": begun_B}

    def _read(self, x, v_BSHV, position_BT, at, seen_BTS):
        """Values at document positions `at`, (B, S) or (B, T, S), by the scores that x writes."""
        at_BTS = at[:, None] if at.ndim == 2 else at
        scores_BHTL = self._scores(x, position_BT)
        index_BHTS = jnp.clip(at_BTS, 0, self.length - 1)[:, None]
        shape = (*scores_BHTL.shape[:3], index_BHTS.shape[-1])
        scores_BHTS = jnp.take_along_axis(scores_BHTL, jnp.broadcast_to(index_BHTS, shape), axis=3)
        seen_BTS = seen_BTS & (at_BTS >= 0) & (at_BTS < self.length)
        shares_BHTS = documents.softmax(scores_BHTS, seen_BTS[:, None]).astype(x.dtype)
        o_BTHV = jnp.einsum("bhts,bshv->bthv", shares_BHTS, v_BSHV.astype(x.dtype))
        return weights.project("bthv,hvd->btd", o_BTHV, self.o)

    def _scores(self, x, position_BT):
        """Every token's scores of all positions of its document."""
        dtype = mixer.wide(x.dtype)
        if self.is_random:
            table_HTL = self.table[...].astype(dtype)
            return jnp.take(table_HTL, position_BT, axis=1, mode="clip").swapaxes(0, 1)
        hidden_BTHK = weights.project("btd,dhk->bthk", x, self.hidden).astype(dtype)
        hidden_BTHK = jax.nn.relu(hidden_BTHK + self.hidden_bias[...]).astype(x.dtype)
        scores_BHTL = weights.project("bthk,hkl->bhtl", hidden_BTHK, self.score).astype(dtype)
        return scores_BHTL + self.score_bias[...][:, None]

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """The values read so far, and the tokens of the last document; for the causal form."""
        if not self.causal:
            raise documents.no_state("synthesizer")
        if capacity > self.length:
            raise ValueError(
                f"capacity={capacity} is more than the length={self.length} positions that have "
                f"scores. Use length={capacity}."
            )
        values = cache.empty(batch, capacity, dtype, v=self.v.shape[1:])
        return values | {"begun": jnp.zeros(batch, jnp.int32)}


class Encoder(Mixer):
    """The same, over the whole document."""

    causal = False


def _same(number_BT, number_BS):
    """Whether t and s are of one document, and not padding (B, T, S)."""
    if number_BT is None:
        return jnp.ones((1, 1, 1), bool)
    return (number_BT[:, :, None] == number_BS[:, None]) & (number_BT != 0)[:, :, None]


def _together(segments):
    """`_same` of the tokens of a row."""
    number_BT = None if segments is None else boundaries.numbered(segments)
    return _same(number_BT, number_BT)
