"""ABC: attention with bounded-memory control, softmax attention over a few slots.

ABC: Attention with Bounded-memory Control (arXiv 2110.02488, section 4, "ABC_MLP"). Notable: a
token enters every slot with the weight exp(W x), and a slot is the weighted mean of all tokens so
far, so nothing forgets by time. As in the code of flash-linear-attention the map's outputs are cut
to [-32, 32], which keeps the sums in range, and an RMS norm by head follows; it adds rotary
positions, which are left out here.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels.gated_linear import gated_linear
from kernels.linear_scan import linear_scan
from models import checks, layers, mixer, weights

MOST = 32.0  # of a token's log weight: sums of exp stay within float32


@dataclasses.dataclass
class Config:
    """Heads with a few slots each."""

    heads: int = 4
    slots: int = 0  # a head; 0: width / heads

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where heads or slots do not fit."""
        return Mixer(self, width, rngs)


CASES = {"abc": Config()}


class Mixer(mixer.Mixer):
    """z_t = sum w_s, K_t = sum w_s k_s^T / z_t, V_t likewise, o_t = softmax(K_t q_t) V_t."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        heads = config.heads
        dim = checks.split_heads(width, heads)
        slots = config.slots or dim
        if slots < 1:
            raise ValueError(f"slots={slots} must be at least 1. Use 1.")
        self.qkv = weights.inward(rngs, width, (3, heads, dim), ("parts", "heads", "key"))
        self.control = weights.inward(rngs, width, (heads, slots), ("heads", "state"))
        self.norm = weights.filled(rngs, 1.0, (dim,), ("key",))
        self.o = weights.outward(rngs, (heads, dim), width, ("heads", "key"))

    def __call__(self, x, *, segments=None, state=None):
        state = state or {"k": None, "v": None, "z": None}
        q_BTHK, k_BTHK, v_BTHK = jnp.moveaxis(weights.project("btd,dphk->btphk", x, self.qkv), 2, 0)
        control_BTHM = weights.project("btd,dhm->bthm", x, self.control).astype(mixer.wide(x.dtype))
        weight_BTHM = jnp.exp(jnp.clip(control_BTHM, -MOST, MOST))
        flat_BTC = weight_BTHM.reshape(*x.shape[:2], -1)
        total_BTC, z_BC = linear_scan(
            flat_BTC, jnp.zeros_like(flat_BTC), segments=segments, initial_state=state["z"]
        )
        if segments is not None:
            total_BTC = jnp.where((segments != 0)[..., None], total_BTC, 1)
        total_BTHM = total_BTC.reshape(weight_BTHM.shape)
        stays_H = jnp.zeros(q_BTHK.shape[2], weight_BTHM.dtype)
        where = {"segments": segments, "initial_state": state["k"]}
        logits_BTHM, keys = gated_linear(q_BTHK, k_BTHK, weight_BTHM, stays_H, **where)
        read_BTHM = jax.nn.softmax(logits_BTHM / total_BTHM, axis=-1) / total_BTHM
        where = {"segments": segments, "initial_state": state["v"], "scale": 1.0}
        o_BTHK, values = gated_linear(read_BTHM, weight_BTHM, v_BTHK, stays_H, **where)
        o_BTHK = layers.rms_norm(o_BTHK, self.norm[...])
        y = weights.project("bthk,hkd->btd", o_BTHK, self.o)
        return y, {"k": keys, "v": values, "z": z_BC}

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Weighted sums of keys (B, H, K, M), of values (B, H, M, K) and of weights (B, H M)."""
        heads, slots = self.control.shape[1:]
        dim = self.norm.shape[0]
        return {
            "k": jnp.zeros((batch, heads, dim, slots), mixer.wide(dtype)),
            "v": jnp.zeros((batch, heads, slots, dim), mixer.wide(dtype)),
            "z": jnp.zeros((batch, heads * slots), mixer.wide(dtype)),
        }
