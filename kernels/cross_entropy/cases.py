"""Inputs for tests and benchmarks of the fused cross-entropy."""

import numpy as np

NO_GRADIENT_OUTPUTS = (1,)
WIDTH, VOCABULARY = 24, 301


def draw(rng: np.random.Generator, *, batch, length, dtype, extreme=False) -> dict:
    """Normal x, a head of scale 1/sqrt(width), every fourth weight 0; `extreme` scales x by 30."""
    scale = 30.0 if extreme else 1.0
    weights = rng.uniform(size=(batch, length)) * (rng.uniform(size=(batch, length)) > 0.25)
    return {
        "x": (scale * rng.normal(size=(batch, length, WIDTH))).astype(dtype),
        "head": (rng.normal(size=(WIDTH, VOCABULARY)) / WIDTH**0.5).astype(dtype),
        "targets": rng.integers(0, VOCABULARY, (batch, length)).astype(np.int32),
        "weights": weights.astype(np.float32),
    }
