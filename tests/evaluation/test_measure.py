"""Every architecture yields all five resources, and options that are wrong one line."""

import dataclasses
import functools
import itertools
import json
import re

import jax
import jsonschema
import pytest
from flax import nnx

from configs import loading, schema
from configs.schema import Data, Experiment, Mesh
from evaluation import curves, front, groups, measure, rows, speed
from evaluation.subject import Subject
from models import catalogue, lm
from models.channel import glu
from report import table
from report.report import RESOURCES, Column
from resources import compute, energy, scaling
from resources.row import Row, not_available
from tests.report.test_report import SCHEMA

OPTIONS = {
    "workdir": "",
    "sized": "",
    "curves": "",
    "seconds": 0.05,
    "peak_seconds": 0.0,
    "loss": 0.0,
    "watts": 65.0,
    "price": 0.5,
    "pue": 0.0,
    "grid": 0.0,
    "devices": "",
    "profile": 3,
    "pareto": "",
    "match": "",
    "column": -1,
}
NEEDED = {  # what may not be missing, by resource
    "compute": ("parameters, total", "train FLOPs, executed", "train throughput"),
    "memory": ("train memory, peak", "weights on disk"),
    "energy": ("train energy", "training run emissions"),
    "money": ("train cost", "training cost a parameter"),
    "network": ("train network, all",),
}
WRITERS = {
    "compute": "decode throughput",
    "memory": "state at 64k tokens",
    "energy": "decode energy",
}


def subject_of(config) -> Subject:
    """A tiny model of one variant."""
    model = lm.Config(width=32, depth=2, pattern=(config,), vocabulary=64)
    try:
        nnx.eval_shape(lambda: model.build(nnx.Rngs(0)))
    except ValueError:  # bidirectional
        model = dataclasses.replace(model, objective="masked")
    data = Data(length=32, batch=8)
    return Subject("x", Experiment(model, steps=10, data=data), devices=jax.devices()[:1])


def all_of(config) -> None:
    """Measure it, and find every number that a report must have."""
    subject = subject_of(config)
    chosen = [name for name in groups.GROUPS if name not in ("peak", "latency")]
    found = measure.measure([subject], chosen, OPTIONS)
    jsonschema.validate(json.loads(json.dumps(found.as_json())), SCHEMA)
    (column,) = found.columns
    assert tuple(column.resources) == RESOURCES
    for resource, names in NEEDED.items():
        wanted = names + ((WRITERS[resource],) if subject.causal and resource in WRITERS else ())
        rows = {row.name: row for row in column.resources[resource]}
        missing = [name for name in wanted if name not in rows or rows[name].provenance is None]
        # The causal synthesizer has scores for 512 tokens, and its state no room for more.
        missing = [name for name in missing if "positions that have scores" not in rows[name].note]
        assert not missing, (resource, missing)
    assert len(column.profile) == 3 and all(hot.seconds > 0 for hot in column.profile)


@pytest.mark.parametrize(
    "name",
    [
        # test_eval.py::test_every_row_is_there_with_its_provenance is of attention, too
        pytest.param("attention.softmax", marks=pytest.mark.long),
        "attention.bidirectional",
        "state_space.mamba2",
    ],
)
def test_attention_an_encoder_and_a_state_yield_all_resources(name):
    all_of(catalogue.cases()[name])


@pytest.mark.long
@pytest.mark.parametrize("name", catalogue.cases())
def test_every_variant_yields_all_resources(name):
    all_of(catalogue.cases()[name])


@pytest.mark.parametrize("programs", ["of one", pytest.param("of both", marks=pytest.mark.long)])
def test_curves_exponents_and_crossovers(programs):
    pair = [subject_of(catalogue.cases()[name]) for name in ("attention.softmax", "recurrent.gru")]
    for name, one in zip("ab", pair, strict=True):
        one.name = name
    if programs == "of one":  # nothing below compares their times: b's sizes are those of a
        pair[0].at = pair[1].at = functools.cache(pair[0].at)
    options = OPTIONS | {"curves": "length:8,16,32"}
    found = measure.measure(pair, ["parameters", "memory"], options)
    jsonschema.validate(json.loads(json.dumps(found.as_json())), SCHEMA)
    drawn = {curve.name: curve for curve in found.columns[0].curves}
    assert set(drawn) == {"train call", "prefill call", "decode token", "train memory", "state"}
    assert drawn["train call"].at == [8, 16, 32]
    state = [row.value for row in drawn["state"].rows]
    assert state == sorted(state) and state[-1] > 100 * state[0]  # keys and values of all tokens
    assert found.columns[1].curves[-1].rows[0] == found.columns[1].curves[-1].rows[-1]
    exponent = found.columns[0].row("train memory, exponent over length")
    fit = scaling.exponent((8, 16, 32), [row.value for row in drawn["train memory"].rows], 0.99)
    assert 0 < fit.exponent < 2
    assert exponent == curves.exponent_row(exponent.name, (8, 16, 32), fit)
    assert {c.kind for c in found.crossovers} == {"train", "prefill", "decode", "train memory"}


def test_a_planted_crossover_is_found_and_says_why(monkeypatch):
    """b's times are made linear in the length where a's are quadratic: they meet at 128."""
    monkeypatch.setattr(speed, "KINDS", {"train": speed.training})
    model = lm.Config(width=32, depth=2, pattern=(glu.Config(),), dtype="float32")
    deeper = dataclasses.replace(model, depth=4)
    data = Data(length=32, batch=2)
    one = jax.devices()[:1]
    pair = [
        Subject(name, Experiment(model, data=data), devices=one)
        for name, model in (("a", model), ("b", deeper))
    ]
    swept = curves.Swept(pair, "length", [64, 160, 256], 0.05)
    assert {c.verdict for c in swept.crossovers() if c.kind == "train memory"} == {
        "a is better everywhere: b never within the range"
    }
    for size, row in zip(swept.sizes, swept.timed["train"], strict=True):
        noise = [1.001**i for i in range(-6, 7)]
        for i, power in enumerate((2, 1)):
            seconds = tuple(size**power * 128 ** (2 - power) * e ** (1 - 2 * i) for e in noise)
            row[i] = row[i]._replace(timing=dataclasses.replace(row[i].timing, seconds=seconds))
    found = {c.kind: c for c in swept.crossovers()}["train"]
    assert found.at == pytest.approx(128, rel=0.01) and found.interval[0] < 128 < found.interval[1]
    number = r"(\d+\.\d\d) x"
    said = re.fullmatch(
        f"at length 160 b executes {number} the FLOPs of a and moves {number} its bytes; "
        r"(both are bound by (compute|memory)|it is bound by \w+, a by (compute|memory))",
        found.why,
    )
    assert said and 1.3 < float(said[1]) < 2 and 1.3 < float(said[2]) < 2  # of twice the depth
    assert found.why in table.told(found)


TRAINING, ALL = ("train",), tuple(speed.KINDS)


@pytest.mark.parametrize("kinds", [TRAINING, pytest.param(ALL, marks=pytest.mark.long)])
def test_a_meter_is_read_only_for_energy(monkeypatch, kinds):
    readings = itertools.count(2)
    meter = energy.Meter("fake", 0.001, (energy.Counter(lambda: 2 * next(readings), 1.0),))
    monkeypatch.setattr(energy, "meter", lambda: meter)
    monkeypatch.setattr(energy, "measure", functools.partial(energy.measure, windows=1))
    monkeypatch.setattr(speed, "KINDS", {kind: speed.KINDS[kind] for kind in kinds})
    subject = subject_of(glu.Config())
    measure.measure([subject], ["speed"], OPTIONS)
    assert next(readings) == 2
    found = measure.measure([subject], ["energy"], OPTIONS).columns[0].resources["energy"]
    (idle,) = (row for row in found if row.name == "idle power")
    assert idle.provenance == "measured" and 0 < idle.value <= 1  # 2 J in two seconds
    for kind in kinds:
        assert next(r for r in found if r.name == f"{kind} energy").provenance == "measured"


@pytest.mark.parametrize(
    "text", ["length", "size:1,2,3", "length:1,2", "length:0,1,2", "length:1,a"]
)
def test_a_wrong_list_of_curves_is_one_line(text):
    with pytest.raises(ValueError, match=f"^--curves={text}: "):
        curves.parse(text)
    assert curves.parse("length:4,2,8;batch:1,2,3") == [("length", [2, 4, 8]), ("batch", [1, 2, 3])]


def column(name: str, **values: float | None) -> Column:
    units = {"speed": "tok/s", "state": "B"}
    lines = [
        Row(name, value, units[name], "compiled")
        if value is not None
        else not_available(name, units[name], "why")
        for name, value in values.items()
    ]
    return Column(name, "", {"compute": lines})


def test_pareto_ranks_take_the_sense_of_each_unit():
    columns = [
        column("fast", speed=100.0, state=1000.0),
        column("small", speed=10.0, state=10.0),
        column("neither", speed=10.0, state=1000.0),
        column("gap", speed=None, state=5.0),
    ]
    rows = front.ranks(columns, ["speed", "state"])
    assert [row.value for row in rows] == [1, 1, 2, None]
    assert "speed, higher is better; state, lower is better; hypervolume 0" in rows[0].note
    best = column("best", speed=100.0, state=10.0)
    assert front.ranks([*columns, best], ["speed", "state"])[0].value == 2
    assert "hypervolume 2" in front.ranks([*columns, best], ["speed", "state"])[0].note  # 1 x 2
    with pytest.raises(ValueError, match="no row is named 'sped' .did you mean 'speed'"):
        front.ranks(columns, ["sped"])


def test_a_mesh_sends_bytes_and_one_sequence_runs_on_a_part_of_it():
    model = lm.Config(width=32, depth=2, vocabulary=64)
    data = Data(length=32, batch=8)
    subject = Subject("x", Experiment(model, data=data, mesh=Mesh(data=2, fsdp=2, tensor=2)))
    found = measure.measure([subject], ["latency", "network"], OPTIONS | {"profile": 0})
    rows = {row.name: row for row in found.columns[0].rows}
    assert rows["train network, all"].value > 0
    over = {name.rpartition(" over ")[2] for name in rows if " over " in name}
    assert {"tensor", "fsdp"} <= {axis for axes in over for axis in axes.split("+")}
    assert rows["train network, share of the call"].note == "no link speed is known for 'cpu'"
    assert rows["time per output token, median"].value > 0
    assert subject.alone().mesh.size == 2


def test_configs_are_sized_to_the_first_and_one_column_is_measured_alone():
    pair = [subject_of(catalogue.cases()[name]) for name in ("attention.softmax", "recurrent.gru")]
    options = OPTIONS | {"match": "parameters", "column": 1, "profile": 0}
    found = measure.measure(pair, ["parameters"], options)
    (column,) = found.columns
    total = column.row("parameters, total").value
    wanted = rows.parameters(pair[0])[0].value
    assert abs(total / wanted - 1) <= 0.01
    assert len(found.notes) == 2 and "hidden by its rule ->" in found.notes[1]
    with pytest.raises(ValueError, match=r"--column=2 must be -1 \(all\) to 1"):
        measure.measure(pair, ["parameters"], options | {"column": 2})


def test_an_exponent_that_tells_nothing_is_no_number():
    sizes = (8, 16, 32)
    noisy = curves.exponent_row("x", sizes, scaling.exponent(sizes, [1.0, 9.0, 2.0]))
    assert noisy.value is None and noisy.note.startswith("3 sizes leave it within -")
    sure = curves.exponent_row("x", sizes, scaling.exponent(sizes, [1.0, 2.0, 4.0]))
    assert sure.value == pytest.approx(1.0)


def test_a_noisy_machine_is_said():
    assert compute.Peak(1e9, 1.05).note == ""
    assert "noisy machine: the median call took 1.50 x" in compute.Peak(1e9, 1.5).note


def test_sized_configs_are_written_for_training(tmp_path):
    pair = [subject_of(catalogue.cases()[name]) for name in ("attention.softmax", "recurrent.gru")]
    for subject in pair:
        subject.name = "configs/same.py:word"
    options = OPTIONS | {"match": "parameters", "sized": str(tmp_path / "sized"), "profile": 0}
    found = measure.measure(pair, ["parameters"], options)
    files = [tmp_path / "sized" / name for name in ("same.json", "same_2.json")]
    for subject, file in zip(pair, files, strict=True):
        (read,), _ = loading.parse([f"--config={file}", "--config.steps=700"], {})
        sized = schema.to_dict(subject.experiment) | {"steps": 700}
        assert schema.to_dict(read) == sized
    assert any(note.endswith(f"python train.py --config={files[1]}") for note in found.notes)


def test_what_cannot_be_matched_is_named():
    pair = [subject_of(catalogue.cases()[name]) for name in ("attention.softmax", "recurrent.gru")]
    pair[1].name = "second.py"
    pair[1].experiment = dataclasses.replace(
        pair[1].experiment, model=dataclasses.replace(pair[1].experiment.model, depth=0)
    )
    with pytest.raises(ValueError, match="^second.py cannot be matched: model.depth=0 must be"):
        measure.measure(pair, ["parameters"], OPTIONS | {"match": "parameters"})


def test_the_same_money_buys_steps_by_their_seconds(monkeypatch):
    monkeypatch.setattr(speed, "KINDS", {"train": speed.training})  # what a run's steps are
    pair = [subject_of(catalogue.cases()[name]) for name in ("attention.softmax", "recurrent.gru")]
    for subject in pair:
        subject.experiment = dataclasses.replace(subject.experiment, steps=1000)
    found = measure.measure(pair, ["money"], OPTIONS | {"match": "dollars", "profile": 0})
    cost = [column.row("training run cost").value for column in found.columns]
    assert cost[1] == pytest.approx(cost[0], rel=0.01)
    assert found.notes[0].endswith("steps 1000 -> 1000")
    assert pair[1].experiment.steps != 1000
