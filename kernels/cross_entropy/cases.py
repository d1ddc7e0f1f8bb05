"""Inputs for tests and benchmarks of the fused cross-entropy."""

import jax
import jax.numpy as jnp
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


def sizes() -> dict[str, dict]:
    """Calls of model size by label: 16384 tokens of width 2048 in bfloat16."""

    def size(vocabulary, **settings):
        return {
            "x": jax.ShapeDtypeStruct((4, 4096, 2048), jnp.bfloat16),
            "head": jax.ShapeDtypeStruct((2048, vocabulary), jnp.bfloat16),
            "targets": jax.ShapeDtypeStruct((4, 4096), jnp.int32),
            "weights": jax.ShapeDtypeStruct((4, 4096), jnp.float32),
        } | settings

    return {
        "D2048 V32768": size(32768),
        "D2048 V32768 softcap": size(32768, softcap=30.0),
        "D2048 V50257": size(50257),
        "D2048 V131072": size(131072),
    }
