"""Bytes: of trees from their shapes, of compiled programs, and at the peak of a call that runs."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from programs import hlo
from programs.moved import touched
from resources import throughput
from resources.row import Row, not_available

_PEAK = "arguments + outputs - aliased + temporaries"
_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


@dataclasses.dataclass(frozen=True)
class Program:
    """Bytes of a compiled program on one device, as its compiler planned them."""

    arguments: int
    outputs: int
    aliased: int  # outputs written over arguments
    temporaries: int

    @property
    def peak(self) -> int:
        """Arguments + outputs - aliased + temporaries: at least what is ever live at once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries


def program_bytes(compiled: Any) -> Program | None:
    """What a compiled program plans to hold; None where the backend does not say.

    The compiler's own `peak_memory_in_bytes` is left aside: on CPU it leaves out the temporaries.
    """
    stats = compiled.memory_analysis()
    if stats is None:
        return None
    return Program(
        stats.argument_size_in_bytes,
        stats.output_size_in_bytes,
        stats.alias_size_in_bytes,
        stats.temp_size_in_bytes,
    )


def moved(program: str) -> float:
    """Bytes that the operations of a compiled program read and write in one run, on one device.

    Every operation's operands and results, loops as often as they run, fusions from outside: what
    memory would move if nothing stayed in a cache. `program` is the compiled program's text.
    """
    found, entry = hlo.computations(program)
    return math.fsum(
        times * touched(found, found[name], line)
        for name, times in hlo.runs(found, entry, 1, set())
        for line in found[name].values()
    )


@functools.cache
def copy_bandwidth(size: int = 2**28) -> float:
    """B/s, read and written, of one device that adds 1 to `size` bytes in place; best of ten."""
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros(size // 4, jnp.float32)

    def call():
        nonlocal x
        x = step(x)
        return x

    return 2 * size / min(throughput.time_call(call, warmup=2, repeats=10).seconds)


def tree_bytes(build: Callable[[], Any]) -> int:
    """Bytes of the arrays that `build()` would return, from their shapes: nothing is computed."""
    leaves = jax.tree.leaves(jax.eval_shape(build))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def device_peak() -> int | None:
    """Most bytes ever in use on the first device in this process; None without such a counter."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")


def resident_growth(call: Callable[[], Any]) -> int | None:
    """Most bytes by which this process grew during `call()`; None where the system cannot say.

    For devices without a counter. Call it in a fresh process, after compiling: memory that an
    earlier call has returned to the allocator is used again and does not show.
    """
    try:
        _RESET.write_text("5")  # sets the high-water mark back to what is resident now
        before = _resident("VmRSS")
        jax.block_until_ready(call())
        return max(0, _resident("VmHWM") - before)
    except OSError:
        return None


def _resident(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{_STATUS} has no {field}")
    return int(found[1]) * 1024


def rows(kind: str, compiled: Any) -> list[Row]:
    """What the compiler planned for one kind of call, on one device."""
    parts = ("arguments", "outputs", "aliased", "temporaries")
    planned = program_bytes(compiled)
    if planned is None:
        reason = "the compiler does not say"
        return [not_available(f"{kind} memory, {part}", "B", reason) for part in ("peak", *parts)]
    found = [Row(f"{kind} memory, {p}", getattr(planned, p), "B", "compiled") for p in parts]
    return [Row(f"{kind} memory, peak", planned.peak, "B", "modelled", _PEAK), *found]


def peak_row(kind: str, call: Callable[[], Any]) -> Row:
    """A fresh process's first call, measured by the device's counter or the process's growth."""
    name = f"{kind} memory, measured"
    grown = resident_growth(call)
    counted = device_peak()
    if counted is not None:
        return Row(name, counted, "B", "measured", "the device's counter, everything included")
    if grown is not None:
        return Row(name, grown, "B", "measured", "growth of the process; arguments come on top")
    return not_available(name, "B", "neither device nor system has a counter")
