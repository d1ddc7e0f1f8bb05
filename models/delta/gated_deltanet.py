"""Gated DeltaNet: the delta rule, which replaces what a key held, under a forget gate.

Gated Delta Networks (arXiv 2412.06464, eq. 10). Notable: keys and queries are L2-normalised after a
short convolution, the write strength beta is a sigmoid, the decay is Mamba-2's; several value heads
may share a key head (as in Qwen3-Next).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels.delta_rule import delta_rule
from models import layers, mixer


@dataclasses.dataclass
class Config:
    """Key heads, value heads (a multiple of them) and their dimensions."""

    heads: int = 4
    value_heads: int = 0  # 0: as many as heads
    key_dim: int = 0  # per head; 0: 3/4 of width / heads, as in the paper
    value_dim: int = 0  # per head; 0: twice key_dim
    conv: int = 4

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where the heads do not fit."""
        return Mixer(self, width, rngs)


class Mixer(mixer.Mixer):
    """S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = q_t S_t / sqrt(K)."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        groups, heads = config.heads, config.value_heads or config.heads
        if heads % groups:
            near = max(groups, heads // groups * groups)
            raise ValueError(f"value_heads={heads} is no multiple of heads={groups}. Use {near}.")
        key = config.key_dim or max(1, 3 * layers.split_heads(width, groups) // 4)
        value = config.value_dim or 2 * key
        init = layers.fan_in(width)
        self.qk = layers.weight(
            rngs, init, (width, 2, groups, key), ("embed", "parts", "heads", "key")
        )
        self.v = layers.weight(rngs, init, (width, heads, value), ("embed", "heads", "value"))
        self.z = layers.weight(rngs, init, (width, heads, value), ("embed", "heads", "value"))
        self.ba = layers.weight(rngs, init, (width, 2, heads), ("embed", "parts", "heads"))
        conv: dict[str, Any] = dict(width=config.conv, bias=False, activation="silu")
        self.qk_conv = layers.ShortConv((2, groups, key), ("parts", "heads", "key"), rngs, **conv)
        self.v_conv = layers.ShortConv((heads, value), ("heads", "value"), rngs, **conv)
        self.log_a = layers.weight(rngs, layers.log_uniform(1.0, 16.0), (heads,), ("heads",))
        self.dt_bias = layers.weight(rngs, layers.inverse_softplus(1e-3, 0.1), (heads,), ("heads",))
        self.norm = layers.weight(rngs, layers.constant(1.0), (value,), ("value",))
        out = layers.fan_in(heads, value)
        self.o = layers.weight(rngs, out, (heads, value, width), ("heads", "value", "embed"))
        self.state_shape = (heads, key, value)

    def __call__(self, x, *, segments=None, state=None):
        state = state or {"qk": None, "v": None, "s": None}
        dtype = mixer.wide(x.dtype)
        qk_BTPGK, qk_tail = self.qk_conv(
            layers.project("btd,dpgk->btpgk", x, self.qk),
            segments=segments,
            state=state["qk"],
        )
        v_BTHV, v_tail = self.v_conv(
            layers.project("btd,dhv->bthv", x, self.v),
            segments=segments,
            state=state["v"],
        )
        qk_BTPGK = layers.l2_norm(qk_BTPGK)
        ba_BTPH = layers.project("btd,dph->btph", x, self.ba).astype(dtype)
        rate_H = jnp.exp(self.log_a[...])
        o_BTHV, s_BHKV = delta_rule(
            qk_BTPGK[:, :, 0],
            qk_BTPGK[:, :, 1],
            v_BTHV,
            jax.nn.sigmoid(ba_BTPH[:, :, 0]),
            -rate_H * jax.nn.softplus(ba_BTPH[:, :, 1] + self.dt_bias[...]),
            segments=segments,
            initial_state=state["s"],
        )
        z_BTHV = layers.project("btd,dhv->bthv", x, self.z)
        o_BTHV = layers.rms_norm(o_BTHV, self.norm[...]) * jax.nn.silu(z_BTHV)
        y = layers.project("bthv,hvd->btd", o_BTHV, self.o)
        return y, {"qk": qk_tail, "v": v_tail, "s": s_BHKV}

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Convolution tails and the matrix state (B, H, K, V), all zero."""
        return {
            "qk": self.qk_conv.init_state(batch, dtype),
            "v": self.v_conv.init_state(batch, dtype),
            "s": jnp.zeros((batch, *self.state_shape), mixer.wide(dtype)),
        }
