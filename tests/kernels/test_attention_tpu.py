"""Attention as TPU kernels: what tests/test_kernels.py does not ask, in Pallas' interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import setting
from kernels.attention import attention, pallas_tpu
from kernels.attention import pallas_tpu_schedule as schedule
from tests.kernels.launches import costs
from tests.tolerance import assert_close

RULES = [(1000, True, 0), (1000, True, 200), (1000, False, 0), (130, True, 1), (7, True, 0)]


def rule_of(length, causal, window):
    return schedule.Rule(length, causal, window, 1.0, 0.0)


def visible(length, causal, window):
    distance = np.arange(length)[:, None] - np.arange(length)
    seen = (distance >= 0) if causal else np.ones_like(distance, bool)
    return seen & (distance < window) if window else seen


def assert_covers(rule, walk, block, first=0, count=None):
    """Every visible score lies in one pair; every pair holds one; pairs not cut hold no other."""
    size = -(-rule.length // block) * block
    seen = np.zeros((size, size), bool)
    seen[: rule.length, : rule.length] = visible(*rule[:3])
    stop = size if count is None else (first + count) * block
    seen[: first * block], seen[stop:] = False, False
    covered = np.zeros(seen.shape, int)
    for i, j, marks in zip(walk.queries, walk.keys, walk.marks, strict=True):
        part = np.s_[i * block : (i + 1) * block, j * block : (j + 1) * block]
        covered[part] += 1
        assert seen[part].any()
        assert marks & schedule.CUT or seen[part][: rule.length - i * block].all()
    assert covered.max() == 1 and (covered[seen] == 1).all()


@pytest.mark.parametrize("given", RULES)
@pytest.mark.parametrize("block", [8, 64])
def test_the_forward_walk_covers_what_is_visible(given, block):
    rule = rule_of(*given)
    walk = schedule.forward_walk(rule, block)
    assert_covers(rule, walk, block)
    assert (np.diff(walk.queries) >= 0).all()


@pytest.mark.parametrize("given", RULES)
@pytest.mark.parametrize("parts", [1, 3])
def test_the_backward_walk_keeps_open_queries_apart(given, parts):
    """Opened before use, closed after the last, and no two open blocks in one slot of the ring."""
    rule, block = rule_of(*given), 64
    blocks = -(-rule.length // block)
    each = -(-blocks // parts)
    for first in range(0, blocks, each):
        count = min(each, blocks - first)
        walk = schedule.backward_walk(rule, block, first, count)
        assert_covers(rule, walk, block, first, count)
        assert (np.diff(walk.keys) >= 0).all()
        slots, closed = {}, []
        for n, (i, marks) in enumerate(zip(walk.queries, walk.marks, strict=True)):
            slot = (i - first) % walk.ring
            if marks & schedule.OPENS:
                assert slot not in slots and walk.opened[n] == i
                slots[slot] = i
            assert slots[slot] == i
            if marks & schedule.CLOSES:
                assert walk.closed[n] == i
                closed.append(slots.pop(slot))
        assert not slots and sorted(closed) == list(range(first, first + count))


def test_a_window_bounds_the_open_queries():
    walk = schedule.backward_walk(rule_of(32768, True, 1024), 512, 0, 64)
    # Three blocks of queries see a block of keys; the first is done before the third begins.
    assert walk.ring == 2


def draw(length, heads, groups, dim, names):
    rng = np.random.default_rng(0)
    shapes = {"q": (1, length, heads, dim), "k": (1, length, groups, dim)}
    given = {n: rng.normal(size=s) for n, s in (shapes | {"v": shapes["k"]}).items()}
    if "sinks" in names:
        given["sinks"] = rng.normal(size=heads)
    if "log_forget" in names:
        given["log_forget"] = rng.choice([-30.0, -1e-4], size=(1, length, heads))
    return {n: jnp.asarray(x, np.float32) for n, x in given.items()}


def value_and_slopes(given, **options):
    def run(given):
        out, pullback = jax.vjp(lambda arrays: attention(**arrays, **options), given)
        cotangent = np.random.default_rng(7).normal(size=out.shape)
        return {"out": out} | pullback(jnp.asarray(cotangent, out.dtype))[0]

    return jax.tree.map(np.asarray, jax.jit(run)(given))


def assert_matches_reference(given, **options):
    with setting.interpreting():
        found = value_and_slopes(given, **options, impl="pallas_tpu")
    with jax.enable_x64(True):
        wide = {n: jnp.asarray(np.asarray(x), np.float64) for n, x in given.items()}
        expected = value_and_slopes(wide, **options, impl="ref")
    for name in expected:
        assert_close(found[name], expected[name], "float32", name)


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (("sinks", "log_forget"), {}),
        ((), {"window": 100}),
        ((), {"causal": False}),
    ],
)
def test_queries_split_over_several_calls(names, options, monkeypatch):
    monkeypatch.setattr(pallas_tpu, "room", lambda: pallas_tpu.Room(128, 512, 1 << 16))
    assert_matches_reference(draw(300, 4, 2, 16, names), **options)


def test_programs_of_some_heads():
    assert_matches_reference(draw(300, 8, 2, 64, ()))


@pytest.mark.parametrize("causal", [True, False])
def test_documents_that_hide_whole_pairs_of_blocks(causal, monkeypatch):
    monkeypatch.setattr(pallas_tpu, "room", lambda: pallas_tpu.Room(32, 512, 32 << 20))
    rows = np.repeat([[1, 0, 2, 1, 0]], [100, 40, 70, 60, 30], axis=1)
    segments = jnp.asarray(rows, jnp.int32)
    assert_matches_reference(draw(300, 4, 2, 16, ("sinks",)), segments=segments, causal=causal)


def test_costs_of_launches_are_the_formulas():
    """Four blocks: 10 pairs, in whose order the side that moves changes its block 8 times."""
    length, heads, dim, block, pairs, runs = 2048, 4, 128, 512, 10, 9
    given = {n: jnp.zeros((1, length, heads, dim), jnp.bfloat16) for n in "qkv"}
    forward, backward = costs(attention, given)
    assert forward.flops == pairs * heads * 2 * block**2 * (dim + dim)
    assert backward.flops == pairs * heads * 2 * block**2 * (3 * dim + 2 * dim)
    tokens, stats = 2 * block * heads * dim, 4 * block * 2 * heads
    assert forward.bytes_accessed == tokens * (4 + 2 * runs + 4) + 4 * stats  # q; k, v; o
    # q and do move; k, v, o and the three gradients are copied once
    assert backward.bytes_accessed == tokens * (2 * runs + 6 * 4) + runs * stats


def test_float64_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(setting, "interpreter", lambda: None)
    with jax.enable_x64(True):
        given = {n: jnp.zeros((1, 8, 2, 8), np.float64) for n in "qkv"}
        with pytest.raises(ValueError) as error:
            pallas_tpu.attention(**given)
    assert "attention as pallas_tpu is given float64; it takes float32" in str(error.value)
    assert "\n" not in str(error.value)
