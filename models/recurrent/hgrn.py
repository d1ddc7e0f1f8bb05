"""HGRN: a gated diagonal recurrence of complex numbers whose forget gate has a lower bound.

Hierarchically Gated Recurrent Neural Network (arXiv 2311.04823, section 3.1). Notable: the gate
gives the decay's size, a learned phase that does not depend on the data its angle; later layers
get larger lower bounds, so they remember longer. Deviations: the bound is a number of the Config,
because a layer does not know its neighbours (the paper learns it, as a cumulative softmax over
layers; 0 is its first layer). Norm, SiLU gate and initial phases are those of the released code.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels.linear_scan import complex_linear_scan, linear_scan
from models import layers, mixer, weights


@dataclasses.dataclass
class Config:
    """A state of `channels` complex numbers, or of real ones as in the paper's ablation."""

    channels: int = 0  # 0: the model's width
    lower_bound: float = 0.5  # of the forget gate: 0 in a first layer, larger in later ones
    complex: bool = True
    phase_base: float = 10_000.0  # the phase of channel i starts at base^(-2 i / channels)

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where the bound or the sizes are out of range."""
        return Mixer(self, width, rngs)


CASES = {"hgrn": Config(), "hgrn_real": Config(complex=False)}


class Mixer(mixer.Mixer):
    """h_t = l_t exp(i theta) h_{t-1} + (1 - l_t) c_t, y = (norm([Re h, Im h]) * silu(W_g x)) W_o.

    l_t = bound + (1 - bound) sigmoid(W_l x + b_l) and c_t = silu(W_c x + b_c).
    """

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        channels, parts = config.channels or width, 2 if config.complex else 1
        if channels < 1:
            raise ValueError(f"channels={channels} is negative. Use 0 (the width) or at least 1.")
        if not 0 <= config.lower_bound < 1:
            raise ValueError(
                f"lower_bound={config.lower_bound} of the forget gate is outside [0, 1). "
                f"Use {min(max(config.lower_bound, 0.0), 0.99)}."
            )
        if config.phase_base < 1:
            raise ValueError(f"phase_base={config.phase_base} must be at least 1; usual: 10000.0.")
        shape, dims = (parts, channels), ("parts", "channels")
        self.c = weights.inward(rngs, width, shape, dims)
        self.gate = weights.inward(rngs, width, shape, dims)
        self.forget = weights.inward(rngs, width, (channels,), ("channels",))
        self.c_bias = weights.filled(rngs, 0.0, shape, dims)
        self.gate_bias = weights.filled(rngs, 0.0, shape, dims)
        self.forget_bias = weights.filled(rngs, 0.0, (channels,), ("channels",))
        self.norm = weights.filled(rngs, 1.0, (parts * channels,), ("channels",))
        self.norm_bias = weights.filled(rngs, 0.0, (parts * channels,), ("channels",))
        self.o = weights.outward(rngs, shape, width, dims)
        init = lambda key, shape: config.phase_base ** (-2 * jnp.arange(shape[0]) / shape[0])
        phase = lambda: weights.weight(rngs, init, (channels,), ("channels",))
        self.phase = phase() if config.complex else None
        self.lower_bound = config.lower_bound

    def __call__(self, x, *, segments=None, state=None):
        dtype, bound = mixer.wide(x.dtype), self.lower_bound
        forget_BTC = weights.project("btd,dc->btc", x, self.forget).astype(dtype)
        forget_BTC = forget_BTC + self.forget_bias[...]
        # 1 - l is formed from the gate's other side, and not by a subtraction that loses digits.
        entry_BTC = (1 - bound) * jax.nn.sigmoid(-forget_BTC)
        log_decay_BTC = _log_decay(forget_BTC, bound)
        c_BTPC = weights.project("btd,dpc->btpc", x, self.c).astype(dtype) + self.c_bias[...]
        c_BTPC = (jax.nn.silu(c_BTPC) * entry_BTC[:, :, None]).astype(x.dtype)
        if self.phase is None:
            h_BTC, last = linear_scan(
                c_BTPC[:, :, 0], log_decay_BTC, segments=segments, initial_state=state
            )
        else:
            h, last = complex_linear_scan(
                c_BTPC[:, :, 0],
                c_BTPC[:, :, 1],
                log_decay_BTC,
                jnp.broadcast_to(self.phase[...], log_decay_BTC.shape),
                segments=segments,
                initial_state=state,
            )
            h_BTC = jnp.concatenate(h, axis=-1)
        h_BTC = layers.layer_norm(h_BTC, self.norm[...], self.norm_bias[...])
        gate_BTPC = weights.project("btd,dpc->btpc", x, self.gate).astype(dtype)
        gate_BTPC = jax.nn.silu(gate_BTPC + self.gate_bias[...]).astype(x.dtype)
        y = weights.project("btpc,pcd->btd", h_BTC.reshape(gate_BTPC.shape) * gate_BTPC, self.o)
        return y, last

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Zeros: (B, 2, C), real and imaginary parts, or (B, C) where the state is real."""
        channels = self.forget.shape[1]
        shape = (batch, channels) if self.phase is None else (batch, 2, channels)
        return jnp.zeros(shape, mixer.wide(dtype))


def _log_decay(forget, bound: float):
    """log(bound + (1 - bound) sigmoid(forget)), exact also where the gate is shut or open."""
    if bound == 0:
        return jax.nn.log_sigmoid(forget)
    return jnp.log1p(-(1 - bound) * jax.nn.sigmoid(-forget))
