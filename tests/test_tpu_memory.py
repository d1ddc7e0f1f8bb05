"""TPU kernels under the simulator of memories and copies: races, bounds, memory never written.

The simulator runs the grid on two cores, fills scratch and edges with NaN, raises on reads beyond
an array, and reports unordered accesses. The planted faults prove that it catches each kind.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import setting, tpu
from tests import operations as generic
from tests.tolerance import assert_close

DETECTOR = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
LENGTH = 20
OPERATIONS = [operation for operation, impl in generic.CASES if impl == "pallas_tpu"]


@pytest.fixture(autouse=True)
def fresh_simulator():
    """An exception leaves the simulator's shared state behind."""
    yield
    pltpu.reset_tpu_interpret_mode_state()


def run(capfd, function) -> tuple[list[np.ndarray], str]:
    """Outputs and what the simulator reports: newer versions raise what older ones print."""
    try:
        with setting.interpreting(DETECTOR):
            found = [np.asarray(x) for x in jax.tree.leaves(jax.jit(function)())]
        text = ""
    except Exception as error:
        found, text = [], str(error)
    return found, text + capfd.readouterr().out


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_race_and_nothing_unwritten(operation, capfd):
    """Both passes of one packed case: the reference's numbers, and a silent simulator."""
    arguments = generic.draw(operation, LENGTH, "float32", seed=1)
    if generic.takes_segments(operation):
        rows = [generic.pack([9, -2, 7, 2], LENGTH, 3), generic.pack([-1, 12, 7], LENGTH, 2)]
        arguments["segments"] = np.asarray(rows, np.int32)
    variables, constants, settings = generic.split(operation, arguments)
    cotangents = generic.draw_cotangents(generic.output_shapes(operation, "ref", arguments), 0)
    both = generic.program(operation, "pallas_tpu", settings)
    found, report = run(capfd, lambda: both(variables, constants, cotangents))
    assert not report
    expected, slopes = generic.evaluate(operation, "ref", arguments, cotangents, wide=True)
    least = generic.negligible(operation, arguments, cotangents, expected)
    wanted = jax.tree.leaves((expected, slopes))
    floors = jax.tree.leaves(([0.0] * len(expected), {n: least[n] for n in slopes}))
    for position, (mine, want, floor) in enumerate(zip(found, wanted, floors, strict=True)):
        assert_close(mine, want, "float32", f"result {position}", floor)


BLOCK = pl.BlockSpec((8, 128), lambda i: (i, 0))
FIRST = pl.BlockSpec((8, 128), lambda i: (0, 0))


def launch(body, *, out=BLOCK, rows=32, scratch=(), ins=BLOCK, semantics="p"):
    x = jnp.ones((32, 128))
    kind = jax.ShapeDtypeStruct((rows, 128), x.dtype)
    (found,) = tpu.call(
        body,
        x,
        grid=(4,),
        ins=[ins],
        outs=[out],
        out_types=[kind],
        semantics=semantics,
        scratch=scratch,
    )
    return found


def test_two_cores_that_write_one_block_are_caught(capfd):
    def body(x_ref, o_ref):
        o_ref[...] += x_ref[...]

    _, report = run(capfd, lambda: launch(body, out=FIRST, rows=8))
    assert re.search("RACE DETECTED", report)


def test_a_copy_that_nothing_waits_for_is_caught(capfd):
    def body(x_ref, o_ref, scratch, semaphore):
        rows = pl.ds(pl.multiple_of(pl.program_id(0) * 8, 8), 8)
        copy = pltpu.make_async_copy(x_ref.at[rows], scratch, semaphore)
        copy.start()
        o_ref[...] = scratch[...]
        copy.wait()

    scratch = [pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA]
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    _, report = run(capfd, lambda: launch(body, ins=anywhere, scratch=scratch))
    assert re.search("RACE DETECTED", report)


def test_a_read_beyond_the_array_is_caught(capfd):
    def body(x_ref, o_ref):
        o_ref[...] = x_ref[pl.ds(pl.program_id(0) * 8, 8)]

    _, report = run(capfd, lambda: launch(body))
    assert re.search("out.of.bounds", report, re.IGNORECASE)


def test_scratch_that_was_never_written_is_caught(capfd):
    def body(x_ref, o_ref, scratch):
        o_ref[...] = x_ref[...] + scratch[...]

    found, _ = run(capfd, lambda: launch(body, scratch=[pltpu.VMEM((8, 128), jnp.float32)]))
    with pytest.raises(AssertionError):
        assert_close(found[0], np.ones((32, 128)), "float32", "output")
