"""Linformer: attention to `rank` learned mixtures of a document's keys and values.

Self-Attention with Linear Complexity (arXiv 2006.04768, eq. 7). Notable: the projections E and F
of keys and values over positions are shared by the heads ("headwise sharing", section 4); softmax
runs over the mixtures, so the cost is linear in tokens. Packed rows need no mixtures of every
document: q_t . (sum_s E_s k_s) over the document of t is linear attention, in both directions, with
E_s as the value, and so is the reading of F: T rank K products a head for any number of documents.
Positions from `length` on are not read, and a row that is one longer document is refused.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels.gated_linear import gated_linear
from models import cache, checks, mixer, weights
from models.parts import documents


@dataclasses.dataclass
class Config:
    """Heads that attend to `rank` mixtures of documents of up to `length` tokens."""

    heads: int = 4
    head_dim: int = 0  # 0: width / heads
    rank: int = 128  # k of the paper
    length: int = 512  # positions that E and F know

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where heads, rank or length do not fit."""
        return Mixer(self, width, rngs)


class Mixer(mixer.Mixer):
    """o_t = softmax_r(q_t . (sum_s E_sr k_s) / sqrt(K)) (sum_s F_sr v_s), s over the document."""

    causal = False

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        heads, rank, length = config.heads, config.rank, config.length
        dim = config.head_dim or checks.split_heads(width, heads)
        if length < 1:
            raise ValueError(f"length={length} must be at least 1 position; the paper uses 512.")
        if not 1 <= rank <= length:
            near = min(max(rank, 1), length)
            raise ValueError(f"rank={rank} is outside 1 to length={length}. Use {near}.")
        self.qkv = weights.inward(rngs, width, (3, heads, dim), ("parts", "heads", "key"))
        # Variance 1 / length: a full document's mixtures have the scale of its keys.
        self.mixes = weights.weight(
            rngs, weights.fan_in(length), (2, length, rank), ("parts", "width", "rank")
        )
        self.o = weights.outward(rngs, (heads, dim), width, ("heads", "key"))

    def __call__(self, x, *, segments=None, state=None):
        if state is not None:
            raise documents.no_state("linformer")
        qkv_BTPHK = weights.project("btd,dphk->btphk", x, self.qkv)
        q_BTHK, k_BTHK, v_BTHK = (qkv_BTPHK[:, :, part] for part in range(3))
        read = self._whole_rows if segments is None else self._packed
        o_BTHK = read(q_BTHK * q_BTHK.shape[-1] ** -0.5, k_BTHK, v_BTHK, segments)
        return weights.project("bthk,hkd->btd", o_BTHK, self.o), ()

    def _whole_rows(self, q_BTHK, k_BTHK, v_BTHK, segments):
        """The paper's form: rank keys and values a row, formed once."""
        dtype, length = mixer.wide(q_BTHK.dtype), q_BTHK.shape[1]
        documents.check_length(length, self.mixes.shape[1])
        keys_TR, values_TR = self.mixes[:, :length].astype(q_BTHK.dtype)
        k_BRHK = jnp.einsum("tr,bthk->brhk", keys_TR, k_BTHK)
        v_BRHK = jnp.einsum("tr,bthk->brhk", values_TR, v_BTHK)
        scores_BTHR = jnp.einsum("bthk,brhk->bthr", q_BTHK, k_BRHK).astype(dtype)
        shares_BTHR = jax.nn.softmax(scores_BTHR).astype(q_BTHK.dtype)
        return jnp.einsum("bthr,brhk->bthk", shares_BTHR, v_BRHK)

    def _packed(self, q_BTHK, k_BTHK, v_BTHK, segments):
        """The same with documents in a row, by linear attention in both directions."""
        dtype, (batch, length, heads, _) = mixer.wide(q_BTHK.dtype), q_BTHK.shape
        longest, rank = self.mixes.shape[1:]
        position_BT, _ = cache.document_positions(jnp.zeros(batch, jnp.int32), segments, length)
        mixes_PBTR = jnp.take(self.mixes[...], position_BT, axis=1, mode="clip")
        mixes_PBTR = jnp.where((position_BT < longest)[..., None], mixes_PBTR, 0)
        shape = (2, batch, length, heads, rank)
        mixes_PBTHR = jnp.broadcast_to(mixes_PBTR[:, :, :, None], shape)
        mixes_PBTHR = mixes_PBTHR.astype(q_BTHK.dtype)
        scores_BTHR = _both_ways(q_BTHK, k_BTHK, mixes_PBTHR[0].astype(dtype), segments)
        shares_BTHR = jax.nn.softmax(scores_BTHR).astype(q_BTHK.dtype)
        return _both_ways(shares_BTHR, mixes_PBTHR[1], v_BTHK, segments)

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Raises ValueError: it reads the whole document."""
        raise documents.no_state("linformer")


def _both_ways(q_BTHK, k_BTHK, v_BTHV, segments):
    """sum_s (q_t . k_s) v_s over all tokens s of the document of t."""
    heads, dim = q_BTHK.shape[2:]
    keep_all = jnp.zeros(heads, mixer.wide(q_BTHK.dtype))
    until, _ = gated_linear(q_BTHK, k_BTHK, v_BTHV, keep_all, segments=segments, scale=1.0)
    turn = lambda x: jnp.flip(x, axis=1)
    after, _ = gated_linear(
        turn(q_BTHK),
        turn(k_BTHK),
        turn(v_BTHV),
        keep_all,
        bonus=jnp.zeros((heads, dim), keep_all.dtype),  # a token's own write was read above
        segments=turn(segments),
        scale=1.0,
    )
    return until + turn(after)
