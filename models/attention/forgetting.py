"""Forgetting attention: softmax attention whose scores sink by data-dependent forget gates.

Forgetting Transformer (arXiv 2503.02130, eqs. 9, 10; the Pro block of section 3.3). Notable: one
sigmoid gate a head a token stands in for positions, so there are none; a cached slot keeps the sum
of all gates after it. The gate's bias starts at 0, as in the authors' code.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels.attention import attention, cached_attention
from models import cache, checks, layers, mixer, weights
from models.parts import forget_gates


@dataclasses.dataclass
class Config:
    """The plain mixer, or with `pro` the one with shifted, normed keys and a gated output."""

    heads: int = 4
    head_dim: int = 0  # 0: width / heads
    pro: bool = False  # key and value shift, norms of q, k and the output, output gate

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where heads does not divide the width."""
        return Mixer(self, width, rngs)


CASES = {"fox": Config(), "fox_pro": Config(pro=True)}


class Mixer(mixer.Mixer):
    """o_t = softmax_s(q_t k_s / sqrt(K) + sum of log f over s < i <= t) v_s, f = sigmoid(W x + b).

    Pro: k and v are a_t k~_{t-1} + (1 - a_t) k~_t with one sigmoid a a head; q, k and o pass RMS
    norms a head; o is multiplied by sigmoid(W_g x).
    """

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        heads = config.heads
        dim = config.head_dim or checks.split_heads(width, heads)
        if heads < 1 or dim < 1:
            raise ValueError(f"heads={heads} of head_dim={dim}: both must be at least 1.")
        self.q = weights.inward(rngs, width, (heads, dim), ("heads", "key"))
        self.kv = weights.inward(rngs, width, (2, heads, dim), ("parts", "heads", "key"))
        self.forget = weights.inward(rngs, width, (heads,), ("heads",))
        self.forget_bias = weights.filled(rngs, 0.0, (heads,), ("heads",))
        self.o = weights.outward(rngs, (heads, dim), width, ("heads", "key"))
        self.pro = config.pro
        if config.pro:
            self.shift = weights.inward(rngs, width, (2, heads), ("parts", "heads"))
            self.gate = weights.inward(rngs, width, (heads, dim), ("heads", "key"))
            self.norms = weights.filled(rngs, 1.0, (3, heads, dim), ("parts", "heads", "key"))
        self.heads, self.dim = heads, dim

    def __call__(self, x, *, segments=None, state=None):
        old = state or self.init_state(x.shape[0], x.shape[1], x.dtype)
        positions_BT = cache.positions(old["length"], segments, x.shape[1])
        q_BTHK, k_BTHK, v_BTHK, last = self._tokens(x, segments, old)
        gate_BTH = weights.project("btd,dh->bth", x, self.forget).astype(mixer.wide(x.dtype))
        log_forget_BTH = jax.nn.log_sigmoid(gate_BTH + self.forget_bias[...])
        after_BTH = forget_gates.since(log_forget_BTH, segments)
        bias = forget_gates.aged(old["bias"], old["position"], log_forget_BTH, segments)
        o_BTHK, new = cache.attend(
            {"k": k_BTHK, "v": v_BTHK, "bias": after_BTH},
            old | {"bias": bias},
            positions_BT,
            segments,
            training=state is None,
            alone=lambda: attention(
                q_BTHK, k_BTHK, v_BTHK, segments=segments, log_forget=log_forget_BTH
            ),
            beside=lambda seen, **where: cached_attention(
                q_BTHK, seen["k"], seen["v"], bias_q=-after_BTH, bias_k=seen["bias"], **where
            ),
        )
        if self.pro:
            gate_BTHK = weights.project("btd,dhk->bthk", x, self.gate)
            o_BTHK = layers.rms_norm(o_BTHK, self.norms[2]) * jax.nn.sigmoid(gate_BTHK)
        return weights.project("bthk,hkd->btd", o_BTHK, self.o), new | last

    def _tokens(self, x, segments, old):
        """q, k, v, and what the next shift asks for."""
        q_BTHK = weights.project("btd,dhk->bthk", x, self.q)
        kv_BTPHK = weights.project("btd,dphk->btphk", x, self.kv)
        if not self.pro:
            return q_BTHK, kv_BTPHK[:, :, 0], kv_BTPHK[:, :, 1], {}
        flat_BTF = kv_BTPHK.reshape(*x.shape[:2], -1)
        before_BTF, last = layers.token_shift(flat_BTF, segments, old["shift"])
        mix_BTPH = jax.nn.sigmoid(weights.project("btd,dph->btph", x, self.shift))
        kv_BTPHK += mix_BTPH[..., None] * (before_BTF.reshape(kv_BTPHK.shape) - kv_BTPHK)
        q_BTHK = layers.rms_norm(q_BTHK, self.norms[0])
        k_BTHK = layers.rms_norm(kv_BTPHK[:, :, 0], self.norms[1])
        return q_BTHK, k_BTHK, kv_BTPHK[:, :, 1], {"shift": last}

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Empty slots of k, v and the sum of later gates; pro: the last token's k and v."""
        shape = (self.heads, self.dim)
        state = cache.empty(batch, capacity, dtype, k=shape, v=shape)
        state["bias"] = jnp.zeros((batch, capacity, self.heads), mixer.wide(dtype))
        if self.pro:
            state["shift"] = jnp.zeros((batch, 1, 2 * self.heads * self.dim), dtype)
        return state
