"""What eval.py says of the weights of a run: validation, steps to a loss, likeness to another."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import schema
from data import tokenizers
from evaluation import quality
from evaluation.subject import Subject
from models import lm
from models.attention import bidirectional
from parallel import sharding
from tests.evaluation.process import program
from training import checkpoint, loop, runs

pytestmark = pytest.mark.xdist_group("eval")  # one worker: its fixture is a run


def run_of(folder: Path, model: lm.Config):
    """A run's folder with one checkpoint of random weights, its config and its plan."""
    for split in ("train", "validation", "test"):
        (folder / "text" / split).mkdir(parents=True)
        (folder / "text" / split / "a.txt").write_text(f"{split}: abcdefgh\n" * 200)
    experiment = schema.Experiment(
        model,
        data=schema.Data(
            source=f"text:{folder / 'text'}", length=16, batch=8, folder=str(folder / "cache")
        ),
    )
    plan = loop.make_plan(experiment)
    state = plan.trainer.init()
    saved = checkpoint.Checkpoints(folder / "run" / "checkpoints")
    described = runs.describe(plan.experiment, plan.train.tokenizer, plan.train.fingerprint)
    saved.save(3, state, described | {"metric": 0.0})
    saved.close()
    (folder / "run" / "config.json").write_text(json.dumps(schema.to_dict(plan.experiment)))
    with sharding.on(plan.mesh):
        expected = loop.evaluate(plan, state.params, experiment.evaluation.batches)
    return str(folder / "run"), experiment, expected


@pytest.fixture(scope="module", autouse=True)
def kept(programs_are_kept):
    """Most tests here validate the same model, each from programs of its own."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder, the config and the validation of a small model's run."""
    return run_of(tmp_path_factory.mktemp("trained"), lm.Config(width=16, depth=1))


def validated(experiment, workdir: str) -> list:
    subject = Subject("x", experiment)
    return quality.validation(subject, quality.load(subject, workdir))


def test_validation_reads_the_checkpoint(trained):
    workdir, experiment, expected = trained
    row, *others = validated(experiment, workdir)
    assert (row.value, row.unit, row.provenance) == (expected, "bit/byte", "measured")
    assert 6 < row.value < 10  # random weights
    assert row.note.startswith("step 3, ")
    assert all(6 < other.value < 10 and other.value != expected for other in others)
    assert len(others) == 3


def test_another_model_s_checkpoint_is_no_number(trained):
    workdir, experiment, _ = trained
    wider = dataclasses.replace(experiment, model=lm.Config(width=24, depth=1))
    row, *others = validated(wider, workdir)
    assert row.value is None and "was written with model.width 16, now 24" in row.note
    assert all(other.note == row.note for other in others)
    capped = dataclasses.replace(experiment, model=lm.Config(width=16, depth=1, softcap=30.0))
    row, *_ = validated(capped, workdir)
    assert row.value is None and "model.softcap 0.0, now 30.0." in row.note
    row, *_ = validated(experiment, workdir + "/elsewhere")
    assert row.value is None and row.note.startswith("no checkpoint in")


def test_another_corpus_is_said_and_another_tokenizer_is_no_number(trained, tmp_path):
    workdir, experiment, expected = trained
    for split in ("train", "validation", "test"):
        (tmp_path / "other" / split).mkdir(parents=True)
        (tmp_path / "other" / split / "a.txt").write_text(f"{split}: 1234567\n" * 200)
    data = dataclasses.replace(experiment.data, source=f"text:{tmp_path / 'other'}")
    row, *_ = validated(dataclasses.replace(experiment, data=data), workdir)
    assert row.value is not None and row.value != expected
    said = f"trained with data.source {experiment.data.source}, now {data.source}"
    assert row.note.endswith(said)
    tokenizers.train(experiment.data, 257, tmp_path / "as_many.json")  # ids in another order
    data = dataclasses.replace(experiment.data, tokenizer=f"bpe:{tmp_path / 'as_many.json'}")
    row, *_ = validated(dataclasses.replace(experiment, data=data), workdir)
    assert row.value is None and "with data.tokenizer bytes, now bpe:" in row.note


def test_the_other_layout_of_layers_reads_the_same_weights(trained):
    workdir, experiment, expected = trained
    model = dataclasses.replace(experiment.model, layers="unrolled", remat="blocks")
    row, *_ = validated(dataclasses.replace(experiment, model=model), workdir)
    assert row.value == pytest.approx(expected, rel=1e-6)


def test_a_run_is_measured_without_a_config(trained, tmp_path):
    workdir, _, expected = trained
    done = program(
        tmp_path, f"--workdir={workdir}", "--only=quality", f"--json={tmp_path / 'found.json'}"
    )
    assert done.returncode == 0, done.stderr
    (column,) = json.loads((tmp_path / "found.json").read_text())["columns"]
    (row,) = (row for row in column["resources"]["quality"] if row["name"] == "validation")
    assert column["config"] == "run" and row["value"] == pytest.approx(expected, rel=1e-5)
    done = program(tmp_path, f"--workdir={workdir}/elsewhere")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_the_steps_to_a_loss_are_those_of_the_run(trained, tmp_path):
    workdir, experiment, _ = trained
    found = quality.load(Subject("x", experiment), workdir)
    assert quality.steps_to("no run", 3.0) == "no run"
    found = found._replace(folder=tmp_path)
    assert quality.steps_to(found, 3.0) == f"no {tmp_path / 'metrics.jsonl'}"
    records = [{"step": 10, "loss": 1.0}]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert quality.steps_to(found, 3.0) == f"{file} holds no validation"
    values = {20: 4.0, 30: None, 40: 2.9, 50: 3.1, 60: 2.0}  # None: not finite
    records += [{"step": n, quality.BITS: bits} for n, bits in values.items()]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert [quality.steps_to(found, bits) for bits in (4.0, 3.0, 2.0, 1.0)] == [20, 40, 60, None]


def test_a_model_is_like_itself_and_less_like_another(trained):
    workdir, experiment, _ = trained
    subject = Subject("x", experiment)
    found = quality.load(subject, workdir)
    same = {row.name: row.value for row in quality.likeness(subject, subject, found, found)}
    assert same == {
        "compression ratio to the first": 1.0,
        "agreement with the first": 1.0,
        "KL from the first": 0.0,
        "KL to the first": 0.0,
        "loyalty to the first": 1.0,
    }
    noise = jax.tree.map(lambda leaf: leaf + 0.3 * jnp.sign(jnp.sin(leaf * 1e4)), found.params)
    other = quality.likeness(subject, subject, found._replace(params=noise), found)
    values = {row.name: row.value for row in other}
    assert values["agreement with the first"] < 0.9 and 0 < values["loyalty to the first"] < 0.99
    assert values["KL from the first"] > 0.01
    missing = quality.likeness(subject, subject, "no run", found)
    assert [row.note for row in missing[1:]] == ["no run"] * 4


def test_encoders_are_judged_where_tokens_are_hidden_from_them(tmp_path):
    """Likeness counts those places alone, noise keeps the tokens that are to be filled in there."""
    model = lm.Config(width=32, depth=1, pattern=(bidirectional.Config(),), objective="masked")
    workdir, experiment, expected = run_of(tmp_path, model)
    subject = Subject("x", experiment)
    found = quality.load(subject, workdir)
    assert not isinstance(found, str)
    row, *others = quality.validation(subject, found)
    assert row.value == expected and all(other.value is not None for other in others)
    batches = [found.plan.validation.batch(i) for i in range(experiment.evaluation.batches)]
    hidden = sum(batch["hidden"].sum() for batch in batches)
    like = quality.likeness(subject, subject, found, found)
    assert [row.value for row in like[1:]] == [1.0, 0.0, 0.0, 1.0]
    assert {row.note for row in like[1:]} == {f"{hidden} positions"}
    blind = found._replace(params=found.params | {"mask": -found.params["mask"]})
    assert quality.likeness(subject, subject, blind, found)[1].value < 1
    first, noisy = batches[0], quality._corrupted(found.plan).validation.batch(0)
    changed = first["inputs"] != noisy["inputs"]
    seen = (first["segments"] != 0) & ~first["hidden"]
    assert changed.sum() == round(0.1 * np.sum(seen))
    assert not changed[first["hidden"]].any()


def test_an_encoder_is_not_likened_to_a_language_model(trained):
    workdir, experiment, _ = trained
    subject = Subject("x", experiment)
    found = quality.load(subject, workdir)
    assert not isinstance(found, str)
    model = dataclasses.replace(found.plan.experiment.model, objective="masked")
    encoder = dataclasses.replace(found.plan.experiment, model=model)
    other = found._replace(plan=found.plan._replace(experiment=encoder))
    rows = quality.likeness(subject, subject, other, found)
    said = "one fills in hidden tokens, the other predicts the next"
    assert [row.note for row in rows[1:]] == [said] * 4
