"""What the refusals of both kinds of attention share: small arguments, and faults of a cache."""

import jax.numpy as jnp
import numpy as np
import pytest


def zeros(*shape, dtype=np.float32):
    return jnp.zeros(shape, dtype)


HEADS = {"q": zeros(2, 5, 4, 8), "k": zeros(2, 5, 2, 8), "v": zeros(2, 5, 2, 6)}
POSITIONS = {"positions": zeros(2, 5, dtype=int), "kv_positions": zeros(2, 5, dtype=int)}
CACHE_FAULTS = [  # of HEADS and POSITIONS
    ({"q": zeros(3, 5, 4, 8)}, "k has batch size 2; it must be q's, 3."),
    ({"positions": zeros(2, 5)}, "positions has shape (2, 5) and dtype float32; it must be (2, 5)"),
    ({"kv_positions": zeros(2, 4, dtype=int)}, "kv_positions has shape (2, 4) and dtype int32"),
    ({"segments": zeros(2, 5, dtype=int)}, "segments is given without kv_segments; give both"),
    ({"kv_segments": zeros(2, 5, dtype=int)}, "kv_segments is given without segments; give both"),
    (
        {"segments": zeros(2, 4, dtype=int), "kv_segments": zeros(2, 5, dtype=int)},
        "segments has shape (2, 4) and dtype int32; it must be (2, 5) int32",
    ),
    (
        {"segments": zeros(2, 5, dtype=int), "kv_segments": zeros(2, 4, dtype=int)},
        "kv_segments has shape (2, 4) and dtype int32; it must be (2, 5) int32",
    ),
]


def assert_raises_one_line(function, arguments, message):
    """`function(**arguments)` raises a ValueError of one line that holds `message`."""
    with pytest.raises(ValueError) as error:
        function(**arguments)
    assert message in str(error.value) and "\n" not in str(error.value)
