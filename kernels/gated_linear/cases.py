"""Inputs for tests and benchmarks of gated linear attention."""

import numpy as np

GROUPS, HEADS, KEY, VALUE = 2, 4, 8, 12


def draw(
    rng: np.random.Generator, *, batch: int, length: int, dtype, extreme: bool = False
) -> dict:
    """Keyword arguments; the length decides whether gates are scalars or vectors.

    `extreme` mixes gates that forget at once with gates that never do.
    """
    shape = (batch, length, HEADS) if length // 2 % 2 else (batch, length, HEADS, KEY)
    log_decay = -np.logaddexp(0, -rng.normal(2, 2, shape))
    if extreme:
        log_decay = rng.choice([-1e-4, -30.0, 0.0], size=shape)
    return {
        "q": rng.normal(size=(batch, length, GROUPS, KEY)).astype(dtype),
        "k": rng.normal(size=(batch, length, GROUPS, KEY)).astype(dtype),
        "v": rng.normal(size=(batch, length, HEADS, VALUE)).astype(dtype),
        "log_decay": log_decay.astype(dtype),
        "initial_state": rng.normal(size=(batch, HEADS, KEY, VALUE)).astype(np.float32),
    }
