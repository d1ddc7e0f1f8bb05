"""Inputs for tests and benchmarks of the selective scan."""

import jax
import jax.numpy as jnp
import numpy as np

WIDTH, STATE = 20, 6


def draw(
    rng: np.random.Generator, *, batch: int, length: int, dtype, extreme: bool = False
) -> dict:
    """Keyword arguments; half of the lengths come without the term D x.

    `extreme` mixes steps and rates that forget at once with such that never do.
    """
    shape, projected = (batch, length, WIDTH), (batch, length, STATE)
    dt = np.exp(rng.uniform(np.log(1e-3), np.log(0.3), shape))
    A = -np.arange(1.0, STATE + 1) * rng.uniform(0.5, 2, (WIDTH, STATE))
    if extreme:
        dt = rng.choice([0.0, 1e-6, 1e-2, 1.0, 10.0], size=shape)
        A = rng.choice([0.0, -1e-4, -1.0, -20.0], size=(WIDTH, STATE))
    drawn = {
        "x": rng.normal(size=shape).astype(dtype),
        "dt": dt.astype(dtype),
        "A": A.astype(np.float32),
        "Bm": rng.normal(size=projected).astype(dtype),
        "Cm": rng.normal(size=projected).astype(dtype),
        "initial_state": rng.normal(size=(batch, WIDTH, STATE)).astype(np.float32),
    }
    if length % 4 > 1:
        drawn["D"] = rng.normal(size=WIDTH).astype(np.float32)
    return drawn


def sizes() -> dict[str, dict]:
    """Calls of model size by label: bfloat16 tokens, float32 rates and states, 32768 tokens."""

    def size(length, *, width=4096, state=16, segments=False):
        batch = 32768 // length
        tokens = jax.ShapeDtypeStruct((batch, length, width), jnp.bfloat16)
        projected = jax.ShapeDtypeStruct((batch, length, state), jnp.bfloat16)
        arguments = {
            "x": tokens,
            "dt": tokens,
            "A": jax.ShapeDtypeStruct((width, state), jnp.float32),
            "Bm": projected,
            "Cm": projected,
            "D": jax.ShapeDtypeStruct((width,), jnp.float32),
            "initial_state": jax.ShapeDtypeStruct((batch, width, state), jnp.float32),
        }
        if segments:
            arguments["segments"] = jax.ShapeDtypeStruct((batch, length), jnp.int32)
        return arguments

    return {
        "T4096 D4096 N16": size(4096),
        "T4096 D4096 N16 segments": size(4096, segments=True),
        "T32768 D4096 N16": size(32768),
        "T4000 D1536 N64": size(4000, width=1536, state=64),
    }
