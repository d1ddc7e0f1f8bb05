"""Inputs for tests and benchmarks of the diagonal linear recurrences."""

import jax
import jax.numpy as jnp
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


def draw_complex_linear_scan(
    rng: np.random.Generator, *, batch: int, length: int, dtype, extreme: bool = False
) -> dict:
    """Keyword arguments; the length decides whether decays and phases are constant or per step.

    `extreme` mixes factors that forget at once with factors that never do, and turns of nothing,
    of a hair, of halves and of many times.
    """
    shape = (batch, length, WIDTH)
    steps = (WIDTH,) if length % 64 > 2 else shape
    log_decay = -rng.gamma(0.5, 0.1, steps)
    phase = rng.uniform(-np.pi, 2 * np.pi, steps)
    if extreme:
        log_decay = rng.choice([0.0, -1e-6, -1e-3, -1.0, -30.0, -200.0], size=steps)
        phase = rng.choice([0.0, 1e-5, np.pi / 2, np.pi, -3.0, 6.0, 40.0], size=steps)
    return {
        "x_real": rng.normal(size=shape).astype(dtype),
        "x_imag": rng.normal(size=shape).astype(dtype),
        "log_decay": log_decay.astype(dtype),
        "phase": phase.astype(dtype),
        "initial_state": rng.normal(size=(batch, 2, WIDTH)).astype(np.float32),
    }


def sizes() -> dict[str, dict]:
    """Calls of model size by label: bfloat16 tokens, float32 decays and states, 32768 tokens."""

    def size(length, *, width=4096, segments=False):
        shape = (32768 // length, length, width)
        arguments = {
            "x": jax.ShapeDtypeStruct(shape, jnp.bfloat16),
            "log_decay": jax.ShapeDtypeStruct(shape, jnp.float32),
            "initial_state": jax.ShapeDtypeStruct((shape[0], width), jnp.float32),
        }
        return arguments | _segments(shape, segments)

    return {
        "T4096 D4096": size(4096),
        "T4096 D4096 segments": size(4096, segments=True),
        "T32768 D4096": size(32768),
        "T4000 D2560": size(4000, width=2560),
    }


def sizes_complex_linear_scan() -> dict[str, dict]:
    """The same for complex numbers, with constant factors and with factors a step."""

    def size(length, constant, *, width=4096, segments=False):
        shape = (32768 // length, length, width)
        steps = jax.ShapeDtypeStruct((width,) if constant else shape, jnp.float32)
        arguments = {
            "x_real": jax.ShapeDtypeStruct(shape, jnp.bfloat16),
            "x_imag": jax.ShapeDtypeStruct(shape, jnp.bfloat16),
            "log_decay": steps,
            "phase": steps,
            "initial_state": jax.ShapeDtypeStruct((shape[0], 2, width), jnp.float32),
        }
        return arguments | _segments(shape, segments)

    return {
        "constant T4096 D4096": size(4096, True),
        "constant T4096 D4096 segments": size(4096, True, segments=True),
        "constant T32768 D4096": size(32768, True),
        "T4096 D4096": size(4096, False),
        "T4096 D4096 segments": size(4096, False, segments=True),
    }


def _segments(shape, wanted: bool) -> dict:
    return {"segments": jax.ShapeDtypeStruct(shape[:2], jnp.int32)} if wanted else {}
