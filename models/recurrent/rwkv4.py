"""RWKV-4: an average of values under exponential weights that decay with distance, per channel.

RWKV: Reinventing RNNs for the Transformer Era (arXiv 2305.13048, section 3.1, appendix D). Notable:
the newest token has a bonus u of its own; sums are kept relative to a running largest exponent, so
no key overflows. Decays, bonuses and token mixes start as in the paper's appendix E. Deviation: the
paper starts the maps of r, k and o at zero, here they have variance 1 / width.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models import layers, mixer, weights
from models.parts import nonlinear_scan

EMPTY = -1e38  # the largest exponent of no token


@dataclasses.dataclass
class Config:
    """As many channels as the model's width."""

    depth: float = 0.5  # the layer's position, 0 (first) to 1 (last): it shapes decays and mixes

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where depth is out of range."""
        return Mixer(self, width, rngs)


class Mixer(mixer.Mixer):
    """y_t = (sigmoid(r_t) * wkv_t) W_o, wkv_t a mean of v_s of weights exp(k_s - (t - 1 - s) w).

    The weight of v_t is exp(u + k_t); r, k, v are maps of mixes of x_t and x_{t-1}.
    """

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        depth = config.depth
        if not 0 <= depth <= 1:
            near = min(max(depth, 0.0), 1.0)
            raise ValueError(f"depth={depth} of the layer is outside [0, 1]. Use {near}.")
        position = jnp.arange(width) / width
        along = jnp.arange(width) / max(width - 1, 1)
        mix = position ** (1 - depth)
        mixes = jnp.stack([0.5 * mix, mix, mix + 0.3 * depth])
        decay = -5 + 8 * along ** (0.7 + 1.3 * depth)
        zigzag = 0.5 * ((jnp.arange(width) + 1) % 3 - 1)
        fixed = lambda value: lambda key, shape: value
        self.mix = weights.weight(rngs, fixed(mixes), (3, width), ("parts", "embed"))
        self.w = weights.weight(
            rngs, weights.fan_in(width), (3, width, width), ("parts", "embed", "channels")
        )
        self.decay = weights.weight(rngs, fixed(decay), (width,), ("channels",))
        self.bonus = weights.weight(rngs, fixed(zigzag + math.log(0.3)), (width,), ("channels",))
        self.o = weights.outward(rngs, (width,), width, ("channels",))

    def __call__(self, x, *, segments=None, state=None):
        dtype = mixer.wide(x.dtype)
        if state is None:
            state = self.init_state(x.shape[0], x.shape[1], x.dtype)
        before_BTD, last = layers.token_shift(x, segments, state["x"])
        step_BTD = x.astype(dtype) - before_BTD
        mixed_BTPD = before_BTD[:, :, None] + self.mix[...] * step_BTD[:, :, None]
        rkv_BTPC = weights.project("btpd,pdc->btpc", mixed_BTPD.astype(x.dtype), self.w)
        rkv_BTPC = rkv_BTPC.astype(dtype)
        r_BTC, k_BTC, v_BTC = (rkv_BTPC[:, :, part] for part in range(3))
        of_step = (jnp.exp(self.decay[...].astype(dtype)), self.bonus[...].astype(dtype))
        sums = {name: state[name] for name in ("aa", "bb", "pp")}
        sums, wkv_BTC = nonlinear_scan.scan(_step, of_step, sums, (k_BTC, v_BTC), segments)
        y_BTC = (jax.nn.sigmoid(r_BTC) * wkv_BTC).astype(x.dtype)
        return weights.project("btc,cd->btd", y_BTC, self.o), sums | {"x": last}

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """The token before; sums exp(-pp) sum weight v (aa), exp(-pp) sum weight (bb); pp.

        bb is at least 1 once a token was read: where it is 0, pp stands for EMPTY.
        """
        channels, width = self.o.shape
        shape, wide = (batch, channels), mixer.wide(dtype)
        sums = {name: jnp.zeros(shape, wide) for name in ("aa", "bb", "pp")}
        return {"x": jnp.zeros((batch, 1, width), dtype)} | sums


def _step(weights, sums, inputs):
    (decay_C, bonus_C), (k_BC, v_BC) = weights, inputs
    pp_BC = jnp.where(sums["bb"] == 0, EMPTY, sums["pp"])
    (top_BC, bottom_BC), _ = _add(sums, pp_BC, bonus_C + k_BC, v_BC)
    (aa_BC, bb_BC), pp_BC = _add(sums, pp_BC - decay_C, k_BC, v_BC)
    return {"aa": aa_BC, "bb": bb_BC, "pp": pp_BC}, top_BC / bottom_BC


def _add(sums, exponent_BC, k_BC, v_BC):
    """Both sums at `exponent` with exp(k) v and exp(k) added, and their new largest exponent."""
    largest_BC = jnp.maximum(exponent_BC, k_BC)
    old_BC, new_BC = jnp.exp(exponent_BC - largest_BC), jnp.exp(k_BC - largest_BC)
    return (old_BC * sums["aa"] + new_BC * v_BC, old_BC * sums["bb"] + new_BC), largest_BC
