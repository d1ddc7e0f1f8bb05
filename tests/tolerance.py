"""One measure of error and one table of limits for every comparison of arrays."""

import jax.numpy as jnp
import numpy as np

# Relative RMS error against float64 on the same (rounded) inputs.
TOLERANCE = {"float64": 1e-10, "float32": 2e-5, "bfloat16": 1e-2}


def rms(actual, expected, least: float = 0.0) -> float:
    """||actual - expected|| / max(||expected||, least) in float64; NaN where `actual` holds one."""
    actual, expected = (np.asarray(x).astype(np.float64) for x in (actual, expected))
    size = max(np.linalg.norm(expected), least, np.finfo(np.float64).tiny)
    return float(np.linalg.norm(actual - expected) / size)


def assert_close(actual, expected, dtype, what: str, least: float = 0.0) -> None:
    """Fail unless the shapes are equal and `rms` is within the limit of `dtype`."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}."
    error, limit = rms(actual, expected, least), TOLERANCE[jnp.dtype(dtype).name]
    # Written so that NaN fails.
    assert error <= limit, f"{what}: relative RMS error {error:.3g} is above {limit:.3g}."
