"""Block-sparse attention says in one line which argument does not fit, and what would."""

import jax
import numpy as np
import pytest

from kernels.block_sparse_attention import block_sparse_attention, cached_block_sparse_attention
from tests.kernels.refusals import CACHE_FAULTS, HEADS, POSITIONS, assert_raises_one_line, zeros

GOOD = HEADS | {"indices": zeros(2, 2, 3, 1, dtype=int), "block": 2}
CACHED = HEADS | POSITIONS | {"indices": zeros(2, 2, 5, 1, dtype=int), "block": 2}
SHARED_FAULTS = [
    ({"q": zeros(5, 4, 8)}, "q has shape (5, 4, 8), rank 3; it must have rank 4"),
    ({"k": zeros(2, 5, 2, 7)}, "k has key dim 7; it must be q's, 8."),
    ({"window": -1}, "window is -1; it must be 0 (off) or a positive number of tokens."),
    ({"scale": 0.0}, "scale is 0.0; it must be positive, as 0.3536."),
    ({"block": 0}, "block is 0; it must be at least 1 key."),
    ({"indices": zeros(3, 1, dtype=int)}, "indices has shape (3, 1), rank 2; it must have rank 4"),
    ({"indices": zeros(2, 2, 3, 1)}, "indices has dtype float32; it must be an integer, as int32."),
    ({"indices": zeros(3, 2, 3, 1, dtype=int)}, "indices has 3 rows (axis 0); it must be 1 or 2."),
    (
        {"indices": zeros(2, 3, 3, 1, dtype=int)},
        "indices has 3 heads (axis 1); it must be 1 or 2 or 4.",
    ),
    (
        {"indices": zeros(2, 2, 4, 1, dtype=int)},
        "indices has 4 query blocks (axis 2); it must be ",
    ),
    (
        {"indices": zeros(2, 2, 3, 0, dtype=int), "query_block": 2},
        "indices has lists of 0 entries; they must have at least 1 (-1: none).",
    ),
    (
        {"indices": np.full((1, 1, 3, 2), 3), "query_block": 2},
        "indices names block 3; blocks are 0 to 2, and -1 is none.",
    ),
    (
        {"indices": np.full((1, 1, 3, 2), -2), "query_block": 2},
        "indices names block -2; blocks are 0 to 2, and -1 is none.",
    ),
    ({"impl": "fast"}, "has no implementation 'fast'; it has ref, xla"),
]
FAULTS = [
    ({"query_block": -1}, "query_block is -1; it must be 0 (as block) or at least 1."),
    (
        {"k": zeros(2, 6, 2, 8), "v": zeros(2, 6, 2, 6)},
        "k has (batch, time) (2, 6); it must be q's, (2, 5) (cached_block_sparse_attention takes",
    ),
    ({"window": 3, "causal": False}, "window is 3 with causal=False; a window needs causal=True"),
    ({"segments": zeros(2, 4, dtype=int)}, "segments has shape (2, 4) and dtype int32; it must be"),
]
CACHED_FAULTS = [*CACHE_FAULTS, ({"query_block": 0}, "query_block is 0; it must be at least 1.")]


@pytest.mark.parametrize(("fault", "message"), SHARED_FAULTS + FAULTS)
def test_faults(fault, message):
    jax.eval_shape(lambda: block_sparse_attention(**GOOD))
    assert_raises_one_line(block_sparse_attention, GOOD | fault, message)


@pytest.mark.parametrize(("fault", "message"), SHARED_FAULTS + CACHED_FAULTS)
def test_faults_with_a_cache(fault, message):
    jax.eval_shape(lambda: cached_block_sparse_attention(**CACHED))
    assert_raises_one_line(cached_block_sparse_attention, CACHED | fault, message)
