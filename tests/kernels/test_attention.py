"""Softmax attention: what tests/test_kernels.py does not ask of every operation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kernels.attention import attention, cached_attention, xla
from tests.kernels.crossed import crossed
from tests.kernels.heads import assert_same, by_hand, causal_mask, draw, value_and_slopes
from tests.kernels.refusals import CACHE_FAULTS, HEADS, POSITIONS, assert_raises_one_line, zeros
from tests.tolerance import assert_close

SLOPES = (0, 1, 2)


@pytest.mark.parametrize(
    ("impl", "window"),
    crossed(
        ["ref", "xla"],
        [0, 1, 5, 64, 150, 1000],
        gate=[("ref", 5), ("ref", 1000)] + [("xla", window) for window in (0, 1, 64, 150)],
    ),
)
def test_window_equals_brute_force(impl, window):
    q, k, v = draw(1, 200, 2, 1, 8, 6)
    expected = by_hand(q, k, v, causal_mask(200, window)[None], 8**-0.5)
    assert_close(attention(q, k, v, window=window, impl=impl), expected, "float32", "out")


@pytest.mark.parametrize("impl", ["ref", "xla"])
def test_grouped_heads_equal_repeated_heads(impl):
    q, k, v = draw(2, 150, 6, 2, 8, 5)

    def repeated(q, k, v):
        k, v = (jnp.repeat(x, 3, axis=2) for x in (k, v))
        return attention(q, k, v, impl=impl)

    found = value_and_slopes(lambda *a: attention(*a, impl=impl), q, k, v)
    assert_same(found, value_and_slopes(repeated, q, k, v))


@pytest.mark.parametrize(
    ("options", "length"),
    crossed(
        [{"causal": False}, {"scale": 0.37}, {"window": 40}, {}],
        [2, 300],
        gate=[({"causal": False}, 300), ({"scale": 0.37}, 2), ({"window": 40}, 300), ({}, 2)],
    ),
)
def test_options_match_the_reference(options, length):
    q, k, v = draw(2, length, 4, 2, 8, 6)
    segments = np.repeat([[0, 3, 0, 4, 3]] * 2, [1, length // 3, 0, length // 4, length], axis=1)
    for packed in (None, jnp.asarray(segments[:, :length], jnp.int32)):
        found, expected = (
            value_and_slopes(
                lambda *a, n=impl, s=packed: attention(*a, segments=s, impl=n, **options), q, k, v
            )
            for impl in ("xla", "ref")
        )
        assert_same(found, expected)


@pytest.mark.parametrize("window", [0, 20])
def test_packed_documents_equal_separate_documents(window):
    """Numbers that come back, a document of one token, padding between two; inside if no window."""
    document = np.repeat([0, 1, 0, 2, 3, 0], [5, 70, 3, 1, 100, 81]).astype(np.int32)
    if not window:
        document[[7, 8, 150]] = 0
    number = np.asarray([0, 2, 5, 2], np.int32)[document]
    q, k, v = draw(1, 260, 4, 2, 8, 6)

    def packed(q, k, v):
        return attention(q, k, v, segments=jnp.asarray(number)[None], window=window)

    def separate(q, k, v):
        out = jnp.zeros((1, 260, 4, 6))
        for n in (1, 2, 3):
            (place,) = np.nonzero(document == n)
            alone = (x[:, place] for x in (q, k, v))
            out = out.at[:, place].set(attention(*alone, window=window))
        return out

    assert_same(value_and_slopes(packed, q, k, v), value_and_slopes(separate, q, k, v))


def test_rows_that_see_nothing_are_zero_with_zero_slopes():
    q, k, v = draw(2, 40, 2, 1, 4, 4)
    segments = np.ones((2, 40), np.int32)
    segments[0, 10:30], segments[1] = 0, 0
    found = value_and_slopes(lambda *a: attention(*a, segments=jnp.asarray(segments)), q, k, v)
    for x in found:
        assert np.isfinite(x).all() and not x[segments == 0].any()
        assert x[0, :10].any()

    def cached(q, k, v):
        positions = jnp.asarray([[3], [-1]])
        slots = jnp.asarray([[4, 5, -1], [0, 1, 2]])
        return cached_attention(q, k, v, positions=positions, kv_positions=slots)

    for x in value_and_slopes(cached, *draw(2, 1, 2, 1, 4, 4, slots=3)):
        assert np.isfinite(x).all() and not x.any()


@pytest.mark.parametrize("extra", [{"window": 1}, {}])
def test_tokens_that_see_only_themselves_have_no_score_slopes(extra):
    q, k, v = draw(2, 33, 2, 1, 16, 4)
    segments = None if extra else jnp.asarray(np.tile(np.arange(1, 34, dtype=np.int32), (2, 1)))
    found = value_and_slopes(lambda *a: attention(*a, segments=segments, **extra), q, k, v)
    assert_close(found[0], np.repeat(v, 2, axis=2), "float32", "out")
    assert not found[1].any() and not found[2].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saturated_softmax_stays_finite_and_close(dtype):
    """Scores of +-1000: no relative accuracy is left in the gradients, but no garbage either."""
    q, k, v = (30 * x for x in draw(2, 200, 2, 1, 16, 8, dtype=dtype))
    found = value_and_slopes(attention, q, k, v)
    wide = value_and_slopes(
        lambda *a: attention(*a, impl="ref"), *(x.astype(jnp.float32) for x in (q, k, v))
    )
    assert all(np.isfinite(x.astype(np.float32)).all() for x in found)
    assert_close(found[0], wide[0], dtype, "out")
    assert_close(found[3], wide[3], dtype, "dv")


@pytest.mark.parametrize("options", [{}, {"window": 5}, {"causal": False}])
def test_numerical_slopes(options):
    with jax.enable_x64(True):
        q, k, v = draw(1, 150, 2, 1, 3, 2, dtype=np.float64)
        segments = jnp.asarray(np.repeat([[1, 0, 1, 4]], [60, 3, 2, 85], axis=1), jnp.int32)
        run = jax.jit(lambda *a: attention(*a, segments=segments, **options))
        check_grads(run, (q, k, v), 1, ["rev"])


@pytest.mark.parametrize("length", [1, 7, 200])
def test_numerical_slopes_with_a_cache(length, monkeypatch):
    monkeypatch.setattr(xla, "SCORE_BYTES", 1)
    with jax.enable_x64(True):
        q, k, v = draw(1, length, 2, 1, 3, 2, slots=30, dtype=np.float64)
        given = {
            "positions": jnp.arange(length)[None] % 25,
            "kv_positions": jnp.asarray(np.random.default_rng(0).permutation(30) - 1)[None],
            "window": 9,
        }
        check_grads(jax.jit(lambda *a: cached_attention(*a, **given)), (q, k, v), 1, ["rev"])


@pytest.mark.parametrize(
    "causal_window", [(True, 0), (True, 1), (True, 33), (True, 700), (False, 0)]
)
@pytest.mark.parametrize("length", [1, 5, 127, 129, 1000, 1500])
@pytest.mark.parametrize("batch_heads", [1, 500])
def test_block_pairs_cover_what_is_visible_once(causal_window, length, batch_heads):
    causal, window = causal_window
    rows, cols = xla.block_sizes(batch_heads, length, window)
    assert rows % cols == 0
    plan = xla.Plan(length, rows, cols, causal, window, 1.0, 0.0)
    covered = np.zeros([-(-length // rows) * rows] * 2, int)
    visible = np.zeros(covered.shape, bool)
    visible[:length, :length] = causal_mask(length, window) if causal else True
    for pairs, cut in zip(xla.block_pairs(plan), (False, True), strict=True):
        for i, j in pairs:
            block = np.s_[i * rows : (i + 1) * rows, j * cols : (j + 1) * cols]
            covered[block] += 1
            assert visible[block].any()
            assert cut or visible[block][: length - i * rows].all()
    assert (covered[visible] == 1).all() and covered.max() == 1


@pytest.mark.parametrize(
    ("impl", "window"), crossed(["ref", "xla"], [0, 6], gate=[("ref", 6), ("xla", 0)])
)
def test_token_by_token_from_a_cache_equals_attention(impl, window):
    """With a window the cache is a ring of `window` slots, so positions lie in any order."""
    q, k, v = draw(2, 40, 4, 2, 8, 6)
    slots = window or 40

    @jax.jit
    def step(cache, t):
        keys, values, filled = cache
        keys = keys.at[:, t % slots].set(k[:, t])
        values = values.at[:, t % slots].set(v[:, t])
        filled = filled.at[:, t % slots].set(t)
        positions = jnp.full((2, 1), t)
        given = {"positions": positions, "kv_positions": filled, "window": window, "impl": impl}
        return (keys, values, filled), cached_attention(q[:, t][:, None], keys, values, **given)

    cache = (jnp.zeros((2, slots, 2, 8)), jnp.zeros((2, slots, 2, 6)), jnp.full((2, slots), -1))
    outs = []
    for t in range(40):
        cache, out = step(cache, t)
        outs.append(np.asarray(out))
    expected = attention(q, k, v, window=window)
    assert_close(np.concatenate(outs, axis=1), expected, "float32", "out")


@pytest.mark.parametrize(
    ("window", "scores"), crossed([0, 50], [1, 8 << 20], gate=[(0, 8 << 20), (50, 1)])
)
def test_continuing_a_packed_row_from_a_cache_equals_attention(window, scores, monkeypatch):
    monkeypatch.setattr(xla, "SCORE_BYTES", scores)
    q, k, v = draw(2, 200, 4, 2, 8, 6)
    segments = jnp.asarray(np.repeat([[1, 2, 0], [7, 0, 3]], [90, 100, 10], axis=1), jnp.int32)
    time = jnp.tile(jnp.arange(200), (2, 1))
    cut = 70

    def continued(q, k, v):
        given = {
            "positions": time[:, cut:],
            "kv_positions": time,
            "segments": segments[:, cut:],
            "kv_segments": segments,
            "window": window,
        }
        first = (x[:, :cut] for x in (q, k, v))
        first = attention(*first, segments=segments[:, :cut], window=window)
        return jnp.concatenate([first, cached_attention(q[:, cut:], k, v, **given)], axis=1)

    def whole(q, k, v):
        return attention(q, k, v, segments=segments, window=window)

    assert_same(value_and_slopes(continued, q, k, v), value_and_slopes(whole, q, k, v))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_long_continuations_match_the_reference(dtype, monkeypatch):
    monkeypatch.setattr(xla, "SCORE_BYTES", 1)
    q, k, v = draw(2, 75, 4, 2, 8, 6, slots=90, dtype=dtype)
    rng = np.random.default_rng(1)
    given = {
        "positions": jnp.asarray(rng.integers(0, 90, (2, 75))),
        "kv_positions": jnp.asarray(rng.permuted(np.tile(np.arange(-5, 85), (2, 1)), axis=1)),
        "segments": jnp.asarray(rng.integers(0, 3, (2, 75))),
        "kv_segments": jnp.asarray(rng.integers(0, 3, (2, 90))),
    }
    given["kv_positions"] = jnp.maximum(given["kv_positions"], -1)
    found = value_and_slopes(lambda *a: cached_attention(*a, **given), q, k, v)
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    expected = value_and_slopes(lambda *a: cached_attention(*a, **given, impl="ref"), *wide)
    assert {x.dtype for x in found} == {jnp.dtype(dtype)}
    assert_same(found, expected, dtype)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_both_forms_of_one_token_agree(groups):
    """The one that a CPU runs and the one that other platforms run."""
    q, k, v = draw(2, 1, 4, groups, 8, 6, slots=20)
    visible = jnp.asarray(np.random.default_rng(0).uniform(size=(2, 1, 20)) > 0.5)
    nothing = xla.Joined(None, None, None)
    forms = (xla._attend_by_group, xla._attend_across_groups)
    found, expected = (
        value_and_slopes(
            lambda *a, form=form: form(*a, visible, nothing, scale=0.3, softcap=0.0), q, k, v
        )
        for form in forms
    )
    assert_same(found, expected)


def temporary_bytes(function, *arguments):
    compiled = jax.jit(function).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("packed", [False, True])
def test_memory_of_both_passes_at_length_4096(packed):
    q, k, v = draw(1, 4096, 4, 4, 64, 64)
    segments = jnp.ones((1, 4096), jnp.int32) if packed else None

    def slopes(q, k, v):
        total = lambda *a: jnp.sum(jnp.square(attention(*a, segments=segments)))  # noqa: E731
        return jax.grad(total, SLOPES)(q, k, v)

    assert temporary_bytes(slopes, q, k, v) < 64 << 20


def test_one_token_does_not_copy_the_cache():
    q, k, v = draw(4, 1, 8, 4, 64, 64, slots=1024)
    positions, slots = jnp.full((4, 1), 1023), jnp.tile(jnp.arange(1024), (4, 1))
    step = lambda q, k, v, p, s: cached_attention(q, k, v, positions=p, kv_positions=s)  # noqa: E731
    assert temporary_bytes(step, q, k, v, positions, slots) < k.nbytes / 4


def test_the_scores_of_a_continuation_stay_within_a_chunk():
    q, k, v = draw(1, 2048, 4, 4, 16, 16)
    time = jnp.arange(2048)[None]

    def slopes(q, k, v):
        run = lambda *a: cached_attention(*a, positions=time, kv_positions=time)  # noqa: E731
        return jax.grad(lambda *a: jnp.sum(jnp.square(run(*a))), SLOPES)(q, k, v)

    assert temporary_bytes(slopes, q, k, v) < 6 * xla.SCORE_BYTES < 4 * 2048**2 * 4


CACHED = HEADS | POSITIONS
SHARED_FAULTS = [
    ({"q": zeros(5, 4, 8)}, "q has shape (5, 4, 8), rank 3; it must have rank 4"),
    ({"v": zeros(2, 5, 2, 6, dtype=int)}, "v has dtype int32; it must be floating"),
    ({"q": zeros(2, 0, 4, 8)}, "q has shape (2, 0, 4, 8); every size, time included, must be at"),
    ({"k": zeros(2, 5, 2, 7)}, "k has key dim 7; it must be q's, 8."),
    ({"v": zeros(2, 5, 1, 6)}, "v has (batch, time, heads) (2, 5, 1); it must be k's, (2, 5, 2)."),
    ({"q": zeros(2, 5, 5, 8)}, "q has 5 heads and k 2; q's must be a multiple of k's, the nearest"),
    ({"q": zeros(2, 5, 1, 8)}, "the nearest being 2."),
    ({"window": -1}, "window is -1; it must be 0 (off) or a positive number of tokens."),
    ({"scale": 0.0}, "scale is 0.0; it must be positive, as 0.3536."),
    ({"impl": "fast"}, "attention has no implementation 'fast'; it has ref, xla"),
]
FAULTS = [
    (
        {"k": zeros(2, 6, 2, 8), "v": zeros(2, 6, 2, 6)},
        "k has (batch, time) (2, 6); it must be q's",
    ),
    ({"window": 3, "causal": False}, "window is 3 with causal=False; a window needs causal=True"),
]


@pytest.mark.parametrize(("fault", "message"), SHARED_FAULTS + FAULTS)
def test_faults_of_attention(fault, message):
    jax.eval_shape(attention, **HEADS)
    assert_raises_one_line(attention, HEADS | fault, message)


@pytest.mark.parametrize(("fault", "message"), SHARED_FAULTS + CACHE_FAULTS)
def test_faults_of_cached_attention(fault, message):
    jax.eval_shape(cached_attention, **CACHED)
    assert_raises_one_line(cached_attention, CACHED | fault, message)
