"""Implicit filters: long convolution kernels that a small network computes from the lag.

Hyena (arXiv 2302.10866, section 3.3 and appendix D.3), as in its released code, first weights
included, but for those of the last map: there they let the filters' energy grow with their length,
here the sum of a filter's squares starts near 1.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models import weights

# A window falls to 1 / 100 after 1.5 lengths in the first channel, 0.3 lengths in the last one.
SLOWEST, FASTEST = math.log(100) / 1.5, math.log(100) / 0.3


class ImplicitFilter(nnx.Module):
    """h_l = exp(-rate t) * (MLP(features(l)) of sines), t = l / (L - 1), for lags l below `length`.

    Features are t and `bands` cosines and sines of 2 pi l / L; the rates are evenly spread over the
    channels, the last forgetting fastest, and are not trained.
    """

    def __init__(
        self,
        count: int,
        width: int,
        length: int,
        rngs: nnx.Rngs,
        *,
        hidden: int = 64,
        bands: int = 16,
        frequency: float = 1.0,
    ):
        if length < 2:
            raise ValueError(f"length={length} of a filter must be at least 2 tokens.")
        if hidden < 1 or bands < 1:
            name, value = ("hidden", hidden) if hidden < 1 else ("bands", bands)
            raise ValueError(f"{name}={value} of an implicit filter must be at least 1.")
        features = 1 + 2 * bands
        maps = ((features, hidden), (hidden, hidden), (hidden, hidden))
        start = lambda shape, n, dims: weights.weight(rngs, _uniform(n), shape, dims)
        self.maps = nnx.List([start((n, m), n, ("rank", "rank")) for n, m in maps])
        self.biases = nnx.List([start((m,), n, ("rank",)) for n, m in maps])
        self.frequency = weights.filled(rngs, frequency, (hidden,), ("rank",))
        square = _mean_square([n for n, _ in maps], (bands + 1 / 3) / features, frequency)
        windows = length * math.log(FASTEST / SLOWEST) / (FASTEST - SLOWEST) / 2
        energy = weights.fan_in(hidden, gain=1 / math.sqrt(square * windows))
        self.out = weights.weight(
            rngs, energy, (hidden, count, width), ("rank", "parts", "channels")
        )
        self.length, self.bands = length, bands

    def __call__(self, length: int) -> Float[Array, "F L D"]:
        """The filters at the lags below `length`, which may be shorter than they reach."""
        dtype, count = self.out.dtype, min(length, self.length)
        lag = jnp.arange(count, dtype=dtype)[:, None]
        time, band = (
            lag / (self.length - 1),
            jnp.linspace(1e-4, self.bands - 1, self.bands, dtype=dtype),
        )
        angle = 2 * math.pi / self.length * band * lag
        h = jnp.concatenate([time, jnp.cos(angle), -jnp.sin(angle)], axis=1)
        rates = jnp.linspace(SLOWEST, FASTEST, self.out.shape[2], dtype=dtype)
        with jax.default_matmul_precision("highest"):  # sines of sines: errors would grow
            for w, bias in zip(self.maps, self.biases, strict=True):
                h = jnp.sin(self.frequency[...] * (h @ w[...] + bias[...]))
            return jnp.einsum("lr,rfd->fld", h, self.out[...]) * jnp.exp(-rates * time)


def _uniform(inputs):
    """Of torch's maps and their biases: +-1 / sqrt(inputs), variance 1 / (3 inputs)."""
    bound = 1 / math.sqrt(inputs)
    return lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def _mean_square(inputs, square, frequency):
    """Of sines after maps of so many inputs, whose own mean square is `square` at first.

    The mean of sin(z)^2 is (1 - exp(-2 s)) / 2 for a normal z of variance s.
    """
    for n in inputs:
        square = (1 - math.exp(-2 * frequency**2 * (square + 1 / n) / 3)) / 2
    return square
