"""Clocks: what is counted, in which order, and that results are waited for."""

import time

import jax
import jax.numpy as jnp
import pytest

from resources import throughput


def test_median_and_p95():
    timing = throughput.Timing(tuple(float(i) for i in range(20, 0, -1)), "cpu")
    assert (timing.median, timing.p95) == (10.5, 19.0)
    assert throughput.Timing((3.0,), "cpu").p95 == 3.0


def test_warm_up_is_not_counted_and_arguments_are_passed():
    seen = []
    timing = throughput.time_call(lambda a, b: seen.append((a, b)), 1, 2, warmup=3, repeats=4)
    assert seen == [(1, 2)] * 7
    assert len(timing.seconds) == 4
    assert timing.device == "8 x cpu"


def test_a_sleep_is_measured():
    timing = throughput.time_call(time.sleep, 0.02, warmup=0, repeats=3)
    assert 0.02 <= timing.median < 1.0


def test_results_are_waited_for():
    """Dispatch alone returns at once; the clock must see the work."""
    x = jnp.ones((600, 600))
    work = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda _, y: y @ x / 600, x))
    jax.block_until_ready(work(x))
    start = time.perf_counter()
    jax.block_until_ready(work(x))
    alone = time.perf_counter() - start
    assert throughput.time_call(work, x, warmup=1, repeats=5).p95 > alone / 5


def test_interleaved_draws_an_order_and_then_turns_it_around():
    seen = []
    calls = {name: (lambda name=name: seen.append(name)) for name in "ABC"}
    timings = throughput.interleaved(calls, warmup=0, repeats=41)
    rounds = ["".join(seen[i : i + 3]) for i in range(0, len(seen), 3)]
    assert all(sorted(one) == ["A", "B", "C"] for one in rounds)
    assert [one[::-1] for one in rounds[0:40:2]] == rounds[1:40:2]
    assert len(set(rounds)) == 6
    assert [len(timings[name].seconds) for name in "ABC"] == [41, 41, 41]


def test_compiling_is_timed_apart_and_runs_nothing():
    ran = []
    function = jax.jit(lambda x: jax.debug.callback(lambda: ran.append(1)) or x + 1)
    compiled = throughput.compile_timed(function, jax.ShapeDtypeStruct((3,), jnp.float32))
    assert compiled.seconds > 0 and not ran
    assert compiled.program(jnp.zeros(3)).tolist() == [1, 1, 1]


def test_no_repeats_is_refused():
    with pytest.raises(ValueError, match="repeats=0 and warmup=2 must be at least 1 and 0"):
        throughput.time_call(lambda: None, repeats=0)
