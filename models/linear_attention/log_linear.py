"""Log-linear attention: Mamba-2 with a matrix state for every scale of the past.

Log-Linear Attention (arXiv 2506.04761, eqs. 3 and 4 and section 3.3). Notable: a Fenwick tree cuts
the past of a token into pieces that double in length; each has its own state, read with its own
weight lambda >= 0, so there are log2(T) + 1 states. Token j is on level bit_length(i xor j) for
token i, which any chunk can tell from positions alone: tokens of a chunk are read pair by pair, the
states from before it by level, with no alignment of chunks to the tree. B and C are shared by all
heads; the rest is Mamba-2's block.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels import chunks
from models import cache, checks, layers, mixer, weights

CHUNK = 128  # longer than elsewhere: training keeps every level once a chunk


@dataclasses.dataclass
class Config:
    """Inner width expand * D in heads of head_dim; states of `state` numbers a channel."""

    expand: int = 2
    head_dim: int = 64
    state: int = 128
    levels: int = 16  # with a weight of their own: 2^15 tokens; what is older shares the last
    conv: int = 4  # taps of the short convolutions

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where head_dim, levels or conv do not fit."""
        return Mixer(self, width, rngs)


CASES = {"log_linear": Config()}


class Mixer(mixer.Mixer):
    """o_t = sum_s lambda_t^level(t, s) exp(sum of gates in (s, t]) (C_t B_s) dt_s x_s."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        inner, dim, state = config.expand * width, config.head_dim, config.state
        heads = checks.split_heads(inner, dim, "head_dim", "expand * width =")
        if config.levels < 2:
            raise ValueError(f"levels={config.levels} must be at least 2; 1 is Mamba-2. Use 16.")
        dims = ("heads", "value")
        self.zx = weights.inward(rngs, width, (2, heads, dim), ("parts", *dims))
        self.bc = weights.inward(rngs, width, (2, state), ("parts", "state"))
        self.dt = weights.inward(rngs, width, (heads,), ("heads",))
        self.level = weights.inward(rngs, width, (heads, config.levels), ("heads", "parts"))
        self.level_scale = weights.filled(rngs, 1.0, (heads, config.levels), ("heads", "parts"))
        conv: dict[str, Any] = dict(width=config.conv, activation="silu")
        self.x_conv = layers.ShortConv((heads, dim), dims, rngs, **conv)
        self.bc_conv = layers.ShortConv((2, state), ("parts", "state"), rngs, **conv)
        self.dt_bias = weights.weight(
            rngs, weights.inverse_softplus(1e-3, 0.1), (heads,), ("heads",)
        )
        self.log_a = weights.weight(rngs, weights.log_uniform(1.0, 16.0), (heads,), ("heads",))
        self.skip = weights.filled(rngs, 1.0, (heads,), ("heads",))
        self.norm = weights.filled(rngs, 1.0, (heads, dim), dims)
        self.o = weights.outward(rngs, (heads, dim), width, dims)
        self.state_shape = (heads, state, dim)

    def __call__(self, x, *, segments=None, state=None):
        state = state or self.init_state(x.shape[0], x.shape[1], x.dtype)
        dtype = mixer.wide(x.dtype)
        zx_BTPHV = weights.project("btd,dphv->btphv", x, self.zx)
        u_BTHV, x_tail = self.x_conv(zx_BTPHV[:, :, 1], segments=segments, state=state["x"])
        bc_BTPK, bc_tail = self.bc_conv(
            weights.project("btd,dpk->btpk", x, self.bc), segments=segments, state=state["bc"]
        )
        dt_BTH = weights.project("btd,dh->bth", x, self.dt).astype(dtype)
        dt_BTH = jax.nn.softplus(dt_BTH + self.dt_bias[...])
        level_BTHL = weights.project("btd,dhl->bthl", x, self.level).astype(dtype)
        y_BTHV, s_BLHKV, length_B = log_linear(
            bc_BTPK[:, :, 1],
            bc_BTPK[:, :, 0],
            u_BTHV * dt_BTH[..., None].astype(x.dtype),
            -jnp.exp(self.log_a[...]) * dt_BTH,
            jax.nn.softplus(level_BTHL * self.level_scale[...]),
            segments=segments,
            initial_state=state["s"],
            length=state["length"],
        )
        y_BTHV = y_BTHV + (u_BTHV * self.skip[...][:, None]).astype(x.dtype)
        y_BTHV = y_BTHV * jax.nn.silu(zx_BTPHV[:, :, 0])
        flat_BTC = y_BTHV.reshape(*x.shape[:2], -1)
        flat_BTC = layers.rms_norm(flat_BTC, self.norm[...].reshape(-1), eps=1e-5)
        y = weights.project("bthv,hvd->btd", flat_BTC.reshape(y_BTHV.shape), self.o)
        return y, {"x": x_tail, "bc": bc_tail, "s": s_BLHKV, "length": length_B}

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Convolution tails, a state (H, K, V) for every level, the document's tokens so far."""
        levels = min(max(capacity - 1, 1).bit_length() + 1, self.level.shape[2])
        return {
            "x": self.x_conv.init_state(batch, dtype),
            "bc": self.bc_conv.init_state(batch, dtype),
            "s": jnp.zeros((batch, levels, *self.state_shape), mixer.wide(dtype)),
            "length": jnp.zeros(batch, jnp.int32),
        }


def log_linear(q, k, v, log_decay, weights, *, segments, initial_state, length):
    """o_t = sum_s weights_t[level(t, s)] exp(sum of gates in (s, t]) (q_t k_s) v_s.

    q and k (B, T, K) are shared by the heads of v (B, T, H, V), log_decay (B, T, H) and weights
    (B, T, H, levels). Returns outputs, states (B, levels, H, K, V) and the tokens (B,) of the row's
    last document. O(T log T) work: a chunk reads and writes every level once.
    """
    count = q.shape[1]
    chunk = chunks.length_for(count, CHUNK)
    position_BT, length_after = cache.document_positions(length, segments, count)
    position_BT = jnp.pad(position_BT, ((0, 0), (0, -count % chunk)), mode="edge")
    leaving_BN = position_BT[:, chunk - 1 :: chunk]
    entering_BN = jnp.concatenate([length[:, None] - 1, leaving_BN[:, :-1]], axis=1)
    fixed = (
        chunks.boundaries(chunks.pad(segments, chunk), chunk),
        position_BT,
        jnp.repeat(entering_BN, chunk, axis=1),
    )
    inputs = chunks.pad((q, k, v, log_decay, weights), chunk)
    s_BLHKV, o_BTHV = chunks.scan(_chunk, chunk, initial_state, inputs, fixed)
    return o_BTHV[:, :count], s_BLHKV, length_after


def _chunk(s_BLHKV, inputs, fixed):
    """One chunk: pairs of its tokens, reads of the entering states, writes of the leaving ones."""
    v_dtype, dtype = inputs[2].dtype, s_BLHKV.dtype
    q_BCK, k_BCK, v_BCHV, g_BCH, w_BCHL = (x.astype(dtype) for x in inputs)
    within, position_BC, entering_BC = fixed
    masks = chunks.masks(within, q_BCK.shape[1])
    decay_BHCS, kept_BCH = _decays(jnp.where(masks.real[..., None], g_BCH, 0))

    kind = w_BCHL.shape[3]
    pair_BCS = level(position_BC[:, :, None], position_BC[:, None, :])
    chosen_BCSL = jax.nn.one_hot(jnp.minimum(pair_BCS, kind - 1), kind, dtype=dtype)
    a_BHCS = jnp.einsum("bchl,bcsl->bhcs", w_BCHL, chosen_BCSL) * decay_BHCS
    a_BHCS *= jnp.where(masks.pair, jnp.einsum("bck,bsk->bcs", q_BCK, k_BCK), 0)[:, None]
    o_BCHV = jnp.einsum("bhcs,bshv->bchv", a_BHCS, v_BCHV)

    # What stands on level l for the last token before the chunk stands on max(l, h) for token t,
    # where h is the level of that last token.
    held = jnp.arange(s_BLHKV.shape[1])
    read_BCL = jnp.maximum(level(position_BC, entering_BC)[..., None], held)
    chosen_BCLM = jax.nn.one_hot(jnp.minimum(read_BCL, kind - 1), kind, dtype=dtype)
    seen_BCHL = jnp.einsum("bchm,bclm->bchl", w_BCHL, chosen_BCLM)
    seen_BCHL *= jnp.where(masks.read[..., None], kept_BCH, 0)[..., None]
    qs_BCLHV = jnp.einsum("bck,blhkv->bclhv", q_BCK, s_BLHKV)
    o_BCHV += jnp.einsum("bchl,bclhv->bchv", seen_BCHL, qs_BCLHV)

    top = held.shape[0] - 1
    last_B = position_BC[:, -1]
    moved_BL = jnp.maximum(level(last_B, entering_BC[:, 0])[:, None], held)
    moved_BLM = jax.nn.one_hot(jnp.minimum(moved_BL, top), top + 1, dtype=dtype)
    kept_BH = jnp.where(masks.keep[:, None], kept_BCH[:, -1], 0)
    after_BLHKV = jnp.einsum("blm,bh,blhkv->bmhkv", moved_BLM, kept_BH, s_BLHKV)
    own_BC = jnp.minimum(level(last_B[:, None], position_BC), top)
    k_BCMK = jax.nn.one_hot(own_BC, top + 1, dtype=dtype)[..., None] * k_BCK[:, :, None]
    left_BCH = jnp.where(masks.write[..., None], jnp.moveaxis(decay_BHCS[:, :, -1], 1, 2), 0)
    after_BLHKV += jnp.einsum("bcmk,bchv->bmhkv", k_BCMK, left_BCH[..., None] * v_BCHV)
    return after_BLHKV, o_BCHV.astype(v_dtype)


def level(later, earlier):
    """bit_length(later xor earlier): 0 for a token itself, doubling pieces before it."""
    return 32 - jax.lax.clz(later ^ earlier)


def _decays(g_BCH):
    """exp of the gates between two tokens (B, H, C, S), and of those up to each (B, C, H).

    Sums of each pair's own gates, not differences of sums: a weak gate keeps its digits.
    """
    g_BHC1 = jnp.swapaxes(g_BCH, 1, 2)[..., None]
    later = jnp.tril(jnp.ones((g_BHC1.shape[2],) * 2, bool), -1)
    between_BHCS = jnp.cumsum(jnp.where(later, g_BHC1, 0), axis=2)
    return jnp.exp(between_BHCS), jnp.exp(jnp.cumsum(g_BCH, axis=1))
