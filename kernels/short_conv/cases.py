"""Inputs for tests and benchmarks of the short causal convolution."""

import numpy as np

CHANNELS = 20
WIDTH = 4


def draw(
    rng: np.random.Generator, *, batch: int, length: int, dtype, extreme: bool = False
) -> dict:
    """Keyword arguments; `extreme` spreads the inputs over four powers of ten."""
    x = rng.normal(size=(batch, length, CHANNELS))
    tail = rng.normal(size=(batch, WIDTH - 1, CHANNELS))
    if extreme:
        x, tail = (value * 10.0 ** rng.integers(-2, 3, value.shape) for value in (x, tail))
    return {
        "x": x.astype(dtype),
        "weight": (rng.normal(size=(WIDTH, CHANNELS)) / WIDTH**0.5).astype(dtype),
        "bias": rng.normal(size=CHANNELS).astype(dtype),
        "initial_state": tail.astype(dtype),
        "activation": "silu",
    }
