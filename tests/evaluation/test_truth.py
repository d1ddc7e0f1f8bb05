"""What the ruler says against what is there: states, memory, times, and numbers that nobody has."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from configs.schema import Data, Experiment
from evaluation import curves, measure, rows, speed
from evaluation.subject import DECODED, Subject
from models import lm
from models import pattern as patterns
from report import table
from report.report import Report
from resources.row import Row
from tests.evaluation.test_measure import OPTIONS

ROOT = Path(__file__).parents[2]
FAMILIES = ("softmax", "gla", "gated_deltanet", "mamba2", "rg_lru", "hyena")
FIRST = ("softmax", "rg_lru", "hyena")  # of the gate: keys and values, a line, inputs of filters


def subject_of(pattern: str, *, length: int = 32, batch: int = 2, depth: int = 2) -> Subject:
    """A tiny model of a pattern in the notation of `models.pattern`."""
    model = lm.Config(width=32, depth=depth, pattern=patterns.parse(pattern), vocabulary=64)
    experiment = Experiment(model, steps=10, data=Data(length=length, batch=batch))
    return Subject(pattern, experiment, devices=jax.devices()[:1])


@pytest.mark.parametrize(
    "name", [n if n in FIRST else pytest.param(n, marks=pytest.mark.long) for n in FAMILIES]
)
def test_state_bytes_are_those_that_decoding_carries(name):
    """After prompts of 224 tokens there is room for 32 more: 256, the curve's first point."""
    batch = 2
    subject = subject_of(name, length=256 - DECODED, batch=batch)
    writer = subject.writer
    _, state = writer.prefill.program(writer.weights, subject.batch["inputs"])
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert held / batch == rows.state_bytes(subject, 256)
    assert held / batch == curves.state(subject).rows[0].value


def state_curve(pattern: str) -> list[float]:
    """Bytes at 256, 1,024, 4,096 ... tokens."""
    found = curves.state(subject_of(pattern))
    assert list(found.at) == [256 * 4**i for i in range(7)]
    return [row.value or 0 for row in found.rows]


def test_the_state_of_a_window_stops_growing_at_the_window():
    full, window = state_curve("softmax"), state_curve("window:4096")
    assert window[:3] == full[:3]
    assert window[3:] == [window[2]] * 4
    between = state_curve("window:2048")
    assert full[1] < between[2] < full[2] and between[3:] == [between[2]] * 4


# resources/test_models.py::test_only_unbounded_attention_grows_with_its_context is of all of them
FLAT = [pytest.param(name, marks=[pytest.mark.long] * (name != "gla")) for name in FAMILIES[1:5]]


@pytest.mark.parametrize("name", FLAT)
def test_the_state_of_a_recurrence_is_flat_over_its_context(name):
    assert len(set(state_curve(name))) == 1


def test_the_state_of_attention_is_a_line_over_its_context():
    sizes, full = curves.CONTEXT, state_curve("softmax")
    slopes = {(full[i] - full[0]) / (sizes[i] - sizes[0]) for i in range(1, len(sizes))}
    keys_and_values, place = 2 * 32 * 2, 4  # of bfloat16; the position of the slot's token
    assert slopes == {2 * (keys_and_values + place)}
    hybrid = state_curve("rg_lru,softmax")
    assert hybrid[-1] - hybrid[0] == (full[-1] - full[0]) / 2


PEAK = """
import json, sys

import jax
import jax.numpy as jnp

from configs.schema import Data, Experiment
from models import lm, pattern
from resources import memory
from evaluation import rows
from evaluation.subject import Subject

name, planted = sys.argv[1], int(sys.argv[2])  # a pattern of layers, bytes
model = lm.Config(width=256, depth=4, pattern=pattern.parse(name), dtype="float32")
subject = Subject(name, Experiment(model, data=Data(length=512, batch=8)))
step = subject.trainer.step


def longer(state, batch):
    # Written before the step, which waits for it, and read at a place that its gradient chooses.
    start = jnp.ones(1_000_000) * state.step
    count = planted // start.nbytes
    buffer = jax.lax.scan(lambda x, _: (1.01 * x + 1, x), start, length=count)[1]
    more = jnp.where(buffer[-1, -1] > 1e30, 1, 0)
    state, metrics = step(state, batch | {"inputs": batch["inputs"] + more})
    at = jnp.where(metrics["grad_norm"] > 1e30, 1, 0)
    return state, metrics | {"planted": buffer[at, at]}


if planted:
    subject.trainer = subject.trainer._replace(step=jax.jit(longer, donate_argnums=0))
planned = memory.program_bytes(subject.train.program)
beyond = planned.temporaries + planned.outputs - planned.aliased
print(json.dumps([beyond, rows.peak(subject).value]))
"""


def peaks(name: str, planted: int = 0) -> tuple[int, int]:
    """(bytes planned beyond the arguments, bytes by which a fresh process grew) in one step."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, name, str(planted)],
        cwd=ROOT,
        env={"PATH": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
        check=True,
    )
    planned, grown = json.loads(done.stdout.splitlines()[-1])
    return planned, grown


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems count no peak")


@on_linux
@pytest.mark.long
@pytest.mark.parametrize(
    "name", ["softmax", "gla", "gated_deltanet", "mamba2", "rg_lru", "dropless"]
)
def test_planned_memory_is_what_a_process_takes(name):
    planned, grown = peaks(name)
    assert planned > 500e6  # beside which the 10 to 50 MB of the runtime are small
    assert grown == pytest.approx(planned, rel=0.1)


@on_linux
@pytest.mark.long
def test_a_planted_buffer_is_seen_by_both_counts():
    planted = 200_000_000
    before, after = peaks("softmax"), peaks("softmax", planted)
    rises = [b - a for a, b in zip(before, after, strict=True)]
    assert rises == pytest.approx([planted, planted], rel=0.1)


TRIES, NEEDED = 20, 19


@pytest.mark.long
def test_equal_configs_differ_seldom_and_a_slower_one_is_found():
    """Three in turn, twenty times over: a config, its equal, and one of twice its depth."""
    sizes = {"length": 128, "batch": 4}
    three = [subject_of("gla", depth=depth, **sizes) for depth in (2, 2, 4)]
    equal, slower = [], []
    for _ in range(TRIES):
        contests = speed.contests(three, "train", speed.timed(three, "train", seconds=5.0))
        for one in contests:
            low, high = one.interval or (0, 2)  # a word of speed only where 1 lies outside
            words = [word in one.verdict for word in ("faster", "slower")]
            assert words == [low > 1, high < 1]
        equal.append(contests[0].verdict.startswith("no difference seen"))
        slower.append("slower" in contests[1].verdict)
    print([contest.verdict for contest in contests])
    assert sum(equal) >= NEEDED, equal
    assert sum(slower) >= NEEDED, slower


NO_COUNTER = "this processor shows no energy counter (RAPL) to this system"


@pytest.fixture(scope="module")
def bare():
    """One subject, whose programs serve several reports."""
    return subject_of("softmax")


def stated(subject: Subject, monkeypatch, **given: float) -> Report:
    """Its report on a machine without a counter of energy."""
    monkeypatch.setattr(measure.energy, "meter", lambda: NO_COUNTER)
    options = OPTIONS | dict(watts=0.0, price=0.0, profile=0) | given
    return measure.measure([subject], ["energy", "money"], options)


def lines_of(report: Report) -> dict[str, list[Row]]:
    return {name: list(rows) for name, rows in report.columns[0].resources.items()}


def test_nothing_is_invented_where_nothing_is_counted_or_stated(bare, monkeypatch):
    report = stated(bare, monkeypatch)
    found = lines_of(report)
    assert {row.value for rows in found.values() for row in rows} == {None}
    for resource, option in (("energy", "--watts=WATTS"), ("money", "--price=DOLLARS")):
        assert len(found[resource]) >= 5
        for row in found[resource]:
            assert option in row.note, row.name
            assert table.cell(row) == "not available"
    assert all(NO_COUNTER in row.note for row in found["energy"])


def test_what_is_stated_is_modelled_and_says_from_what(bare, monkeypatch):
    report = stated(bare, monkeypatch, watts=65.0, price=0.5)
    for resource, source in (("energy", "65 W"), ("money", "0.5 $ a device-hour")):
        found = [row for row in lines_of(report)[resource] if row.value is not None]
        assert len(found) >= 5
        assert {row.provenance for row in found} == {"modelled"}
        for row in found:
            assert source in row.note or " x " in row.note or " / " in row.note, row.name
            assert table.cell(row).endswith(" f")
    left = {row.name for rows in lines_of(report).values() for row in rows if row.value is None}
    assert left == {*(f"{k} energy, spread" for k in speed.KINDS), "training cost to a loss"}
