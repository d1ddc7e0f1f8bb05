"""Efficient attention: queries softmaxed over features and keys over positions, then two products.

Efficient Attention (arXiv 1812.01243, section 3.2, softmax normalisation). Notable: the paper's
form is bidirectional (`causal=False`): a key feature's softmax runs over the whole document. The
causal form is an adaptation: at token t that softmax runs over the document's tokens up to t. It
keeps m_t = max(m_{t-1}, k_t) a feature, and sums as multiples of exp(m_t), which decay by
exp(m_{t-1} - m_t) when the maximum moves: a vector gate that is never positive. Weights start at
variance 1 / fan-in.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels.gated_linear import gated_linear
from kernels.linear_scan import linear_scan
from models import mixer, weights
from models.parts import features

NO_STATE = (
    "efficient attention with causal=False is bidirectional: it has no state to decode from. "
    "Use it in an encoder."
)


@dataclasses.dataclass
class Config:
    """The causal form, or with causal=False the paper's."""

    heads: int = 4
    key_dim: int = 0  # per head; 0: width / heads
    value_dim: int = 0  # per head; 0: width / heads
    causal: bool = True

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where heads does not divide the width."""
        return Mixer(self, width, rngs) if self.causal else Encoder(self, width, rngs)


CASES = {"efficient_attention": Config(), "efficient_encoder": Config(causal=False)}


class Mixer(mixer.Mixer):
    """o_t = softmax(q_t) diag(1 / z_t) S_t, S_t = sum exp(k_s) v_s^T, z_t = sum exp(k_s).

    Sums run over s <= t of the document.
    """

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        heads = config.heads
        key, value = features.head_dims(width, heads, config.key_dim, config.value_dim)
        self.qk = weights.inward(rngs, width, (2, heads, key), ("parts", "heads", "key"))
        self.v = weights.inward(rngs, width, (heads, value), ("heads", "value"))
        self.o = weights.outward(rngs, (heads, value), width, ("heads", "value"))
        self.state_shape = (heads, key, value)

    def _maps(self, x):
        """softmax(q) and k in float32, v in x's dtype."""
        qk_BTPHK = weights.project("btd,dphk->btphk", x, self.qk).astype(mixer.wide(x.dtype))
        v_BTHV = weights.project("btd,dhv->bthv", x, self.v)
        return jax.nn.softmax(qk_BTPHK[:, :, 0], axis=-1), qk_BTPHK[:, :, 1], v_BTHV

    def __call__(self, x, *, segments=None, state=None):
        old = state or self.init_state(x.shape[0], x.shape[1], x.dtype)
        q_BTHK, k_BTHK, v_BTHV = self._maps(x)
        top_BTHK, decay_BTHK, top = features.running_max(k_BTHK, segments, old["max"])
        k_BTHK = jnp.exp(k_BTHK - top_BTHK)
        z_BTHK, z_BHK = _sums(k_BTHK, decay_BTHK, segments, old["z"])
        o_BTHV, s_BHKV = gated_linear(
            q_BTHK / jnp.where(z_BTHK > 0, z_BTHK, 1),  # 0 at padding, else at least 1
            k_BTHK,
            v_BTHV,
            decay_BTHK,
            segments=segments,
            initial_state=old["s"],
            scale=1.0,
        )
        y = weights.project("bthv,hvd->btd", o_BTHV, self.o)
        return y, {"s": s_BHKV, "z": z_BHK, "max": top}

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """S and z as multiples of exp(m), and the maxima m of k."""
        s_BHKV = jnp.zeros((batch, *self.state_shape), mixer.wide(dtype))
        top = features.no_max(batch, self.state_shape[:2], dtype)
        return {"s": s_BHKV, "z": s_BHKV[..., 0], "max": top}


class Encoder(Mixer):
    """o_t = softmax(q_t) sum_s softmax_s(k_s) v_s^T over the document: up to t, and after it."""

    causal = False

    def __call__(self, x, *, segments=None, state=None):
        if state is not None:
            raise ValueError(NO_STATE)
        q_BTHK, k_BTHK, v_BTHV = self._maps(x)
        behind = None if segments is None else segments[:, ::-1]
        top_BTHK, _, _ = features.running_max(k_BTHK, segments)
        top_back_BTHK, _, _ = features.running_max(k_BTHK[:, ::-1], behind)
        k_BTHK = jnp.exp(k_BTHK - jnp.maximum(top_BTHK, top_back_BTHK[:, ::-1]))
        none = jnp.zeros_like(k_BTHK)
        z_BTHK, _ = _sums(k_BTHK, none, segments, None)
        z_back_BTHK, _ = _sums(k_BTHK[:, ::-1], none, behind, None)
        z_BTHK = z_BTHK + z_back_BTHK[:, ::-1] - k_BTHK
        q_BTHK = q_BTHK / jnp.where(z_BTHK > 0, z_BTHK, 1)
        gate = jnp.zeros(self.state_shape[0], k_BTHK.dtype)
        o_BTHV, _ = gated_linear(q_BTHK, k_BTHK, v_BTHV, gate, segments=segments, scale=1.0)
        after_BTHV, _ = gated_linear(
            q_BTHK[:, ::-1],
            k_BTHK[:, ::-1],
            v_BTHV[:, ::-1],
            gate,
            bonus=jnp.zeros(self.state_shape[:2], gate.dtype),  # t itself is in the first half
            segments=behind,
            scale=1.0,
        )
        o_BTHV = o_BTHV + after_BTHV[:, ::-1]
        return weights.project("bthv,hvd->btd", o_BTHV, self.o), ()

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """ValueError: there is none."""
        raise ValueError(NO_STATE)


def _sums(k_BTHK, decay_BTHK, segments, before_BHK):
    """z_t = exp(decay_t) z_{t-1} + k_t, zero at padding, and the last z."""
    flat = lambda array: array.reshape(*array.shape[:-2], -1)
    z_BTC, z_BC = linear_scan(
        flat(k_BTHK),
        flat(decay_BTHK),
        segments=segments,
        initial_state=None if before_BHK is None else flat(before_BHK),
    )
    return z_BTC.reshape(k_BTHK.shape), z_BC.reshape(k_BTHK[:, 0].shape)
