"""S5: one state space for all channels, with full maps in and out of a diagonal state.

Simplified State Space Layers for Sequence Modeling (arXiv 2208.04933, eqs. 4 to 6, section 4 and
appendix B). Notable: the transition starts as blocks of HiPPO-N and B and C in its eigenbasis, so
that conjugate pairs make half of the modes enough; every mode has a step size; the output is gated
by itself, gelu(y) * sigmoid(W gelu(y) + b). Parameters and their start are the released code's: the
real part of a mode is a weight itself, cut at -1e-4 (its `clip_eigs`, which it advises for rows
without end); B starts real and C complex, of variance 1 / P in each part.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from kernels.linear_scan import complex_linear_scan
from models import mixer, weights
from models.parts import diagonal
from parallel.sharding import constrain


@dataclasses.dataclass
class Config:
    """A state of `state` numbers, held as half as many complex modes, for the whole layer."""

    state: int = 0  # P of the paper; 0: the model's width
    blocks: int = 8  # J, of HiPPO-N at the start
    dt_min: float = 1e-3  # step sizes start log-uniform in [dt_min, dt_max]
    dt_max: float = 0.1

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where the state has no `blocks` blocks of even size."""
        return Mixer(self, width, rngs)


CASES = {"s5": Config()}
SLOWEST = 1e-4  # the least rate of a mode, so that none grows


class Mixer(mixer.Mixer):
    """h' = A h + B x, y = 2 Re(C h) + D x, discretised; out = g * sigmoid(W g + b), g = gelu(y)."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        state, blocks = config.state or width, config.blocks
        if blocks < 1 or state < 2 or state % (2 * blocks):
            near = max(1, round(state / (2 * max(1, blocks)))) * 2 * max(1, blocks)
            raise ValueError(
                f"state={state} is no multiple of 2 * blocks = {2 * blocks}. Use state={near}."
            )
        size, modes = state // blocks, state // 2
        rate, frequency, vectors = diagonal.normal_legs(size)
        repeat = lambda part: diagonal.rows(np.tile(part, blocks))
        steps = diagonal.log_steps(config.dt_min, config.dt_max)
        self.log_dt = weights.weight(rngs, steps, (modes,), ("channels",))
        self.rate = weights.weight(rngs, repeat(rate), (modes,), ("channels",))
        self.frequency = weights.weight(rngs, repeat(frequency), (modes,), ("channels",))
        into = _turned(vectors.conj(), blocks, width, 1)
        self.b = weights.weight(rngs, into, (width, 2, modes), ("embed", "parts", "channels"))
        out = _turned(vectors, blocks, width, 2)
        self.c = weights.weight(rngs, out, (width, 2, modes), ("embed", "parts", "channels"))
        self.skip = weights.weight(rngs, weights.normal(1.0), (width,), ("embed",))
        self.gate = weights.outward(rngs, (width,), width, ("channels",))
        self.gate_bias = weights.filled(rngs, 0.0, (width,), ("embed",))

    def __call__(self, x, *, segments=None, state=None):
        dtype = mixer.wide(x.dtype)
        log_decay, phase, into = diagonal.zero_order_hold(
            jnp.exp(self.log_dt[...]), jnp.maximum(self.rate[...], SLOWEST), self.frequency[...]
        )
        u_BTPN = weights.project("btd,dpn->btpn", x, self.b).astype(dtype)
        u_PBTN = diagonal.times(u_BTPN.transpose(2, 0, 1, 3), into[:, None, None])
        (real_BTN, imag_BTN), h_B2N = complex_linear_scan(
            u_PBTN[0], u_PBTN[1], log_decay, phase, segments=segments, initial_state=state
        )
        h_BTPN = 2 * jnp.stack([real_BTN, -imag_BTN], axis=2).astype(x.dtype)
        # Without a layout of its own XLA mixes up rows of a mesh where tokens are few (0.10, 0.12).
        stream = "batch", "time", "embed"
        y_BTD = constrain(weights.project("btpn,dpn->btd", h_BTPN, self.c), *stream)
        y_BTD = y_BTD + self.skip[...] * x
        y_BTD = jax.nn.gelu(y_BTD.astype(x.dtype))
        gate_BTD = constrain(weights.project("btc,cd->btd", y_BTD, self.gate), *stream)
        gate_BTD = gate_BTD + self.gate_bias[...]
        return (y_BTD * jax.nn.sigmoid(gate_BTD)).astype(x.dtype), h_B2N

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Zeros (B, 2, P / 2): real and imaginary parts."""
        return jnp.zeros((batch, 2, *self.rate.shape), mixer.wide(dtype))


def _turned(vectors, blocks, width, parts):
    """Real (1 part) or complex (2) numbers of variance 1 / P a part, in the blocks' eigenbasis."""

    def init(key, shape):
        drawn = weights.fan_in(blocks * len(vectors))(key, (parts, width, blocks, len(vectors)))
        drawn = jnp.pad(drawn, ((0, 2 - parts), (0, 0), (0, 0), (0, 0)))
        by_real, by_imag = (
            jnp.einsum("pdjs,sm->pdjm", drawn, part) for part in (vectors.real, vectors.imag)
        )
        turned = by_real[0] - by_imag[1], by_imag[0] + by_real[1]
        return jnp.stack([part.reshape(width, -1) for part in turned], axis=1).astype(drawn.dtype)

    return init
