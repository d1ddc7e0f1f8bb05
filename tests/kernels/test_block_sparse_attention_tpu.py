"""The TPU kernels of block-sparse attention: their walks, shapes, costs and limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import setting
from kernels.block_sparse_attention import (
    block_sparse_attention,
    lists,
    pallas_tpu,
)
from kernels.block_sparse_attention import pallas_tpu_schedule as schedule
from tests.kernels.crossed import crossed
from tests.kernels.heads import (
    assert_same,
    draw,
    random_lists,
    value_and_slopes,
)
from tests.kernels.launches import costs


def pairs_of(walk, unit, owner_is_query):
    """Sorted (query block, key block) of every visit; owners must come in order and all of them."""
    own = walk.owner[tuple(min(u, n - 1) for u, n in zip(unit, walk.owner.shape, strict=False))]
    assert (np.diff(own) >= 0).all() and set(own.tolist()) == set(range(own.max() + 1))
    members = np.asarray(walk.member[unit]).reshape(walk.steps, walk.each)
    found = [(o, m) for o, row in zip(own.tolist(), members.tolist(), strict=True) for m in row]
    return sorted((o, m) if owner_is_query else (m, o) for o, m in found if m >= 0)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("width", "causal"), [(3, True), (12, True), (4, False)])
def test_schedules_meet_every_pair_once(known, width, causal):
    """Also where lists of 12 could name every block, whose steps by key are then static."""
    count, blocks = 12, 12
    indices = random_lists(2, 3, count, width, blocks=blocks)
    first, end = lists.reach(count * 4, 4, 4, causal, 0)
    at = np.arange(blocks)
    reached = ((first[:, None] <= at) & (at < end[:, None])).sum(0)

    def walks(given):
        chosen = lists.distinct(given, first, end, blocks)
        chosen = (np if known else jnp).sort(chosen, axis=-1)
        bound = np.minimum(end - first, width)
        counts = (chosen != blocks).sum(-1).max((0, 1)) if known else bound
        across = schedule.by_key(chosen, counts, reached, 4)
        return schedule.by_query(chosen, counts, 4, blocks), across

    down, across = (walks if known else jax.jit(walks))(indices)
    down, across = (schedule.Schedule(*(np.asarray(x) for x in walk)) for walk in (down, across))
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
    every = np.zeros(14, np.int32), np.full(14, blocks, np.int32)

    def tile(given):
        return schedule.tile(lists.distinct(given, *every, blocks), 2, 3, span, blocks)

    coarse, bits = (np.asarray(x) for x in (tile if known else jax.jit(tile))(indices))
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
    with setting.interpreting():
        assert_same(value_and_slopes(functools.partial(run, impl="pallas_tpu"), *arrays), expected)


FINE = (1, 1, 4, {})  # spans of more than 32 blocks: two words of bits
SINGLE = (16, 16, 4, {"causal": False})  # single blocks, a list for every query head
SHARED = (64, 32, 1, {"window": 40})  # one list for all heads


@pytest.mark.parametrize(
    ("case", "known"),
    crossed(
        [FINE, SINGLE, SHARED],
        [True, False],
        gate=[(FINE, True), (SINGLE, False), (SHARED, True)],
    ),
)
def test_tpu_kernels_match_the_reference(case, known):
    block, query_block, heads, options = case
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
    down, across, _ = pallas_tpu._schedules(plan, single, 16, 16, indices)
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
    with setting.interpreting(), pytest.raises(ValueError) as error:
        jax.eval_shape(run, q, k, k, indices)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert pallas_tpu.uncovered("block_sparse_attention", q, k, k, indices, **given)
