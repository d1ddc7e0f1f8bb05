"""Inputs for tests and benchmarks of gated linear attention."""

import jax
import jax.numpy as jnp
import numpy as np

GROUPS, HEADS, KEY, VALUE = 2, 4, 8, 12


def draw(
    rng: np.random.Generator, *, batch: int, length: int, dtype, extreme: bool = False
) -> dict:
    """Keyword arguments; the length decides between scalar and vector gates, and on a bonus.

    `extreme` mixes gates that forget at once with gates that never do.
    """
    shape = (batch, length, HEADS) if length // 2 % 2 else (batch, length, HEADS, KEY)
    log_decay = -np.logaddexp(0, -rng.normal(2, 2, shape))
    if extreme:
        log_decay = rng.choice([-1e-4, -30.0, 0.0], size=shape)
    arguments = {
        "q": rng.normal(size=(batch, length, GROUPS, KEY)).astype(dtype),
        "k": rng.normal(size=(batch, length, GROUPS, KEY)).astype(dtype),
        "v": rng.normal(size=(batch, length, HEADS, VALUE)).astype(dtype),
        "log_decay": log_decay.astype(dtype),
        "initial_state": rng.normal(size=(batch, HEADS, KEY, VALUE)).astype(np.float32),
    }
    if length % 7 < 2:
        arguments["bonus"] = rng.normal(size=(HEADS, KEY)).astype(np.float32)
    return arguments


def sizes() -> dict[str, dict]:
    """Calls of model size by label: bfloat16 tokens, float32 gates and states, 32768 tokens."""

    def size(gate, length, key, value, *, groups=16, heads=16, bonus=False, segments=False):
        batch = 32768 // length
        shape = {"scalar": (batch, length, heads), "constant": (heads,)}.get(gate)
        like = jax.ShapeDtypeStruct
        arguments = {
            "q": like((batch, length, groups, key), jnp.bfloat16),
            "k": like((batch, length, groups, key), jnp.bfloat16),
            "v": like((batch, length, heads, value), jnp.bfloat16),
            "log_decay": like(shape or (batch, length, heads, key), jnp.float32),
            "initial_state": like((batch, heads, key, value), jnp.float32),
        }
        if bonus:
            arguments["bonus"] = like((heads, key), jnp.float32)
        if segments:
            arguments["segments"] = like((batch, length), jnp.int32)
        return arguments

    return {
        "scalar T4096 K64": size("scalar", 4096, 64, 64),
        "scalar T4096 K128 segments": size("scalar", 4096, 128, 128, segments=True),
        "scalar T4096 K256": size("scalar", 4096, 256, 256, groups=8, heads=8),
        "scalar T32768 K128": size("scalar", 32768, 128, 128),
        "scalar T4096 K128 V64, one group": size("scalar", 4096, 128, 64, groups=1, heads=32),
        "constant T4096 K256 V512": size("constant", 4096, 256, 512, groups=8, heads=8),
        "vector T4096 K64": size("vector", 4096, 64, 64),
        "vector T4096 K128 segments": size("vector", 4096, 128, 128, segments=True),
        "vector T4096 K256": size("vector", 4096, 256, 256, groups=8, heads=8),
        "vector T32768 K128": size("vector", 32768, 128, 128),
        "vector T4096 K64 bonus": size("vector", 4096, 64, 64, bonus=True),
        "scalar T4096 K64 bonus": size("scalar", 4096, 64, 64, bonus=True),
    }
