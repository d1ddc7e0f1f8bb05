"""Inputs for tests and benchmarks of the fused RMS normalisation."""

import numpy as np

HEADS, WIDTH = 2, 24


def draw(
    rng: np.random.Generator, *, batch: int, length: int, dtype, extreme: bool = False
) -> dict:
    """(batch, length, 2, 24) with a weight a head or one for all, and any two of the options.

    `extreme` scales rows by 1e-3 to 1e3 and gates by 10.
    """
    variant = length // 2 % 4
    shape = (batch, length, HEADS, WIDTH)
    scale = 10.0 ** rng.integers(-3, 4, (*shape[:2], 1, 1)) if extreme else 1.0
    own = (HEADS, WIDTH) if variant % 2 else (WIDTH,)
    arrays = {"x": scale * rng.normal(size=shape), "weight": 1 + 0.3 * rng.normal(size=own)}
    if variant in (0, 3):
        arrays["residual"] = scale * rng.normal(size=shape)
    if variant in (0, 1):
        arrays["gate"] = (10 if extreme else 1) * rng.normal(size=shape)
    if variant in (1, 3):
        arrays["input_gate"] = (10 if extreme else 1) * rng.normal(size=shape)
    settings = {"activation": "sigmoid" if variant == 1 else "silu", "eps": 1e-5}
    return {name: value.astype(dtype) for name, value in arrays.items()} | settings
