"""mLSTM: an LSTM with a matrix memory, exponential input gates and a normaliser.

xLSTM: Extended Long Short-Term Memory (arXiv 2405.04517, eqs. 19 to 27 and figure 11). Notable: the
stabiliser m, a running maximum of log gates, is a max-plus scan; with it every factor is at most 1
and the whole is one gated linear attention whose last value is the normaliser. m changes the
state's scale, never the output, so it has no gradient and starts at 0. The mixer is the paper's
block with its up-projection and gate; the forget gate is a sigmoid, as in the released code.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels import segments as boundaries
from kernels.gated_linear import gated_linear
from models import checks, layers, mixer, weights

FAR = -1e30  # stands for log 0


@dataclasses.dataclass
class Config:
    """Inner width expand * D in heads; q, k and v come from small blocks of channels."""

    heads: int = 4
    expand: int = 2
    block: int = 4  # channels of a block of the maps for q, k and v
    conv: int = 4  # taps of the convolution before q and k

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where heads, expand, block or conv do not fit."""
        return Mixer(self, width, rngs)


CASES = {"mlstm": Config()}


class Mixer(mixer.Mixer):
    """C_t = f_t C_{t-1} + i_t k_t v_t^T, n_t likewise of k_t, h_t = C_t q_t / max(|n_t q_t|, 1)."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        if config.expand < 1:
            raise ValueError(f"expand={config.expand} must be at least 1; the paper uses 2.")
        inner, heads, block = config.expand * width, config.heads, config.block
        dim = checks.split_heads(inner, heads)
        blocks = checks.split_heads(inner, block, "block")
        square: Any = (blocks, block, block), ("heads", "key", "value")
        self.up = weights.inward(rngs, width, (2, inner), ("parts", "channels"))
        self.conv = layers.ShortConv((inner,), ("channels",), rngs, width=config.conv)
        self.q, self.k, self.v = (
            weights.weight(rngs, weights.fan_in(block), *square) for _ in range(3)
        )
        self.gates = weights.filled(
            rngs, 0.0, (2, heads, 3, heads, dim), ("parts", "heads", "parts", "groups", "key")
        )
        self.input_bias = weights.weight(rngs, weights.normal(0.1), (heads,), ("heads",))
        self.forget_bias = weights.weight(
            rngs, lambda key, shape: jnp.linspace(3.0, 6.0, shape[0]), (heads,), ("heads",)
        )
        self.norm = weights.filled(rngs, 1.0, (heads, dim), ("heads", "key"))
        self.skip = weights.filled(rngs, 1.0, (inner,), ("channels",))
        self.down = weights.outward(rngs, (inner,), width, ("channels",))

    def __call__(self, x, *, segments=None, state=None):
        state = state or {"conv": None, "c": None, "m": None}
        up_BTPC = weights.project("btd,dpc->btpc", x, self.up)
        u_BTC, tail = self.conv(up_BTPC[:, :, 0], segments=segments, state=state["conv"])
        u_BTC = jax.nn.silu(u_BTC)
        q_BTHK, k_BTHK = self._heads(u_BTC, self.q), self._heads(u_BTC, self.k)
        v_BTHK = self._heads(up_BTPC[:, :, 0], self.v)
        log_input_BTH, log_forget_BTH = self._log_gates(q_BTHK, k_BTHK, v_BTHK)
        before_BTH, m_BTH = running_max(log_input_BTH, log_forget_BTH, segments, state["m"])
        write_BTH1 = jnp.exp(log_input_BTH - m_BTH)[..., None]
        decay_BTH = log_forget_BTH + before_BTH - m_BTH
        # At most 0 but for rounding; a plain minimum would cut the gradient where it is 0.
        decay_BTH -= jax.lax.stop_gradient(jnp.maximum(decay_BTH, 0))
        o_BTHV, c_BHKV = gated_linear(
            q_BTHK,
            k_BTHK * write_BTH1.astype(x.dtype),
            jnp.pad(v_BTHK, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=1),
            decay_BTH,
            segments=segments,
            initial_state=state["c"],
        )
        o_BTHV = o_BTHV.astype(m_BTH.dtype)
        floor_BTH1 = jnp.exp(-jnp.maximum(m_BTH, -80.0))[..., None]  # 1 on the scale of the state
        h_BTHK = o_BTHV[..., :-1] / jnp.maximum(jnp.abs(o_BTHV[..., -1:]), floor_BTH1)
        h_BTHK = layers.layer_norm(h_BTHK.astype(x.dtype), self.norm[...])
        h_BTC = h_BTHK.reshape(u_BTC.shape) + (u_BTC * self.skip[...]).astype(x.dtype)
        h_BTC = h_BTC * jax.nn.silu(up_BTPC[:, :, 1])
        y = weights.project("btc,cd->btd", h_BTC, self.down)
        return y, {"conv": tail, "c": c_BHKV, "m": m_BTH[:, -1]}

    def _heads(self, x_BTC, blocks):
        """x through the block-diagonal map, by heads."""
        x_BTHK = x_BTC.reshape(*x_BTC.shape[:2], *blocks.shape[:2])
        return weights.project("btnk,nkj->btnj", x_BTHK, blocks).reshape(
            *x_BTC.shape[:2], *self.norm.shape
        )

    def _log_gates(self, *qkv):
        """Logs of the input and forget gates, which see q, k and v of all heads."""
        qkv_BTPHK = jnp.stack(qkv, axis=2)
        gates_BTGH = weights.project("btpjk,ghpjk->btgh", qkv_BTPHK, self.gates)
        gates_BTGH = gates_BTGH.astype(mixer.wide(qkv_BTPHK.dtype))
        log_input_BTH = gates_BTGH[:, :, 0] + self.input_bias[...]
        return log_input_BTH, jax.nn.log_sigmoid(gates_BTGH[:, :, 1] + self.forget_bias[...])

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Convolution tail, memory with normaliser (B, H, K, K + 1) and log scale m (B, H)."""
        (heads, dim), wide = self.norm.shape, mixer.wide(dtype)
        return {
            "conv": self.conv.init_state(batch, dtype),
            "c": jnp.zeros((batch, heads, dim, dim + 1), wide),
            "m": jnp.zeros((batch, heads), wide),
        }


def running_max(log_input_BTH, log_forget_BTH, segments, initial_BH):
    """m_t = max(log f_t + m_{t-1}, log i_t) without a gradient; (m_{t-1}, m_t) for every t.

    m before a document is 0; padding keeps m.
    """
    step_BTH, least_BTH = map(jax.lax.stop_gradient, (log_forget_BTH, log_input_BTH))
    initial_BH = jnp.zeros_like(step_BTH[:, 0]) if initial_BH is None else initial_BH
    initial_BH = jax.lax.stop_gradient(initial_BH)
    start_BT1 = jnp.zeros((*step_BTH.shape[:2], 1), bool)
    if segments is not None:
        start_BT1 = boundaries.starts(segments)[..., None]
        real_BT1 = boundaries.is_real(segments)[..., None]
        first_BTH = jnp.maximum(step_BTH, least_BTH)
        least_BTH = jnp.where(real_BT1, jnp.where(start_BT1, first_BTH, least_BTH), FAR)
        step_BTH = jnp.where(real_BT1, jnp.where(start_BT1, FAR, step_BTH), 0)

    def join(left, right):
        (a, b), (c, d) = left, right
        return jnp.maximum(a + c, FAR), jnp.maximum(b + c, d)

    step_BTH, least_BTH = jax.lax.associative_scan(join, (step_BTH, least_BTH), axis=1)
    m_BTH = jnp.maximum(step_BTH + initial_BH[:, None], least_BTH)
    before_BTH = jnp.concatenate([initial_BH[:, None], m_BTH[:, :-1]], axis=1)
    return jnp.where(start_BT1, 0, before_BTH), m_BTH
