"""Inputs for tests and benchmarks of the grouped matrix product."""

import jax
import jax.numpy as jnp
import numpy as np

WIDTH, OUTPUTS = 24, 20


def draw(
    rng: np.random.Generator, *, batch: int, length: int, dtype, extreme: bool = False
) -> dict:
    """batch * length rows for 3 or 9 groups, some of them empty; a few rows belong to none.

    `extreme` gives one group nearly all rows and spreads the inputs over four powers of ten.
    """
    rows, groups = batch * length, 9 if length // 2 % 2 else 3
    share = rng.dirichlet(np.full(groups, 0.03 if extreme else 0.7))
    sizes = rng.multinomial(rows - rng.integers(0, 1 + rows // 4), share)
    x = rng.normal(size=(rows, WIDTH))
    if extreme:
        x = x * 10.0 ** rng.integers(-2, 3, x.shape)
    return {
        "x": x.astype(dtype),
        "weights": (rng.normal(size=(groups, WIDTH, OUTPUTS)) / WIDTH**0.5).astype(dtype),
        "group_sizes": sizes.astype(np.int32),
    }


def sizes() -> dict[str, dict]:
    """Calls of model size by label: 32768 rows in bfloat16."""

    def size(width, outputs, groups):
        return {
            "x": jax.ShapeDtypeStruct((32768, width), jnp.bfloat16),
            "weights": jax.ShapeDtypeStruct((groups, width, outputs), jnp.bfloat16),
            "group_sizes": jax.ShapeDtypeStruct((groups,), jnp.int32),
        }

    return {
        "K2048 N1408 E64": size(2048, 1408, 64),
        "K1408 N2048 E64": size(1408, 2048, 64),
        "K4096 N14336 E8": size(4096, 14336, 8),
        "K1024 N512 E256": size(1024, 512, 256),
    }
