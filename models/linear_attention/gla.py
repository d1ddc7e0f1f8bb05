"""Gated linear attention: a matrix state whose rows decay at data-dependent rates.

Gated Linear Attention Transformers with Hardware-Efficient Training (arXiv 2312.06635, section 4).
Notable: the gate comes from a low-rank map and is a sigmoid to the power 1/16, so memory is long at
the start; the output passes a per-head norm and a swish gate.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels.gated_linear import gated_linear
from models import checks, layers, mixer, weights


@dataclasses.dataclass
class Config:
    """Keys are half as wide as the model and values as wide, as in the paper."""

    heads: int = 4
    key_dim: int = 0  # per head; 0: width / heads / 2
    value_dim: int = 0  # per head; 0: width / heads
    gate_rank: int = 16
    gate_temperature: float = 16.0  # tau of section 4.4

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where heads does not divide the width."""
        return Mixer(self, width, rngs)


class Mixer(mixer.Mixer):
    """S_t = diag(a_t) S_{t-1} + k_t v_t^T, o_t = q_t S_t / sqrt(K), y = (norm(o) * swish(r)) W."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        heads = config.heads
        value = config.value_dim or checks.split_heads(width, heads)
        key = config.key_dim or max(1, value // 2)
        if config.gate_rank < 1:
            raise ValueError(f"gate_rank={config.gate_rank} must be at least 1; the paper uses 16.")
        if config.gate_temperature <= 0:
            raise ValueError(f"gate_temperature={config.gate_temperature} must be > 0; usual: 16.")
        init = weights.fan_in(width)
        rank = config.gate_rank
        self.qk = weights.weight(
            rngs, init, (width, 2, heads, key), ("embed", "parts", "heads", "key")
        )
        self.vr = weights.weight(
            rngs, init, (width, 2, heads, value), ("embed", "parts", "heads", "value")
        )
        self.gate_in = weights.weight(rngs, init, (width, rank), ("embed", "rank"))
        self.gate_out = weights.weight(
            rngs, weights.fan_in(rank), (rank, heads, key), ("rank", "heads", "key")
        )
        self.gate_bias = weights.weight(rngs, weights.constant(0.0), (heads, key), ("heads", "key"))
        self.norm = weights.weight(rngs, weights.constant(1.0), (value,), ("value",))
        out = weights.fan_in(heads, value)
        self.o = weights.weight(rngs, out, (heads, value, width), ("heads", "value", "embed"))
        self.state_shape = (heads, key, value)
        self.temperature = config.gate_temperature

    def __call__(self, x, *, segments=None, state=None):
        qk_BTPHK = weights.project("btd,dphk->btphk", x, self.qk)
        vr_BTPHV = weights.project("btd,dphv->btphv", x, self.vr)
        gate_BTR = weights.project("btd,dr->btr", x, self.gate_in)
        gate_BTHK = weights.project("btr,rhk->bthk", gate_BTR, self.gate_out)
        gate_BTHK = gate_BTHK.astype(mixer.wide(x.dtype)) + self.gate_bias[...]
        o_BTHV, s_BHKV = gated_linear(
            qk_BTPHK[:, :, 0],
            qk_BTPHK[:, :, 1],
            vr_BTPHV[:, :, 0],
            jax.nn.log_sigmoid(gate_BTHK) / self.temperature,
            segments=segments,
            initial_state=state,
        )
        o_BTHV = layers.rms_norm(o_BTHV, self.norm[...]) * jax.nn.silu(vr_BTPHV[:, :, 1])
        return weights.project("bthv,hvd->btd", o_BTHV, self.o), s_BHKV

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Zeros (B, H, K, V)."""
        return jnp.zeros((batch, *self.state_shape), mixer.wide(dtype))
