"""Block-sparse attention: what tests/test_kernels.py does not ask of every operation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kernels import dispatch
from kernels.attention import attention, cached_attention
from kernels.block_sparse_attention import (
    block_sparse_attention,
    cached_block_sparse_attention,
    cost,
    lists,
    pallas_tpu,
    patterns,
    visits,
    xla,
)
from tests.kernels.heads import assert_same, by_hand, draw, value_and_slopes
from tests.kernels.launches import costs
from tests.tolerance import assert_close

IMPLS = ["ref", "xla"]
# Whether the lists are known when the program is traced; to the reference it makes no difference.
each_form = pytest.mark.parametrize(
    ("impl", "known"), [("ref", True), ("xla", True), ("xla", False)]
)


def random_lists(*shape, blocks, seed=1):
    return np.random.default_rng(seed).integers(-1, blocks, shape).astype(np.int32)


def chosen_pairs(indices, batch, heads, length, slots, query_block, block):
    """(B, H, T, S) by a loop over the entries of every list."""
    found = np.zeros((batch, heads, length, slots), bool)
    for b, h, t in np.ndindex(batch, heads, length):
        row = indices[b % indices.shape[0], h * indices.shape[1] // heads, t // query_block]
        for i in row:
            if i >= 0:
                found[b, h, t, i * block : (i + 1) * block] = True
    return found


def causal_mask(length, window=0):
    distance = np.arange(length)[:, None] - np.arange(length)
    return (distance >= 0) & ((distance < window) if window else True)


@each_form
@pytest.mark.parametrize(
    ("block", "query_block", "shared"),
    [(16, 16, (1, 1)), (8, 1, (2, 2)), (1, 1, (1, 6)), (4, 12, (2, 1)), (100, 7, (1, 2))],
)
def test_equals_brute_force(impl, known, shared, block, query_block):
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


@each_form
@pytest.mark.parametrize("options", [{}, {"window": 20}, {"causal": False}, {"scale": 0.5}])
def test_all_blocks_equal_attention(impl, known, options):
    """With segments whose numbers come back for other documents."""
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
    expected = value_and_slopes(functools.partial(run, indices=jnp.asarray(plain)), q, k, v)
    for other in (jnp.asarray(mixed), jnp.asarray(beyond)):
        found = value_and_slopes(functools.partial(run, indices=other), q, k, v)
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


@pytest.mark.parametrize("budget", [1, 1 << 16])
@pytest.mark.parametrize("known", [True, False])
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


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("window", "query_block"), [(0, 1), (20, 10)])
def test_all_slots_equal_cached_attention(impl, window, query_block):
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("known", [True, False])
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
    from kernels import count

    return count.Walk().run(jax.make_jaxpr(function)(*arguments)).matmul


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


def pairs_of(walk, unit, owner_is_query):
    """Sorted (query block, key block) of every visit; owners must come in order and all of them."""
    own = walk.owner[tuple(min(u, n - 1) for u, n in zip(unit, walk.owner.shape, strict=False))]
    assert (np.diff(own) >= 0).all() and set(own.tolist()) == set(range(own.max() + 1))
    members = np.asarray(walk.member[unit]).reshape(walk.steps, walk.each)
    found = [(o, m) for o, row in zip(own.tolist(), members.tolist(), strict=True) for m in row]
    return sorted((o, m) if owner_is_query else (m, o) for o, m in found if m >= 0)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("width", "causal"), [(3, True), (12, True), (4, False)])
def test_visits_meet_every_pair_once(known, width, causal):
    """Also where lists of 12 could name every block, whose steps by key are then static."""
    count, blocks = 12, 12
    indices = random_lists(2, 3, count, width, blocks=blocks)
    first, end = lists.reach(count * 4, 4, 4, causal, 0)
    given = indices if known else jnp.asarray(indices)
    chosen = lists.distinct(given, first, end, blocks)
    chosen = (np if known else jnp).sort(chosen, axis=-1)
    bound = np.minimum(end - first, width)
    counts = (chosen != blocks).sum(-1).max((0, 1)) if known else bound
    at = np.arange(blocks)
    reached = ((first[:, None] <= at) & (at < end[:, None])).sum(0)
    down = visits.by_query(chosen, counts, 4, blocks)
    across = visits.by_key(chosen, counts, reached, 4)
    down, across = (visits.Visits(*(np.asarray(x) for x in walk)) for walk in (down, across))
    for unit in np.ndindex(2, 3):
        rows = [set(row.tolist()) for row in indices[unit]]
        expected = [(n, j) for n in range(count) for j in range(blocks)
                    if j in rows[n] and (j <= n or not causal)]  # fmt: skip
        assert pairs_of(down, unit, True) == expected
        assert pairs_of(across, unit, False) == expected


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("span", "blocks"), [(4, 10), (40, 100)])
def test_tiles_name_the_spans_and_bits_of_their_lists(known, span, blocks):
    """Two heads of 7 lists each in tiles of 3; spans of 40 blocks take two words."""
    indices = random_lists(1, 2, 14, 5, blocks=blocks)
    given = indices if known else jnp.asarray(indices)
    every = np.zeros(14, np.int32), np.full(14, blocks, np.int32)
    chosen = lists.distinct(given, *every, blocks)
    coarse, bits = (np.asarray(x) for x in visits.tile(chosen, 2, 3, span, blocks))
    words = -(-span // 32)
    assert coarse.shape[2] == 6 and bits.shape == (1, 2, 6, -(-blocks // span) * words, 3)
    for g, head, n in np.ndindex(2, 2, 7):
        named = {i for i in indices[0, g, head * 7 + n].tolist() if i >= 0}
        tile, row = head * 3 + n // 3, n % 3
        has = lambda i, g=g, t=tile, r=row: (
            bits[0, g, t, i // span * words + i % span // 32, r] >> (i % span % 32) & 1
        )
        assert {i for i in range(blocks) if has(i)} == named
        assert {i // span for i in named} <= set(coarse[0, g, tile].tolist())


def kernel_against_reference(arrays, indices, **given):
    run = functools.partial(block_sparse_attention, indices=indices, **given)
    expected = value_and_slopes(functools.partial(run, impl="ref"), *arrays)
    with dispatch.interpreting():
        assert_same(value_and_slopes(functools.partial(run, impl="pallas_tpu"), *arrays), expected)


@pytest.mark.parametrize(
    ("block", "query_block", "heads", "options"),
    [
        (1, 1, 4, {}),  # spans of more than 32 blocks: two words of bits
        (16, 16, 4, {"causal": False}),  # single blocks, a list for every query head
        (64, 32, 1, {"window": 40}),  # one list for all heads
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_tpu_kernels_match_the_reference(block, query_block, heads, options, known):
    arrays = draw(2, 140, 4, 2, 8, 6)
    shape = (1, heads, -(-140 // query_block), 4)
    indices = random_lists(*shape, blocks=-(-140 // block))
    segments = jnp.asarray(np.repeat([[1, 2, 0], [7, 0, 7]], [60, 70, 10], axis=1), jnp.int32)
    given = options | {"block": block, "query_block": query_block, "segments": segments}
    kernel_against_reference(arrays, indices if known else jnp.asarray(indices), **given)


@pytest.mark.parametrize("query_block", [1, 16])
def test_tpu_kernels_take_rows_in_pieces_where_lists_have_no_room(query_block, monkeypatch):
    """With just enough scalar memory for one key head the launches are mapped over all four."""
    arrays = draw(2, 70, 4, 2, 8, 6)
    indices = jnp.asarray(random_lists(2, 2, -(-70 // query_block), 3, blocks=9))
    segments = jnp.asarray(np.repeat([[1, 2, 0], [7, 0, 7]], [30, 30, 10], axis=1), jnp.int32)
    given = {"block": 8, "query_block": query_block, "segments": segments}
    monkeypatch.setattr(pallas_tpu, "SCALAR_BYTES", 0)
    reason = pallas_tpu.uncovered("block_sparse_attention", *arrays, indices, **given)
    monkeypatch.setattr(pallas_tpu, "SCALAR_BYTES", int(reason.split()[0]))
    kernel_against_reference(arrays, indices, **given)


def test_cost_estimates_of_the_tpu_kernels():
    """By hand: products and copied blocks of one row with 2 heads on 1, blocks of 16, K 8, V 24."""
    q, k, v = draw(1, 64, 2, 1, 8, 24)
    indices = jnp.asarray(random_lists(1, 1, 4, 2, blocks=4))
    plan, single = pallas_tpu._plan(q, k, indices, 16, 16, True, 0, 1.0, False)
    down, across, _ = pallas_tpu._visits(plan, single, 16, 16, indices)
    assert single and plan.rows == 32

    given = dict(q=q, k=k, v=v)
    forward, dq, dkv = costs(block_sparse_attention, given, indices=indices, block=16)
    pairs = 2 * down.steps * 32 * down.each * 16
    assert forward.flops == pairs * (8 + 24)
    assert dq.flops == pairs * (8 + 24 + 8)
    assert dkv.flops == 2 * across.steps * 16 * across.each * 32 * (8 + 24 + 24 + 8)
    keys = down.steps * down.each * 16 * (8 + 24)
    rows = 4 * 32  # of all query blocks, each copied once
    assert forward.bytes_accessed == 4 * (keys + rows * (8 + 24 + 2))
    assert dq.bytes_accessed == 4 * (keys + rows * (8 + 24 + 2 + 1 + 8))
    members = across.steps * across.each * 32 * (8 + 24 + 2 + 1)
    assert dkv.bytes_accessed == 4 * (members + 4 * 16 * 2 * (8 + 24))


@pytest.mark.parametrize(
    ("length", "block", "query_block", "entries", "message"),
    [
        (600, 1, 1, 300, "serve 300 entries a list for 1 queries; the most are 256 for less than"),
        (2042, 1021, 16, 2, "serve block 1021 has no divisor from 8 to 512; use impl='xla'."),
        (1 << 17, 64, 1, 16, "bytes of lists a key head; the most are 786432; use impl='xla'."),
    ],
)
def test_what_the_tpu_kernels_do_not_serve(length, block, query_block, entries, message):
    like = jax.ShapeDtypeStruct
    q, k = like((1, length, 16, 8), jnp.float32), like((1, length, 1, 8), jnp.float32)
    indices = like((1, 1, -(-length // query_block), entries), jnp.int32)
    given = {"block": block, "query_block": query_block}
    run = functools.partial(block_sparse_attention, **given, impl="pallas_tpu")
    with dispatch.interpreting(), pytest.raises(ValueError) as error:
        jax.eval_shape(run, q, k, k, indices)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert pallas_tpu.uncovered("block_sparse_attention", q, k, k, indices, **given)


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


def zeros(*shape, dtype=np.float32):
    return jnp.zeros(shape, dtype)


HEADS = {"q": zeros(2, 5, 4, 8), "k": zeros(2, 5, 2, 8), "v": zeros(2, 5, 2, 6)}
GOOD = HEADS | {"indices": zeros(2, 2, 3, 1, dtype=int), "block": 2}
CACHED = HEADS | {
    "indices": zeros(2, 2, 5, 1, dtype=int),
    "block": 2,
    "positions": zeros(2, 5, dtype=int),
    "kv_positions": zeros(2, 5, dtype=int),
}
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
CACHED_FAULTS = [
    ({"query_block": 0}, "query_block is 0; it must be at least 1."),
    ({"q": zeros(3, 5, 4, 8)}, "k has batch size 2; it must be q's, 3."),
    ({"positions": zeros(2, 5)}, "positions has shape (2, 5) and dtype float32; it must be (2, 5)"),
    ({"kv_positions": zeros(2, 4, dtype=int)}, "kv_positions has shape (2, 4) and dtype int32"),
    ({"segments": zeros(2, 5, dtype=int)}, "segments is given without kv_segments; give both"),
    ({"kv_segments": zeros(2, 5, dtype=int)}, "kv_segments is given without segments; give both"),
    (
        {"segments": zeros(2, 4, dtype=int), "kv_segments": zeros(2, 5, dtype=int)},
        "segments has shape (2, 4) and dtype int32; it must be (2, 5) int32",
    ),
]


def assert_raises_one_line(function, arguments, message):
    with pytest.raises(ValueError) as error:
        function(**arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("fault", "message"), SHARED_FAULTS + FAULTS)
def test_faults(fault, message):
    jax.eval_shape(lambda: block_sparse_attention(**GOOD))
    assert_raises_one_line(block_sparse_attention, GOOD | fault, message)


@pytest.mark.parametrize(("fault", "message"), SHARED_FAULTS + CACHED_FAULTS)
def test_faults_with_a_cache(fault, message):
    jax.eval_shape(lambda: cached_block_sparse_attention(**CACHED))
    assert_raises_one_line(cached_block_sparse_attention, CACHED | fault, message)
