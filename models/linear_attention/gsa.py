"""Gated slot attention: softmax attention over a few slots, each a decaying mean of past tokens.

Gated Slot Attention for Efficient Linear-Time Sequence Modeling (arXiv 2409.07146, eqs. 7 to 9).
Notable: two gated linear attentions with a softmax between them; a slot forgets at its own rate
alpha and takes in 1 - alpha. In the first pass the gate stands on the axis that is not read, so
each slot is a head with values of width 1 and a scalar gate.
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
    """Heads with a few slots each."""

    heads: int = 4
    slots: int = 0  # a head; 0: width / heads
    gate_temperature: float = 8.0  # the forget gate is sigmoid^(1 / temperature)

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where heads, slots or gate_temperature do not fit."""
        return Mixer(self, width, rngs)


CASES = {"gsa": Config()}


class Mixer(mixer.Mixer):
    """K_t = diag(a_t) K_{t-1} + (1 - a_t) k_t^T, V_t likewise, o_t = softmax(K_t q_t) V_t."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        heads = config.heads
        dim = checks.split_heads(width, heads)
        slots = config.slots or dim
        if slots < 1:
            raise ValueError(f"slots={slots} must be at least 1; the paper uses 64. Use 1.")
        if config.gate_temperature <= 0:
            raise ValueError(f"gate_temperature={config.gate_temperature} must be > 0. Use 8.")
        self.qkv = weights.inward(rngs, width, (3, heads, dim), ("parts", "heads", "key"))
        self.gate = weights.inward(rngs, width, (heads, slots), ("heads", "state"))
        self.norm = weights.filled(rngs, 1.0, (heads, dim), ("heads", "key"))
        self.o = weights.outward(rngs, (heads, dim), width, ("heads", "key"))
        self.temperature = config.gate_temperature

    def __call__(self, x, *, segments=None, state=None):
        state = state or {"k": None, "v": None}
        q_BTHK, k_BTHK, v_BTHK = jnp.moveaxis(
            jax.nn.silu(weights.project("btd,dphk->btphk", x, self.qkv)), 2, 0
        )
        gate_BTHM = weights.project("btd,dhm->bthm", x, self.gate).astype(mixer.wide(x.dtype))
        log_decay_BTHM = jax.nn.log_sigmoid(gate_BTHM) / self.temperature
        write_BTHM = -jnp.expm1(log_decay_BTHM)
        by_slot = (*x.shape[:2], -1)
        logits_BTS1, keys = gated_linear(
            q_BTHK,
            k_BTHK,
            write_BTHM.reshape(*by_slot, 1),
            log_decay_BTHM.reshape(by_slot),
            segments=segments,
            initial_state=state["k"],
            scale=1.0,
        )
        o_BTHK, values = gated_linear(
            jax.nn.softmax(logits_BTS1.reshape(write_BTHM.shape), axis=-1),
            write_BTHM,
            v_BTHK,
            log_decay_BTHM,
            segments=segments,
            initial_state=state["v"],
            scale=1.0,
        )
        flat_BTD = jax.nn.silu(o_BTHK).reshape(*x.shape[:2], -1)
        o_BTHK = layers.rms_norm(flat_BTD, self.norm[...].reshape(-1)).reshape(o_BTHK.shape)
        return weights.project("bthk,hkd->btd", o_BTHK, self.o), {"k": keys, "v": values}

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Keys by slot (B, H M, K, 1) and values by slot (B, H, M, K), all zero."""
        (heads, dim), slots = self.norm.shape, self.gate.shape[2]
        return {
            "k": jnp.zeros((batch, heads * slots, dim, 1), mixer.wide(dtype)),
            "v": jnp.zeros((batch, heads, slots, dim), mixer.wide(dtype)),
        }
