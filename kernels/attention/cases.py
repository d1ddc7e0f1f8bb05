"""Inputs for tests and benchmarks of attention: four query heads on two key heads."""

import numpy as np

HEADS, GROUPS, KEY, VALUE = 4, 2, 16, 24


def draw(rng: np.random.Generator, *, batch, length, dtype, extreme=False) -> dict:
    """Normal q, k, v; `extreme` scales q by 30, so that a naive exponential overflows."""
    scale = 30.0 if extreme else 1.0

    def normal(*shape):
        return rng.normal(size=(batch, length, *shape)).astype(dtype)

    q = (scale * rng.normal(size=(batch, length, HEADS, KEY))).astype(dtype)
    return {"q": q, "k": normal(GROUPS, KEY), "v": normal(GROUPS, VALUE)}
