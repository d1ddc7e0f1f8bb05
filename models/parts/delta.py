"""What the layers of delta rules share: q, k, v by short convolutions, decays, a normed output."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from models import checks, layers, mixer, weights


def check_sizes(heads: int, **sizes: int) -> None:
    """Raise unless heads is at least 1 and the other sizes, of which 0 is a default, at least 0."""
    if heads < 1:
        raise ValueError(f"heads={heads} must be at least 1. Use 1.")
    for name, size in sizes.items():
        if size < 0:
            raise ValueError(f"{name}={size} is negative. Use 0 (the default) or at least 1.")


def check_beta_max(beta_max: float) -> None:
    """Raise unless the strongest write leaves eigenvalues within [-1, 1] (arXiv 2411.12537)."""
    if not 0 < beta_max <= 2:
        near = 1.0 if beta_max <= 0 else 2.0
        raise ValueError(
            f"beta_max={beta_max} is outside (0, 2], where the state is bounded. Use {near}."
        )


class Convolved(nnx.Module):
    """y = silu(conv(x W)) for W (D, *shape); the convolution has no bias (arXiv 2406.06484)."""

    def __init__(
        self, width: int, shape: tuple[int, ...], dims: tuple[str, ...], conv: int, rngs: nnx.Rngs
    ):
        self.map = weights.inward(rngs, width, shape, dims)
        self.conv = layers.ShortConv(shape, dims, rngs, width=conv, bias=False, activation="silu")

    def __call__(
        self, x: Float[Array, "B T D"], *, segments=None, state=None
    ) -> tuple[Float[Array, "B T ..."], Array]:
        """(B, T, *shape) and the tail that decoding carries."""
        letters = "phk"[-len(self.conv.shape) :]
        y = weights.project(f"btd,d{letters}->bt{letters}", x, self.map)
        return self.conv(y, segments=segments, state=state)

    def init_state(self, batch: int, dtype: DTypeLike) -> Array:
        """Zeros: nothing came before."""
        return self.conv.init_state(batch, dtype)


class Decay(nnx.Module):
    """log alpha_t = -exp(A) softplus(x_t W + b), a number a head: Mamba-2's gate and its start."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.map = weights.inward(rngs, width, (heads,), ("heads",))
        self.log_a = weights.weight(rngs, weights.log_uniform(1.0, 16.0), (heads,), ("heads",))
        self.bias = weights.weight(rngs, weights.inverse_softplus(1e-3, 0.1), (heads,), ("heads",))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H"]:
        """The log decays, wide."""
        y_BTH = weights.project("btd,dh->bth", x, self.map).astype(mixer.wide(x.dtype))
        return -jnp.exp(self.log_a[...]) * jax.nn.softplus(y_BTH + self.bias[...])


class ChannelDecay(nnx.Module):
    """log alpha_t = -exp(A) softplus(x_t W W' + b), a number a key channel, A one a head (KDA)."""

    def __init__(self, width: int, rank: int, heads: int, key: int, rngs: nnx.Rngs):
        self.map = layers.LowRank(
            width,
            rank,
            (heads, key),
            ("heads", "key"),
            rngs,
            init=weights.fan_in(rank),
            bias=weights.inverse_softplus(1e-3, 0.1),
        )
        self.log_a = weights.weight(rngs, weights.log_uniform(1.0, 16.0), (heads,), ("heads",))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H K"]:
        """The log decays, wide."""
        return -jnp.exp(self.log_a[...])[:, None] * jax.nn.softplus(self.map(x))


@dataclasses.dataclass
class ChannelSettings:
    """Heads, their dimensions, and the ranks of the maps to gates by channel."""

    heads: int = 4
    key_dim: int = 0  # per head; 0: width / heads
    value_dim: int = 0  # per head; 0: key_dim
    gate_rank: int = 0  # of the decay's and the output gate's maps; 0: value_dim
    conv: int = 4  # taps of the short convolutions


class DeltaMixer(mixer.Mixer):
    """Base: `read` gives q, k and v; then comes the rule; `write` norms what it read and maps it.

    q and k are L2-normalised. The state is a matrix (B, H, K, V) and two convolution tails. Value
    heads may share the q and k of `key_heads` heads (0: as many).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        key: int,
        value: int,
        conv: int,
        rngs: nnx.Rngs,
        key_heads: int = 0,
    ):
        shape = (2, key_heads or heads, key)
        self.qk = Convolved(width, shape, ("parts", "heads", "key"), conv, rngs)
        self.v = Convolved(width, (heads, value), ("heads", "value"), conv, rngs)
        self.norm = weights.filled(rngs, 1.0, (value,), ("value",))
        self.o = weights.outward(rngs, (heads, value), width, ("heads", "value"))
        self.state_shape = (heads, key, value)

    def read(self, x, segments, state: Any, dtype: DTypeLike | None = None):
        """(q, k, v), the tails after the row, and the matrix before it; q and k in `dtype`."""
        state = state or {"qk": None, "v": None, "s": None}
        qk_BTPHK, qk_tail = self.qk(x, segments=segments, state=state["qk"])
        v_BTHV, v_tail = self.v(x, segments=segments, state=state["v"])
        qk_BTPHK = layers.l2_norm(qk_BTPHK.astype(dtype or x.dtype))
        qkv = qk_BTPHK[:, :, 0], qk_BTPHK[:, :, 1], v_BTHV
        return qkv, {"qk": qk_tail, "v": v_tail}, state["s"]

    def write(self, o_BTHV, gate_BTHV: Array | None = None) -> Float[Array, "B T D"]:
        """(norm(o) * gate) W."""
        o_BTHV = layers.rms_norm(o_BTHV, self.norm[...])
        o_BTHV = o_BTHV if gate_BTHV is None else o_BTHV * gate_BTHV
        return weights.project("bthv,hvd->btd", o_BTHV, self.o)

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Convolution tails and the matrix state (B, H, K, V), all zero."""
        return {
            "qk": self.qk.init_state(batch, dtype),
            "v": self.v.init_state(batch, dtype),
            "s": jnp.zeros((batch, *self.state_shape), mixer.wide(dtype)),
        }


class ChannelMixer(DeltaMixer):
    """Base of rules that decay by channel: `self.decay`, and an output gate of low rank (KDA)."""

    def __init__(self, config: ChannelSettings, width: int, rngs: nnx.Rngs):
        heads = config.heads
        sizes = dict(key_dim=config.key_dim, value_dim=config.value_dim)
        check_sizes(heads, **sizes, gate_rank=config.gate_rank)
        key = config.key_dim or checks.split_heads(width, heads)
        value = config.value_dim or key
        rank = config.gate_rank or value
        super().__init__(width, heads, key, value, config.conv, rngs)
        self.decay = ChannelDecay(width, rank, heads, key, rngs)
        self.gate = layers.LowRank(
            width, rank, (heads, value), ("heads", "value"), rngs, init=weights.fan_in(rank)
        )

    def gated(self, x: Float[Array, "B T D"], o_BTHV) -> Float[Array, "B T D"]:
        """(norm(o) * sigmoid(x G G')) W."""
        return self.write(o_BTHV, jax.nn.sigmoid(self.gate(x)).astype(x.dtype))
