"""sLSTM: an LSTM with exponential input gates, a normaliser, and recurrent maps within heads.

xLSTM: Extended Long Short-Term Memory (arXiv 2405.04517, eqs. 8 to 17 and figure 10). Notable: a
running maximum m of the gates' exponents keeps both sums finite and changes no output; input and
forget gates read a short convolution; all maps are block-diagonal, a block a head; the output,
normed per head, is the mixer's (the gated MLP of the paper's block is a channel mixer of its own).
Biases of the forget gate and zero recurrent maps at the start are those of the released code.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models import checks, layers, mixer, weights
from models.parts import nonlinear_scan


@dataclasses.dataclass
class Config:
    """Heads that share nothing until the next layer."""

    heads: int = 4
    conv: int = 4  # tokens of the convolution before the input and forget gates
    depth: float = 0.0  # the layer's position, 0 (first) to 1 (last): it shapes the forget biases

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where heads, conv or depth do not fit."""
        return Mixer(self, width, rngs)


class Mixer(mixer.Mixer):
    """c_t = f_t c_{t-1} + i_t z_t, n_t = f_t n_{t-1} + i_t, h_t = o_t c_t / n_t, y = norm(h).

    i_t = exp(..), f_t, o_t = sigmoid(..), z_t = tanh(..), each of W x_t + R h_{t-1} + b.
    """

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        heads, depth = config.heads, config.depth
        dim = checks.split_heads(width, heads)
        if not 0 <= depth <= 1:
            near = min(max(depth, 0.0), 1.0)
            raise ValueError(f"depth={depth} of the layer is outside [0, 1]. Use {near}.")
        dims = ("heads", "value")
        self.conv = layers.ShortConv((heads, dim), dims, rngs, width=config.conv, activation="silu")
        init, shape = weights.fan_in(dim), (2, heads, dim, dim)
        self.gates = weights.weight(rngs, init, shape, ("parts", "heads", "key", "value"))
        self.zo = weights.weight(rngs, init, shape, ("parts", "heads", "key", "value"))
        self.recurrent = weights.filled(
            rngs, 0.0, (4, heads, dim, dim), ("parts", "heads", "key", "value")
        )
        along = jnp.arange(dim) / max(dim - 1, 1)
        forget = 5 - 12 * along ** (0.3 + 1.3 * depth)
        start = lambda key, shape: jnp.zeros(shape).at[1].set(forget)
        self.bias = weights.weight(rngs, start, (4, heads, dim), ("parts", *dims))
        self.norm = weights.filled(rngs, 1.0, (heads, dim), dims)

    def __call__(self, x, *, segments=None, state=None):
        dtype, (heads, dim) = mixer.wide(x.dtype), self.norm.shape
        if state is None:
            state = self.init_state(x.shape[0], x.shape[1], x.dtype)
        x_BTHK = x.reshape(*x.shape[:2], heads, dim)
        u_BTHK, tail = self.conv(x_BTHK, segments=segments, state=state["conv"])
        gates_BTPHV = weights.project("bthk,phkv->btphv", u_BTHK, self.gates)
        zo_BTPHV = weights.project("bthk,phkv->btphv", x_BTHK, self.zo)
        ifzo_BTPHV = jnp.concatenate([gates_BTPHV, zo_BTPHV], axis=2).astype(dtype)
        ifzo_BTPHV = ifzo_BTPHV + self.bias[...]
        cells = {name: state[name] for name in "chmn"}
        of_step = self.recurrent[...].astype(dtype)
        cells, h_BTHV = nonlinear_scan.scan(_step, of_step, cells, ifzo_BTPHV, segments)
        y_BTHV = layers.layer_norm(h_BTHV, self.norm[...]).astype(x.dtype)
        return y_BTHV.reshape(x.shape), cells | {"conv": tail}

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """The convolution's tail, and cells c, outputs h, normalisers n and exponents m, all zero.

        n is at least 1 once a token was read: where it is 0, m counts as minus infinity.
        """
        shape, wide = (batch, *self.norm.shape), mixer.wide(dtype)
        cells = {name: jnp.zeros(shape, wide) for name in "chmn"}
        return {"conv": self.conv.init_state(batch, dtype)} | cells


def _step(recurrent_PHKV, cells, ifzo_BPHV):
    ifzo_BPHV = ifzo_BPHV + jnp.einsum("bhk,phkv->bphv", cells["h"], recurrent_PHKV)
    i_BHV, f_BHV, z_BHV, o_BHV = (ifzo_BPHV[:, part] for part in range(4))
    kept_BHV = jax.nn.log_sigmoid(f_BHV) + cells["m"]
    m_BHV = jnp.where(cells["n"] == 0, i_BHV, jnp.maximum(kept_BHV, i_BHV))
    # Where nothing was read, c and n are zero and any finite weight does.
    f_BHV, i_BHV = jnp.exp(jnp.minimum(kept_BHV - m_BHV, 0)), jnp.exp(i_BHV - m_BHV)
    c_BHV = f_BHV * cells["c"] + i_BHV * jnp.tanh(z_BHV)
    n_BHV = f_BHV * cells["n"] + i_BHV
    h_BHV = jax.nn.sigmoid(o_BHV) * c_BHV / n_BHV
    return {"c": c_BHV, "h": h_BHV, "m": m_BHV, "n": n_BHV}, h_BHV
