"""Seconds: of a call, of several side by side, and of compiling."""

import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.extend import core

from resources import intervals
from resources.row import Row, not_available

CACHED = "read from the compile cache; --compile_cache=false compiles"


@dataclasses.dataclass(frozen=True)
class Timing:
    """Wall-clock seconds of repeated calls, results ready, on the named device."""

    seconds: tuple[float, ...]
    device: str

    @property
    def median(self) -> float:
        """Half of the calls were faster."""
        return statistics.median(self.seconds)

    @property
    def p95(self) -> float:
        """The smallest time that at least 95 of 100 calls did not exceed."""
        ordered = sorted(self.seconds)
        return ordered[-(-95 * len(ordered) // 100) - 1]

    @property
    def interval(self) -> tuple[float, float] | None:
        """Where the median lies with 99 % confidence; None for fewer than 8 calls."""
        return intervals.median_interval(self.seconds)


class Compiled(NamedTuple):
    """A program, the jaxpr that it was compiled from, and the seconds from tracing to the end."""

    program: Any
    jaxpr: core.ClosedJaxpr
    seconds: float | None  # None: it was read from a cache


def device_name() -> str:
    """The first device's kind and the number of devices, as "cpu" or "4 x NVIDIA H100"."""
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind}" if devices[1:] else devices[0].device_kind


def compile_timed(jitted: Any, *args: Any, reads: Callable[[], float] = lambda: 0) -> Compiled:
    """Compile a jitted function for arguments (arrays or shapes); nothing runs.

    `reads()` counts the programs that were read from a cache so far.
    """
    start = time.perf_counter()
    traced = jitted.trace(*args)
    lowered = traced.lower()
    before = reads()
    program = lowered.compile()
    seconds = time.perf_counter() - start if reads() == before else None
    return Compiled(program, traced.jaxpr, seconds)


def time_call(fn: Callable, *args: Any, warmup: int = 2, repeats: int = 10) -> Timing:
    """Time `fn(*args)`; the warm-up calls, the first of which may compile, are not counted."""
    return interleaved({"": lambda: fn(*args)}, warmup=warmup, repeats=repeats)[""]


def interleaved(
    calls: Mapping[str, Callable[[], Any]], *, warmup: int = 2, repeats: int = 10
) -> dict[str, Timing]:
    """Time several calls in turn, each round in an order drawn by lot or in its reverse.

    So drift of the machine meets all alike, A B B A, and no two are neighbours every time. Only
    ratios of numbers from one such run mean anything on a machine that others use.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats={repeats} and warmup={warmup} must be at least 1 and 0.")
    for call in calls.values():
        for _ in range(warmup):
            jax.block_until_ready(call())
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order, lot = list(calls), random.Random(0)
    for i in range(repeats):
        if i % 2:
            order.reverse()
        else:
            lot.shuffle(order)
        for name in order:
            start = time.perf_counter()
            jax.block_until_ready(calls[name]())
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(times), device_name()) for name, times in seconds.items()}


def rows(kind: str, timing: Timing, tokens: int, compile_seconds: float | None) -> list[Row]:
    """Rows of one kind of call that works on `tokens` tokens."""
    low, high = timing.interval or (None, None)
    per_second = None if low is None or high is None else (tokens / high, tokens / low)
    rate = tokens / timing.median
    return [
        Row(f"{kind} throughput", rate, "tok/s", "measured", interval=per_second),
        *latency_rows(f"{kind} call", timing),
        not_available(f"{kind} compile", "s", CACHED)
        if compile_seconds is None
        else Row(f"{kind} compile", compile_seconds, "s", "measured"),
    ]


def latency_rows(name: str, timing: Timing, parts: int = 1) -> list[Row]:
    """Median and p95 of a call's seconds, over the `parts` equal things that it does."""
    interval = timing.interval and (timing.interval[0] / parts, timing.interval[1] / parts)
    note = f"{len(timing.seconds)} calls"
    return [
        Row(f"{name}, median", timing.median / parts, "s", "measured", interval=interval),
        Row(f"{name}, p95", timing.p95 / parts, "s", "measured", note),
    ]
