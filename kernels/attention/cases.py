"""Inputs for tests and benchmarks of attention: four query heads on two key heads."""

import numpy as np

HEADS, GROUPS, KEY, VALUE = 4, 2, 16, 24


def draw(rng: np.random.Generator, *, batch, length, dtype, extreme=False) -> dict:
    """Normal q, k, v; `extreme` adds 90 to the scores of every other head, -90 to the rest.

    So exp(score) overflows or vanishes while the softmax, and with it every gradient, keeps its
    size. Scores spread over +-90 would saturate the softmax, and the gradients of a saturated
    softmax are differences smaller than float32 resolves.
    """
    q, k, v = (
        rng.normal(size=(batch, length, heads, dim))
        for heads, dim in ((HEADS, KEY), (GROUPS, KEY), (GROUPS, VALUE))
    )
    if extreme:
        q[..., 0] = 90 * KEY**0.5 * np.where(np.arange(HEADS) % 2, -1, 1)
        k[..., 0] = 1
    return {"q": q.astype(dtype), "k": k.astype(dtype), "v": v.astype(dtype)}
