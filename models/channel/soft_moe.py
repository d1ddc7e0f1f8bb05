"""Soft mixture of experts: each expert works on slots, which are means over the tokens.

From Sparse to Soft Mixtures of Experts (arXiv 2308.00951, sections 2.1 and 2.3). Notable: no
choice is made, so that everything is smooth; but a slot mixes all tokens of its document, later
ones too: for encoders only. Each document has slots of its own (the paper has one sequence a row).
Where `segments` are given, a row may hold `documents` of them; outputs of a row that holds more are
NaN. There is no load to report.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels import segments as boundaries
from models import layers, mixer, weights
from models.parts import routing


@dataclasses.dataclass
class Config:
    """Experts, their slots in a document, and their size."""

    experts: int = 8
    slots: int = 1  # of each expert in a document
    hidden: int = 0  # of one expert; 0: 4 * width
    documents: int = 8  # the most that a packed row may hold

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where a size does not fit."""
        return Mixer(self, width, rngs)


CASES = {"soft_moe": Config()}


class Mixer(mixer.Mixer):
    """Y = C f(D^T X), D = softmax over tokens and C = softmax over slots of X Phi.

    In X Phi tokens have length 1 and the columns of Phi one learned length.
    """

    causal = False

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        routing.check(config.experts, 1)
        for name in ("slots", "documents"):
            if getattr(config, name) < 1:
                raise ValueError(f"{name}={getattr(config, name)} must be at least 1. Use 1.")
        hidden = routing.hidden_units(config.hidden, width, 4, 1)
        shape = (config.experts, config.slots)
        self.router = weights.inward(rngs, width, shape, ("experts", "parts"))
        self.scale = weights.filled(rngs, 1.0, (), ())
        self.experts = routing.Experts(
            config.experts, width, hidden, rngs, activation=jax.nn.gelu, gated=False, share=1.0
        )
        self.documents = config.documents

    def __call__(self, x, *, segments=None, state=None):
        if state is not None:
            self.init_state(0, 0)
        width, experts, slots = self.router.shape
        real_BT = routing.real(segments, x)
        document_BT, documents = jnp.zeros(x.shape[:2], jnp.int32), 1
        if segments is not None:
            document_BT, documents = boundaries.ordinals(segments), self.documents
        own_BTN = (document_BT[..., None] == jnp.arange(documents)) & real_BT[..., None]
        logits_BTS = self._logits(x)
        dispatch_BTNS = _softmax_over_time(logits_BTS[:, :, None], own_BTN[..., None])
        slots_SBND = jnp.einsum("btns,btd->sbnd", dispatch_BTNS.astype(x.dtype), x)
        rows = slots_SBND.reshape(-1, width)
        sizes = jnp.full(experts, rows.shape[0] // experts, jnp.int32)
        slots_SBND = self.experts.rows(rows, sizes).reshape(slots_SBND.shape)
        combine_BTS = jax.nn.softmax(logits_BTS).astype(x.dtype)
        combine_BTNS = combine_BTS[:, :, None] * own_BTN[..., None]
        y = jnp.einsum("btns,sbnd->btd", combine_BTNS, slots_SBND)
        held_B = document_BT[:, -1] < documents
        return jnp.where(held_B[:, None, None], y, jnp.nan), ()

    def _logits(self, x):
        """scale * x / |x| . phi / |phi| (B, T, E S), an expert's slots side by side."""
        wide = mixer.wide(x.dtype)
        phi_DS = self.router[...].reshape(x.shape[-1], -1)
        phi_DS = layers.l2_norm(phi_DS.T).T * self.scale[...]
        highest = jax.lax.Precision.HIGHEST
        unit = layers.l2_norm(x.astype(wide))
        return jnp.einsum("btd,ds->bts", unit, phi_DS.astype(wide), precision=highest)

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """None: ValueError."""
        raise ValueError(
            "soft_moe is bidirectional: it has no state to decode from. Use it in an encoder."
        )


def _softmax_over_time(logits, own):
    """softmax over axis 1 where `own`; zeros where a document has no tokens."""
    low = jnp.finfo(logits.dtype).min
    highest = jnp.max(jnp.where(own, logits, low), axis=1, keepdims=True)
    weights = jnp.where(own, jnp.exp(jnp.minimum(logits - jax.lax.stop_gradient(highest), 0)), 0)
    return weights / jnp.maximum(weights.sum(1, keepdims=True), jnp.finfo(logits.dtype).tiny)
