"""PaTH attention: positions are products of data-dependent Householder-like maps.

PaTH Attention (arXiv 2505.16381, sections 2 and 3; with forget gates section 2.3, PaTH-FoX).
Notable: w comes from a low-rank map and a short convolution and has unit length, beta lies in (0,
2), so a map may reflect. The state keeps every key moved on to the newest token, which a step
changes by one vector a head: decoding then is softmax attention. As each step changes them, cached
keys have a recurrent state's dtype. Training scores by chunks of queries
(models/parts/householder.py).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels import segments as boundaries
from kernels.attention import cached_attention
from models import cache, checks, layers, mixer, weights
from models.parts import forget_gates, householder


@dataclasses.dataclass
class Config:
    """Heads, the map to w, and whether scores also sink by forget gates."""

    heads: int = 4
    head_dim: int = 0  # 0: width / heads
    rank: int = 32  # of the map to w
    conv: int = 3
    forget: bool = False

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where the sizes do not fit."""
        return Mixer(self, width, rngs)


CASES = {"path": Config(), "path_fox": Config(forget=True)}


class Mixer(mixer.Mixer):
    """o_t = softmax_s(k_s^T H_{s+1} ... H_t q_t / sqrt(K)) v_s, H_i = I - beta_i w_i w_i^T."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        heads = config.heads
        dim = config.head_dim or checks.split_heads(width, heads)
        if heads < 1 or dim < 1:
            raise ValueError(f"heads={heads} of head_dim={dim}: both must be at least 1.")
        if config.rank < 1:
            raise ValueError(f"rank={config.rank} must be at least 1; the paper uses 32.")
        self.qkv = weights.inward(rngs, width, (3, heads, dim), ("parts", "heads", "key"))
        self.w_down = weights.inward(rngs, width, (config.rank,), ("rank",))
        init = weights.fan_in(config.rank)
        self.w_up = weights.weight(rngs, init, (config.rank, heads, dim), ("rank", "heads", "key"))
        self.w_conv = layers.ShortConv((heads, dim), ("heads", "key"), rngs, width=config.conv)
        # Of each head: beta, and the forget gate where there is one.
        gates = 1 + config.forget
        self.gates = weights.inward(rngs, width, (gates, heads), ("parts", "heads"))
        self.gate_bias = weights.filled(rngs, 0.0, (gates, heads), ("parts", "heads"))
        self.o = weights.outward(rngs, (heads, dim), width, ("heads", "key"))
        self.forget, self.shape = config.forget, (heads, dim)

    def __call__(self, x, *, segments=None, state=None):
        old = state or self.init_state(x.shape[0], x.shape[1], x.dtype)
        positions_BT = cache.positions(old["length"], segments, x.shape[1])
        dtype = mixer.wide(x.dtype)
        qkv_BTPHK = weights.project("btd,dphk->btphk", x, self.qkv)
        q_BTHK, k_BTHK = (qkv_BTPHK[:, :, i].astype(dtype) for i in (0, 1))
        v_BTHK = qkv_BTPHK[:, :, 2]
        w_BTHK, tail = self._directions(x, segments, old["conv"])
        beta_BTH, log_forget_BTH = self._gates(x, segments)
        row = householder.chunked(q_BTHK, k_BTHK, w_BTHK, beta_BTH, log_forget_BTH)
        held, position_BS = old["k"], old["position"]
        tokens = {"k": householder.to_end(row, x.shape[1]), "v": v_BTHK}
        moved = old | {"k": householder.through(row, held)}
        bias_BSH = old.get("bias", jnp.zeros(held.shape[:3], dtype))
        if self.forget:
            tokens["bias"] = forget_gates.since(log_forget_BTH, segments)
            moved["bias"] = forget_gates.aged(bias_BSH, position_BS, log_forget_BTH, segments)

        def beside(seen, **where):
            if x.shape[1] > 1:
                past = householder.Past(held, old["v"], bias_BSH, position_BS > 0)
                return householder.attend(row, v_BTHK, segments, past)
            return cached_attention(q_BTHK, seen["k"], seen["v"], bias_k=seen.get("bias"), **where)

        o_BTHK, new = cache.attend(
            tokens,
            moved,
            positions_BT,
            segments,
            training=state is None,
            alone=lambda: householder.attend(row, v_BTHK, segments),
            beside=beside,
        )
        return weights.project("bthk,hkd->btd", o_BTHK, self.o), new | {"conv": tail}

    def _directions(self, x, segments, tail):
        """w of unit length, and the convolution's state."""
        w_BTR = weights.project("btd,dr->btr", x, self.w_down)
        w_BTHK = weights.project("btr,rhk->bthk", w_BTR, self.w_up)
        w_BTHK, tail = self.w_conv(w_BTHK, segments=segments, state=tail)
        return layers.l2_norm(w_BTHK.astype(mixer.wide(x.dtype))), tail

    def _gates(self, x, segments):
        """beta = 2 sigmoid, and log forget gates or zeros; padding changes and forgets nothing."""
        gates_BTPH = weights.project("btd,dph->btph", x, self.gates).astype(mixer.wide(x.dtype))
        gates_BTPH = gates_BTPH + self.gate_bias[...]
        beta_BTH = 2 * jax.nn.sigmoid(gates_BTPH[:, :, 0])
        log_forget_BTH = jnp.zeros_like(beta_BTH)
        if self.forget:
            log_forget_BTH = jax.nn.log_sigmoid(gates_BTPH[:, :, 1])
        if segments is None:
            return beta_BTH, log_forget_BTH
        real = boundaries.is_real(segments)[..., None]
        return jnp.where(real, beta_BTH, 0), jnp.where(real, log_forget_BTH, 0)

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Empty slots of moved keys, values and sums of later gates; the convolution's tail."""
        slots, wide = (batch, capacity), mixer.wide(dtype)
        state = cache.empty(batch, capacity, dtype, v=self.shape)
        state |= {"k": jnp.zeros((*slots, *self.shape), wide)}
        state |= {"conv": self.w_conv.init_state(batch, dtype)}
        if self.forget:
            state["bias"] = jnp.zeros((*slots, self.shape[0]), wide)
        return state
