"""Small parts that architectures share: norms, low-rank maps, rotary positions, convolutions."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kernels.short_conv import short_conv
from models.mixer import wide
from models.weights import Initializer, constant, inward, project, weight


@jax.named_scope("norm")
def rms_norm(x: Float[Array, "... D"], scale: Array, eps: float = 1e-6) -> Float[Array, "... D"]:
    """y = x / sqrt(mean(x^2) + eps) * scale, computed in float32 (arXiv 1910.07467, eq. 4)."""
    y = x.astype(wide(x.dtype))
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * inverse * scale).astype(x.dtype)


def layer_norm(
    x: Float[Array, "... D"], scale: Array, bias: Array | float = 0.0, eps: float = 1e-5
) -> Float[Array, "... D"]:
    """y = (x - mean(x)) / sqrt(var(x) + eps) * scale + bias, in float32 (arXiv 1607.06450, eq. 4).

    With heads before the last dimension and scale (H, K) it is a group norm, a group a head.
    """
    y = x.astype(wide(x.dtype))
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * inverse * scale + bias).astype(x.dtype)


def l2_norm(x: Float[Array, "... D"], eps: float = 1e-6) -> Float[Array, "... D"]:
    """y = x / sqrt(sum(x^2) + eps), computed in float32."""
    y = x.astype(wide(x.dtype))
    return (y * jax.lax.rsqrt(jnp.sum(jnp.square(y), -1, keepdims=True) + eps)).astype(x.dtype)


def token_shift(
    x: Float[Array, "B T D"], segments: Int[Array, "B T"] | None, last: Array | None
) -> tuple[Float[Array, "B T D"], Float[Array, "B 1 D"]]:
    """x_{t-1} of the same document, zero at its start (RWKV, arXiv 2305.13048); and the last x.

    `last` (B, 1, D) is the token before the row. The second result is the state that follows.
    """
    taps = jnp.stack([jnp.ones_like(x[0, 0]), jnp.zeros_like(x[0, 0])])
    return short_conv(x, taps, segments=segments, initial_state=last)


class LowRank(nnx.Module):
    """y = act(x A) B + bias for x (B, T, D) and B (rank, *shape): a gate of few weights.

    A has variance 1 / D; B and the bias start at zero unless `init` and `bias` say otherwise.
    """

    def __init__(
        self,
        width: int,
        rank: int,
        shape: tuple[int, ...],
        dims: tuple[str, ...],
        rngs: nnx.Rngs,
        *,
        activation: Callable[[jax.Array], jax.Array] = lambda x: x,
        init: Initializer = jax.nn.initializers.zeros,
        bias: Initializer | None = jax.nn.initializers.zeros,
    ):
        if rank < 1:
            raise ValueError(f"rank={rank} of a low-rank map must be at least 1.")
        self.down = inward(rngs, width, (rank,), ("rank",))
        self.up = weight(rngs, init, (rank, *shape), ("rank", *dims))
        self.bias = None if bias is None else weight(rngs, bias, shape, dims)
        self.activation = activation

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T ..."]:
        """(B, T, *shape) in float32: gates keep their digits."""
        letters = "hkv"[: len(self.up.shape) - 1]
        hidden = self.activation(project("btd,dr->btr", x, self.down))
        y = project(f"btr,r{letters}->bt{letters}", hidden, self.up).astype(wide(x.dtype))
        return y if self.bias is None else y + self.bias[...]


def positive(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x + 1/2 from zero on, sigmoid(x) below: never negative (arXiv 2410.01201, appendix B)."""
    return jnp.where(x >= 0, x + 0.5, jax.nn.sigmoid(x))


class RMSNorm(nnx.Module):
    """`rms_norm` with its weight, over the residual stream."""

    def __init__(self, width: int, rngs: nnx.Rngs, eps: float = 1e-6):
        self.scale = weight(rngs, constant(1.0), (width,), ("embed",))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return rms_norm(x, self.scale[...], self.eps)


class ShortConv(nnx.Module):
    """Causal depthwise convolution over `shape` channels, with the state that decoding carries.

    Weights are (width, *shape), dimension names ("width", *dims); uniform(+- 1 / sqrt(width)) as
    torch's Conv1d draws them, which Mamba-2, Griffin and Gated DeltaNet inherit.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dims: tuple[str, ...],
        rngs: nnx.Rngs,
        *,
        width: int = 4,
        bias: bool = True,
        activation: str = "none",
    ):
        if not 2 <= width <= 8:
            raise ValueError(f"conv={width} is outside the supported widths 2 to 8; 4 is usual.")
        bound = 1 / math.sqrt(width)
        init = lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)
        self.taps = weight(rngs, init, (width, *shape), ("width", *dims))
        self.bias = weight(rngs, constant(0.0), shape, dims) if bias else None
        self.activation = activation
        self.width = width
        self.shape = shape

    def __call__(self, x: Array, *, segments=None, state=None) -> tuple[Array, Array]:
        """Convolve x (B, T, *shape); the state is the last inputs (B, width - 1, channels)."""
        flat = x.reshape(*x.shape[:2], -1)
        bias = None if self.bias is None else self.bias[...].reshape(-1).astype(x.dtype)
        y, tail = short_conv(
            flat,
            self.taps[...].reshape(self.width, -1).astype(x.dtype),
            bias,
            segments=segments,
            initial_state=state,
            activation=self.activation,
        )
        return y.reshape(x.shape), tail

    def init_state(self, batch: int, dtype: DTypeLike) -> Array:
        """Zeros: nothing came before."""
        return jnp.zeros((batch, self.width - 1, math.prod(self.shape)), dtype)


def rotary(
    x: Float[Array, "B T H K"], positions: Int[Array, "#B T"], base: float = 10_000.0
) -> Float[Array, "B T H K"]:
    """Rotate pairs (i, i + K/2) by positions * base^(-2i/K) (arXiv 2104.09864, eq. 34)."""
    half = x.shape[-1] // 2
    return turned(x, positions, base ** (-jnp.arange(half, dtype=jnp.float32) / half))


def turned(
    x: Float[Array, "B T H K"],
    positions: Int[Array, "#B T"],
    frequency: Float[Array, " P"],
    magnitude: float = 1.0,
) -> Float[Array, "B T H K"]:
    """Turn the pairs (i, i + P) of the first 2 P numbers by positions * frequency_i."""
    half, dtype = len(frequency), wide(x.dtype)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    cos, sin = ((magnitude * f(angle)).astype(dtype) for f in (jnp.cos, jnp.sin))
    a, b = x[..., :half].astype(dtype), x[..., half : 2 * half].astype(dtype)
    pairs = (a * cos - b * sin, b * cos + a * sin)
    return jnp.concatenate([*(p.astype(x.dtype) for p in pairs), x[..., 2 * half :]], axis=-1)
