"""Static patterns of blocks: each equals its definition, runs, and refuses what it cannot be."""

import jax
import numpy as np
import pytest

from kernels.block_sparse_attention import block_sparse_attention, patterns
from tests.kernels.heads import by_hand, causal_mask, draw
from tests.tolerance import assert_close


def pattern_mask(found):
    """(N, N) of an (N, M) list, which must be in rising order with -1 last."""
    mask = np.zeros((len(found), len(found)), bool)
    for n, row in enumerate(found):
        entries = row[row >= 0]
        assert (np.diff(entries) > 0).all() and (row[len(entries) :] == -1).all()
        mask[n, entries] = True
    assert found.dtype == np.int32 and (mask.sum(1).max() == found.shape[1])
    return mask


PATTERNS = {  # a list, and whether query block n sees key block j
    "sliding": (patterns.sliding(20, before=3, after=1), lambda n, j: -1 <= n - j <= 3),
    "strided": (
        patterns.strided(20, stride=4),
        lambda n, j: j in range(max(0, n - 4), n + 1) or (j <= n and (n - j) % 4 == 0),
    ),
    "fixed": (
        patterns.fixed(20, stride=4, summary=2),
        lambda n, j: j <= n and (n // 4 == j // 4 or j % 4 in (2, 3)),
    ),
    "longformer": (
        patterns.longformer(20, before=2, after=2, globals=(0, 9), causal=False),
        lambda n, j: abs(n - j) <= 2 or {n, j} & {0, 9},
    ),
    "longformer, causal": (
        patterns.longformer(20, before=2, globals=(1,)),
        lambda n, j: j <= n and (n - j <= 2 or {n, j} & {1}),
    ),
    "bigbird without random": (
        patterns.bigbird(20, globals=(0, 1), random=0),
        lambda n, j: abs(n - j) <= 1 or {n, j} & {0, 1},
    ),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_equal_their_definitions(name):
    found, sees = PATTERNS[name]
    expected = [[bool(sees(n, j)) for j in range(20)] for n in range(20)]
    np.testing.assert_array_equal(pattern_mask(found), expected)


@pytest.mark.parametrize("causal", [True, False])
def test_bigbird_adds_random_blocks_by_seed(causal):
    base = pattern_mask(patterns.bigbird(50, random=0, causal=causal))
    masks = [pattern_mask(patterns.bigbird(50, seed=s, causal=causal)) for s in (0, 0, 1)]
    np.testing.assert_array_equal(masks[0], masks[1])
    assert (masks[0] != masks[2]).any()
    for mask in masks:
        assert (mask >= base).all()
        room = (np.arange(50) + 1 if causal else 50) - base.sum(1)
        np.testing.assert_array_equal((mask & ~base).sum(1), np.minimum(room, 3))
        assert not (causal and np.triu(mask, 1).any())
    spread = np.flatnonzero((masks[0] & ~base).any(0))
    assert len(spread) > 30, "random blocks come from the whole row."


def test_patterns_run():
    """Sparse attention with a pattern is dense attention with its mask."""
    q, k, v = draw(1, 75, 2, 2, 8, 6)
    for found in (
        patterns.bigbird(10, causal=True),
        patterns.strided(10, stride=3),
        patterns.sliding(10, before=2),
    ):
        chosen = np.kron(pattern_mask(found), np.ones((8, 8), bool))[None, None, :75, :75]
        chosen = np.broadcast_to(chosen, (1, 2, 75, 75))
        expected = by_hand(q, k, v, chosen & causal_mask(75), 8**-0.5)
        run = lambda *a, i=found: block_sparse_attention(*a, i[None, None], block=8)
        out = jax.jit(run)(q, k, v)
        assert_close(out, expected, "float32", "out")


@pytest.mark.parametrize(
    ("function", "given", "message"),
    [
        (patterns.sliding, {"blocks": 0, "before": 1}, "blocks is 0; it must be at least 1."),
        (patterns.sliding, {"blocks": 4, "before": -1}, "before is -1; it must be at least 0."),
        (patterns.strided, {"blocks": 4, "stride": 0}, "stride is 0; it must be at least 1."),
        (
            patterns.longformer,
            {"blocks": 4, "before": 1, "globals": (4,)},
            "globals names block 4; blocks are 0 to 3, the nearest 3.",
        ),
        (patterns.bigbird, {"blocks": 4, "random": -2}, "random is -2; it must be at least 0."),
    ],
)
def test_faults_of_patterns(function, given, message):
    with pytest.raises(ValueError) as error:
        function(**given)
    assert str(error.value) == message
