"""What the text of a compiled program says: lines of Python, and trips of its loops."""

import jax
import jax.numpy as jnp
import pytest

from programs import hlo
from tests.programs.texts import LOOP, PROGRAM


def test_lines_of_python_by_frame_and_by_name():
    found, _ = hlo.computations(PROGRAM)
    frames = hlo.sources(PROGRAM)
    where = {name: hlo.source(line, frames) for name, line in found["main"].items()}
    assert where["first"] == "models/head.py:7 Head.__call__.run"
    assert (where["square"], where["sum"]) == ("a/b.py:3", "")


def trips(text: str) -> int | None:
    """Of the only loop of a program."""
    found, _ = hlo.computations(text)
    pairs = [(lines, line) for lines in found.values() for line in lines.values()]
    ((lines, line),) = (pair for pair in pairs if pair[1].operation == "while")
    return hlo.trips(found, lines, line)


@pytest.mark.parametrize(("step", "runs"), [(1, 8), (2, 4), (3, 3)])
def test_trips_follow_the_counters_step(step, runs):
    assert trips(LOOP.replace("%one = s32[] constant(1)", f"%one = s32[] constant({step})")) == runs


@pytest.mark.parametrize(("start", "runs"), [(1, 7), (5, 3), (8, 0), (9, 0)])
def test_trips_follow_the_counters_start(start, runs):
    assert (
        trips(LOOP.replace("%start = s32[] constant(0)", f"%start = s32[] constant({start})"))
        == runs
    )


def test_trips_are_first_of_all_what_the_program_says():
    said = ', body=%body, backend_config={"known_trip_count":{"n":"3"}}'
    assert trips(LOOP.replace(", body=%body", said)) == 3


def test_a_condition_of_another_kind_leaves_trips_open():
    assert trips(LOOP.replace("direction=LT", "direction=NE")) is None


@pytest.mark.parametrize("length", [1, 4, 9])
def test_trips_of_a_scan_and_of_its_gradient(length):
    """As this compiler writes them, with what it says of them and without."""
    layers = lambda x: jax.lax.scan(lambda x, _: (jnp.sin(x @ x), None), x, length=length)[0].sum()
    text = jax.jit(jax.grad(layers)).lower(jnp.ones((8, 8))).compile().as_text()
    for program in (text, text.replace("known_trip_count", "unsaid")):
        found, entry = hlo.computations(program)
        notes: set[str] = set()
        times = [n for name, n in hlo.runs(found, entry, 1, notes) if name != entry]
        assert not notes and (length == 1 or times.count(length) >= 2)
