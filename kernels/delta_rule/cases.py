"""Inputs for tests and benchmarks of the delta rule."""

import numpy as np

GROUPS, HEADS, KEY, VALUE = 2, 4, 8, 12


def draw(
    rng: np.random.Generator, *, batch: int, length: int, dtype, extreme: bool = False
) -> dict:
    """Keyword arguments; the length decides whether gates are scalars or vectors.

    `extreme` mixes gates that forget at once with gates that never do, writes up to twice the
    error, and leaves the keys' norms between 1 and 3: the state may grow until a gate closes.
    """
    shape = (batch, length, HEADS) if length // 2 % 2 else (batch, length, HEADS, KEY)
    log_decay = -np.logaddexp(0, -rng.normal(2, 2, shape))
    beta = 1 / (1 + np.exp(-rng.normal(size=(batch, length, HEADS))))
    k = rng.normal(size=(batch, length, GROUPS, KEY))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    if extreme:
        log_decay = rng.choice([-1e-4, -30.0, 0.0], size=shape)
        beta *= 2
        k *= rng.uniform(1, 3, (batch, length, GROUPS, 1))
    return {
        "q": rng.normal(size=(batch, length, GROUPS, KEY)).astype(dtype),
        "k": k.astype(dtype),
        "v": rng.normal(size=(batch, length, HEADS, VALUE)).astype(dtype),
        "beta": beta.astype(dtype),
        "log_decay": log_decay.astype(dtype),
        "initial_state": rng.normal(size=(batch, HEADS, KEY, VALUE)).astype(np.float32),
    }
