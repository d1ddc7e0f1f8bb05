"""Inputs for tests and benchmarks of the long causal convolution."""

import numpy as np

CHANNELS = 6


def draw(
    rng: np.random.Generator, *, batch: int, length: int, dtype, extreme: bool = False
) -> dict:
    """Filters of 7 taps, of a third of the row or of all of it, decaying over a quarter of it.

    `extreme` spreads the inputs over four powers of ten and lets half the filters not decay.
    """
    variant = length // 8 % 3
    taps = (7, max(length // 3, 7), length)[variant]
    x = rng.normal(size=(batch, length, CHANNELS))
    tail = rng.normal(size=(batch, taps - 1, CHANNELS))
    rate = rng.uniform(0, 8, CHANNELS)
    if extreme:
        x, tail = (value * 10.0 ** rng.integers(-2, 3, value.shape) for value in (x, tail))
        rate[::2] = 0
    decay = np.exp(-rate * np.arange(taps)[:, None] / taps)
    arguments = {
        "x": x.astype(dtype),
        "filters": (rng.normal(size=(taps, CHANNELS)) * decay).astype(dtype),
        "initial_state": tail.astype(dtype),
    }
    if variant != 1:
        arguments["skip"] = rng.normal(size=CHANNELS).astype(dtype)
    return arguments
