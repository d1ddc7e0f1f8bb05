"""Block-sparse attention: what tests/test_kernels.py does not ask of every operation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kernels.attention import attention, cached_attention
from kernels.block_sparse_attention import (
    block_sparse_attention,
    cached_block_sparse_attention,
    cost,
    lists,
    patterns,
    xla,
)
from tests.kernels.crossed import crossed
from tests.kernels.heads import (
    assert_same,
    by_hand,
    causal_mask,
    chosen_pairs,
    draw,
    random_lists,
    value_and_slopes,
)
from tests.tolerance import assert_close

IMPLS = ["ref", "xla"]
# Whether the lists are known when the program is traced; to the reference it makes no difference.
FORMS = REFERENCE, KNOWN, TRACED = [("ref", True), ("xla", True), ("xla", False)]
each_form = pytest.mark.parametrize(("impl", "known"), FORMS)


SIZES = [(16, 16, (1, 1)), (8, 1, (2, 2)), (1, 1, (1, 6)), (4, 12, (2, 1)), (100, 7, (1, 2))]


@pytest.mark.parametrize(
    ("form", "size"),
    crossed(
        FORMS,
        SIZES,
        gate=[
            (REFERENCE, SIZES[1]),
            (REFERENCE, SIZES[3]),
            (KNOWN, SIZES[0]),
            (KNOWN, SIZES[2]),
            (KNOWN, SIZES[3]),
            (TRACED, SIZES[1]),
            (TRACED, SIZES[4]),
        ],
    ),
)
def test_equals_brute_force(form, size):
    (impl, known), (block, query_block, shared) = form, size
    q, k, v = draw(2, 61, 6, 2, 8, 6)
    blocks, count = -(-61 // block), -(-61 // query_block)
    indices = random_lists(*shared, count, 5, blocks=blocks)
    chosen = chosen_pairs(indices, 2, 6, 61, 61, query_block, block)
    given = {"block": block, "query_block": query_block, "impl": impl}
    indices = indices if known else jnp.asarray(indices)
    run = jax.jit(lambda *a: block_sparse_attention(*a, indices, window=13, **given))
    expected = by_hand(q, k, v, chosen & causal_mask(61, 13), 8**-0.5)
    assert_close(run(q, k, v), expected, "float32", "out")
    run = jax.jit(lambda *a: block_sparse_attention(*a, indices, causal=False, scale=0.3, **given))
    expected = by_hand(q, k, v, chosen, 0.3)
    assert_close(run(q, k, v), expected, "float32", "out")


@pytest.mark.parametrize(
    ("form", "options"),
    crossed(
        FORMS,
        [{}, {"window": 20}, {"causal": False}, {"scale": 0.5}],
        gate=[
            (REFERENCE, {"scale": 0.5}),
            (KNOWN, {}),
            (KNOWN, {"window": 20}),
            (TRACED, {"causal": False}),
            (TRACED, {"scale": 0.5}),
        ],
    ),
)
def test_all_blocks_equal_attention(form, options):
    """With segments whose numbers come back for other documents."""
    impl, known = form
    q, k, v = draw(2, 75, 4, 2, 8, 6)
    segments = np.repeat([[1, 0, 2, 1], [0, 5, 6, 0]], [20, 3, 30, 22], axis=1).astype(np.int32)
    indices = np.tile(np.arange(5, dtype=np.int32), (1, 1, 10, 1))
    indices = indices if known else jnp.asarray(indices)
    given = options | {"segments": jnp.asarray(segments)}
    blocks = {"indices": indices, "block": 16, "query_block": 8, "impl": impl}
    found = value_and_slopes(lambda *a: block_sparse_attention(*a, **blocks, **given), q, k, v)
    dense = functools.partial(attention, impl="ref", **given)
    assert_same(found, value_and_slopes(dense, q, k, v))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_list_is_a_set(impl):
    """Repeated, reordered and empty entries change no bit; nor do those that name no block."""
    q, k, v = draw(1, 64, 2, 1, 8, 6)
    plain = np.asarray([[0, 1, 3, -1, -1, -1]] * 8, np.int32)[None, None]
    mixed = np.asarray([[3, 1, 0, 3, 1, 3]] * 8, np.int32)[None, None]
    beyond = np.asarray([[0, -7, 3, 99, 1, 8]] * 8, np.int32)[None, None]
    run = functools.partial(block_sparse_attention, block=8, impl=impl)

    @jax.jit
    def evaluate(indices):
        out, pullback = jax.vjp(functools.partial(run, indices=indices), q, k, v)
        return out, *pullback(jnp.cos(out))

    expected = evaluate(plain)
    for other in (mixed, beyond):
        found = evaluate(other)
        assert_same(found, expected)
        np.testing.assert_array_equal(found[0], expected[0])


@each_form
def test_queries_that_see_nothing_are_zero_with_zero_slopes(impl, known):
    """Empty lists, lists of later blocks only, and padding."""
    q, k, v = draw(1, 40, 2, 2, 4, 4)
    segments = np.ones((1, 40), np.int32)
    segments[0, 37:] = 0
    indices = np.asarray([[0, -1], [-1, -1], [3, 4], [2, 3], [0, 4]], np.int32)[None, None]
    run = functools.partial(
        block_sparse_attention,
        indices=indices if known else jnp.asarray(indices),
        block=8,
        segments=jnp.asarray(segments),
        impl=impl,
    )
    out, dq, dk, dv = value_and_slopes(run, q, k, v)
    blind = np.r_[8:24, 37:40]
    for x in (out, dq):
        assert np.isfinite(x).all() and not x[:, blind].any()
        assert x[:, 30].all() and out[:, :8].all()
    unseen = np.r_[8:16, 37:40]
    for x in (dk, dv):
        assert np.isfinite(x).all() and not x[:, unseen].any() and x[:, 20].all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saturated_softmax_stays_finite_and_close(dtype):
    """Scores of +-1000: no relative accuracy is left in the gradients, but no garbage either."""
    q, k, v = (30 * x for x in draw(2, 96, 2, 1, 16, 8, dtype=dtype))
    indices = jnp.asarray(random_lists(2, 1, 12, 4, blocks=12))
    run = functools.partial(block_sparse_attention, indices=indices, block=8)
    found = value_and_slopes(run, q, k, v)
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    expected = value_and_slopes(functools.partial(run, impl="ref"), *wide)
    assert all(np.isfinite(x.astype(np.float32)).all() for x in found)
    assert_close(found[0], expected[0], dtype, "out")
    assert_close(found[3], expected[3], dtype, "dv")


@pytest.mark.parametrize(
    ("budget", "known"), crossed([1, 1 << 16], [True, False], gate=[(1, True), (1 << 16, False)])
)
def test_lists_and_rows_in_several_pieces(budget, known, monkeypatch):
    """A budget that cuts the rows into chunks, and one that also cuts every list into pieces."""
    monkeypatch.setattr(xla, "CHUNK_BYTES", budget)
    q, k, v = draw(2, 150, 4, 2, 8, 6)
    indices = random_lists(1, 2, 19, 11, blocks=19)
    indices[:, :, ::2, 3:] = -1
    indices = indices if known else jnp.asarray(indices)
    segments = jnp.asarray(np.repeat([[1, 2, 0], [7, 0, 3]], [60, 80, 10], axis=1), jnp.int32)
    run = functools.partial(block_sparse_attention, indices=indices, block=8, segments=segments)
    expected = value_and_slopes(functools.partial(run, impl="ref"), q, k, v)
    assert_same(value_and_slopes(run, q, k, v), expected)


@pytest.mark.parametrize("options", [{}, {"window": 9}, {"causal": False}])
def test_numerical_slopes(options):
    with jax.enable_x64(True):
        q, k, v = draw(1, 50, 2, 1, 3, 2, dtype=np.float64)
        segments = jnp.asarray(np.repeat([[1, 0, 1, 4]], [20, 3, 2, 25], axis=1), jnp.int32)
        indices = jnp.asarray(random_lists(1, 2, 7, 4, blocks=13))
        given = {"block": 4, "query_block": 8, "segments": segments} | options
        run = jax.jit(lambda *a: block_sparse_attention(*a, indices, **given))
        check_grads(run, (q, k, v), 1, ["rev"])


@pytest.mark.parametrize(
    ("impl", "sizes"),
    crossed(IMPLS, [(0, 1), (20, 10)], gate=[("ref", (0, 1)), ("xla", (20, 10))]),
)
def test_all_slots_equal_cached_attention(impl, sizes):
    window, query_block = sizes
    q, k, v = draw(2, 25, 4, 2, 8, 6, slots=50)
    rng = np.random.default_rng(2)
    order = rng.permuted(np.tile(np.arange(-5, 45), (2, 1)), axis=1)
    given = {
        "positions": jnp.asarray(rng.integers(-1, 50, (2, 25))),
        "kv_positions": jnp.asarray(np.maximum(order, -1)),
        "segments": jnp.asarray(rng.integers(0, 3, (2, 25))),
        "kv_segments": jnp.asarray(rng.integers(0, 3, (2, 50))),
        "window": window,
    }
    blocks = {
        "indices": jnp.tile(jnp.arange(7, dtype=jnp.int32), (1, 1, -(-25 // query_block), 1)),
        "block": 8,
        "query_block": query_block,
        "impl": impl,
    }
    run = functools.partial(cached_block_sparse_attention, **given, **blocks)
    expected = value_and_slopes(lambda *a: cached_attention(*a, **given, impl="ref"), q, k, v)
    assert_same(value_and_slopes(run, q, k, v), expected)


@pytest.mark.parametrize(
    ("dtype", "known"),
    crossed(["float32", "bfloat16"], [True, False], gate=[("float32", True), ("bfloat16", False)]),
)
def test_chosen_slots_match_the_reference(dtype, known):
    q, k, v = draw(2, 21, 4, 2, 8, 6, slots=50, dtype=dtype)
    indices = random_lists(1, 4, 6, 3, blocks=13)
    rng = np.random.default_rng(3)
    given = {
        "indices": indices if known else jnp.asarray(indices),
        "block": 4,
        "query_block": 4,
        "positions": jnp.asarray(rng.integers(0, 50, (2, 21))),
        "kv_positions": jnp.asarray(rng.permuted(np.tile(np.arange(50), (2, 1)), axis=1)),
    }
    run = functools.partial(cached_block_sparse_attention, **given)
    found = value_and_slopes(run, q, k, v)
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    expected = value_and_slopes(functools.partial(run, impl="ref"), *wide)
    assert {x.dtype for x in found} == {jnp.dtype(dtype)}
    assert_same(found, expected, dtype)


@pytest.mark.parametrize("impl", IMPLS)
def test_token_by_token_from_a_cache_equals_the_whole_row(impl):
    """Every token with a list of its own, from a cache that fills up."""
    q, k, v = draw(2, 40, 4, 2, 8, 6)
    indices = jnp.asarray(random_lists(2, 2, 40, 3, blocks=5))
    time = jnp.arange(40)

    @jax.jit
    def step(t):
        filled = jnp.broadcast_to(jnp.where(time <= t, time, -1), (2, 40))
        return cached_block_sparse_attention(
            q[:, t][:, None],
            k,
            v,
            indices[:, :, t][:, :, None],
            block=8,
            positions=jnp.full((2, 1), t),
            kv_positions=filled,
            impl=impl,
        )

    found = np.concatenate([np.asarray(step(t)) for t in range(40)], axis=1)
    run = jax.jit(lambda *a: block_sparse_attention(*a, indices, block=8, query_block=1))
    expected = run(q, k, v)
    assert_close(found, expected, "float32", "out")


def test_works_inside_shard_map():
    """Rows and heads split over devices, keys given whole to each."""
    q, k, v = draw(2, 40, 4, 1, 8, 6)
    indices = jnp.asarray(random_lists(1, 1, 5, 3, blocks=5))
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows, heads = jax.sharding.PartitionSpec("x"), jax.sharding.PartitionSpec("x", None, "y")
    run = functools.partial(block_sparse_attention, indices=indices, block=8)
    split = jax.shard_map(run, mesh=mesh, in_specs=(heads, rows, rows), out_specs=heads)
    assert_same(value_and_slopes(split, q, k, v), value_and_slopes(run, q, k, v))


def dot_flops(function, *arguments):
    """FLOPs of all contractions of a traced function, loops times their length."""
    from programs import flops

    return flops.Walk().run(jax.make_jaxpr(function)(*arguments)).matmul


def test_flops_follow_the_lists():
    """Forward: exactly the chosen blocks. Backward: five products for the forward pass's two."""
    q, k, v = draw(1, 512, 4, 2, 16, 16)
    indices = jnp.asarray(random_lists(1, 2, 32, 4, blocks=32))
    run = functools.partial(block_sparse_attention, indices=indices, block=16, causal=False)
    once = 2 * 4 * 512 * (4 * 16) * (16 + 16)
    assert dot_flops(run, q, k, v) == once
    assert cost.block_sparse_attention(q, k, v, indices, block=16, causal=False) == once
    slopes = jax.grad(lambda *a: jnp.sum(run(*a)), (0, 1, 2))
    assert dot_flops(slopes, q, k, v) == 3.5 * once


def test_lists_that_are_known_cost_what_they_name():
    """Two global blocks see all 64; the others' lists are mostly empty entries."""
    q, k, v = draw(1, 1024, 2, 2, 16, 16)
    found = patterns.longformer(64, before=1, after=1, globals=(0, 40), causal=False)
    assert found.shape == (64, 64)
    run = lambda *a, indices: block_sparse_attention(*a, indices, block=16, causal=False)
    known = dot_flops(functools.partial(run, indices=found[None, None]), q, k, v)
    traced = dot_flops(functools.partial(run, indices=jnp.asarray(found)[None, None]), q, k, v)
    named = (found >= 0).sum()
    model = cost.block_sparse_attention(q, k, v, found[None, None], block=16, causal=False)
    assert model == 2 * 2 * 16 * named * 16 * (16 + 16)
    assert known < 1.2 * model and round(traced * named) == 64 * 64 * model


def test_causal_lists_cost_no_more_than_can_be_seen():
    q, k, v = draw(1, 100, 2, 2, 8, 8)
    full = jnp.tile(jnp.arange(10), (1, 1, 10, 1))
    found = cost.block_sparse_attention(q, k, v, full, block=10)
    assert found == 2 * 2 * (10 * 10 * 55) * 16
    # Of 96 tokens the windows of 9 that end in 10 n .. 10 n + 9 reach one block back.
    found = cost.block_sparse_attention(q, k, v, full, block=10, window=9)
    assert found == 2 * 2 * (10 * 10 * (1 + 9 * 2)) * 16
    one = cost.cached_block_sparse_attention(
        q[:, :1], k, v, full[:, :, :1, :3], block=10, positions=None, kv_positions=None
    )
    assert one == 2 * 2 * 30 * 16


@pytest.mark.parametrize("known", [True, False])
def test_groups_hold_every_entry_once(known):
    rng = np.random.default_rng(0)
    for count, blocks, width, causal in ((1, 1, 1, True), (40, 40, 7, True), (33, 33, 33, False)):
        indices = rng.integers(-1, blocks, (2, 3, count, width)).astype(np.int32)
        first, end = lists.reach(count * 4, 4, 4, causal, 0)
        given = indices if known else jnp.asarray(indices)
        found = lists.distinct(given, first, end, blocks)
        found, parts = lists.groups(found, first, end, blocks)
        found = np.asarray(found)
        assert sorted(np.concatenate([rows for rows, _ in parts])) == list(range(count))
        assert [w for _, w in parts] == sorted({w for _, w in parts}, reverse=True)
        for rows, wide in parts:
            for b, h, n in np.ndindex(2, 3, len(rows)):
                row = indices[b, h, rows[n]]
                legal = set(row[(row >= 0) & ((row <= rows[n]) | (not causal))].tolist())
                own = found[b, h, rows[n], :wide]
                assert set(own[own < blocks].tolist()) == legal
                assert (own < blocks).sum() == len(legal)


def temporary_bytes(function, *arguments):
    compiled = jax.jit(function).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_of_both_passes_is_bounded():
    """Neither all chosen keys (64 times q here) nor all scores at once."""
    q, k, v = draw(1, 4096, 2, 2, 64, 64)
    indices = jnp.asarray(random_lists(1, 2, 4096, 2, blocks=64))

    def slopes(q, k, v):
        run = lambda *a: block_sparse_attention(*a, indices, block=64, query_block=1)
        return jax.grad(lambda *a: jnp.sum(jnp.square(run(*a))), (0, 1, 2))(q, k, v)

    assert temporary_bytes(slopes, q, k, v) < 4 * xla.CHUNK_BYTES + 8 * q.nbytes


def test_a_global_row_is_taken_in_pieces():
    q, k, v = draw(1, 8192, 2, 2, 32, 32)
    found = patterns.longformer(128, before=1, after=1, causal=False)[None, None]

    def slopes(q, k, v):
        run = lambda *a: block_sparse_attention(*a, found, block=64, causal=False)
        return jax.grad(lambda *a: jnp.sum(jnp.square(run(*a))), (0, 1, 2))(q, k, v)

    assert temporary_bytes(slopes, q, k, v) < 6 * xla.CHUNK_BYTES + 12 * q.nbytes


def equations(jaxpr) -> int:
    inner = (
        getattr(x, "jaxpr", x)
        for eqn in jaxpr.eqns
        for value in eqn.params.values()
        for x in jax.tree.leaves(value, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"))
        if hasattr(getattr(x, "jaxpr", x), "eqns")
    )
    return len(jaxpr.eqns) + sum(equations(x) for x in inner)


def test_programs_do_not_grow_with_the_lists():
    def size(blocks):
        shapes = [jax.ShapeDtypeStruct((1, 8 * blocks, 2, 4), jnp.float32)] * 3
        found = patterns.bigbird(blocks, causal=True)[None, None]
        run = lambda *a: jnp.sum(block_sparse_attention(*a, found, block=8))
        return equations(jax.make_jaxpr(jax.grad(run, (0, 1, 2)))(*shapes).jaxpr)

    assert size(1000) < 1.2 * size(100) < 1000
