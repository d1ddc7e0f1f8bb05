"""Inputs for tests and benchmarks of the grouped matrix product."""

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
