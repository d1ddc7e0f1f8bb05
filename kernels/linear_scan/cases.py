"""Inputs for tests and benchmarks of the diagonal linear recurrence."""

import numpy as np

WIDTH = 20


def draw(
    rng: np.random.Generator, *, batch: int, length: int, dtype, extreme: bool = False
) -> dict:
    """Keyword arguments; `extreme` mixes decays that forget at once with decays that never do."""
    shape = (batch, length, WIDTH)
    log_decay = -rng.gamma(1.0, 0.3, shape)
    if extreme:
        log_decay = rng.choice([0.0, -1e-6, -1e-3, -1.0, -30.0, -200.0], size=shape)
    return {
        "x": rng.normal(size=shape).astype(dtype),
        "log_decay": log_decay.astype(dtype),
        "initial_state": rng.normal(size=(batch, WIDTH)).astype(np.float32),
    }
