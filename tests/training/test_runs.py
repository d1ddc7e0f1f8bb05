"""Runs that go on with other settings, that describe themselves, and folders that are no runs."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import loading, schema
from configs.schema import Checkpoint, Data, Evaluation, Experiment, Mesh, Optimizer
from data import tokenizers
from models import lm
from models.attention import softmax
from models.channel import glu
from parallel.mesh import make_mesh
from training import checkpoint, loop, manifest, runs
from training.optimizers import muon, schedule_free

STEPS = 4


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Two folders of text, and one with the same files as the first."""
    top = tmp_path_factory.mktemp("corpora")
    for name, word in (("one", "text"), ("two", "prose")):
        (top / name).mkdir()
        for i in range(40):
            (top / name / f"{i}.txt").write_text(f"a line of {word} {i} " * 20)
    shutil.copytree(top / "one", top / "twin")
    return top


@pytest.fixture(scope="module")
def given(corpora):
    """The experiment of every run here, with changes by key: {"data.batch": 2}."""
    plain = Experiment(
        model=lm.Config(
            width=16,
            depth=3,
            pattern=(softmax.Config(heads=2), glu.Config()),
            channel=None,
            dtype="float32",
        ),
        steps=STEPS,
        log_every=1,
        data=Data(f"text:{corpora / 'one'}", length=8, batch=4, folder=str(corpora)),
        optimizer=Optimizer(warmup_steps=1),
        checkpoint=Checkpoint(every_steps=2),
        evaluation=Evaluation(every_steps=0, batches=2),
    )

    def changed(**values):
        new = schema.from_dict(schema.to_dict(plain))
        for key, value in values.items():
            *sections, name = key.split("__")
            setattr(functools.reduce(getattr, sections, new), name, value)
        return schema.freeze(new)

    return changed


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """The mesh of runs here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def finished(given, tmp_path_factory):
    """A finished run's folder, never changed by a test, and its score."""
    folder = tmp_path_factory.mktemp("finished") / "x"
    return folder, loop.train(given(), str(folder), None).score


@pytest.fixture
def again(finished, given, tmp_path, capsys):
    """Go on with a copy of the finished run and changed settings: the result and what is said."""

    def go_on(**values):
        if not (tmp_path / "x").exists():
            shutil.copytree(finished[0], tmp_path / "x")
        capsys.readouterr()
        result = loop.train(given(**values), str(tmp_path / "x"), None)
        lines = capsys.readouterr().out.splitlines()
        return result, [line for line in lines if line.startswith("resume: ")]

    return go_on


def losses(result):
    lines = result.paths["metrics"].read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {r["step"]: r["loss"] for r in records if "loss" in r}


def test_how_it_is_trained_may_change_without_a_word(again, given, corpora, tmp_path, monkeypatch):
    steady = {"optimizer__schedule": "constant", "steps": 8}
    whole = losses(loop.train(given(**steady), str(tmp_path / "whole"), None))
    first = given(optimizer__schedule="constant", checkpoint__every_steps=0)
    loop.train(first, str(tmp_path / "x"), None)
    monkeypatch.setattr(loop, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:4]))
    how = {
        "model__layers": "unrolled",
        "model__remat": "blocks",
        "optimizer__accumulation": 2,
        "mesh": Mesh(data=2, fsdp=2),
        "log_every": 2,
        "checkpoint__every_steps": 3,
        "checkpoint__keep": 1,
        "evaluation__batches": 1,
        "guards__max_bad_steps": 9,
        "data__source": f"text:{corpora / 'twin'}",  # the same text
    }
    result, said = again(**steady, **how)
    assert said == ["resume: steps 4, now 8."]
    found = losses(result)
    assert set(found) == {1, 2, 3, 4, 6, 8}
    np.testing.assert_allclose([found[i] for i in found], [whole[i] for i in found], rtol=1e-4)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"model__width": 32}, "was written with model.width 16, now 32. Use another --workdir"),
        ({"model__softcap": 30.0, "model__depth": 2}, "model.depth 3, now 2; model.softcap 0.0,"),
        ({"model__pattern": (glu.Config(),)}, "model.pattern (softmax, glu), now (glu)."),
        ({"carry_state": True, "data__layout": "stream"}, "with carry_state False, now True."),
        ({"optimizer__rule": muon.Config()}, "with optimizer.rule adamw, now muon."),
        ({"optimizer__ema": 0.9}, "with optimizer.ema 0.0, now 0.9."),
        ({"data__source": "two"}, "with data.source text:"),
    ],
)
def test_what_is_trained_may_not_change(again, corpora, values, text):
    if "data__source" in values:
        values = {"data__source": f"text:{corpora / 'two'}"}
    with pytest.raises(ValueError, match="^the checkpoint of step 4 in [^\n]*$") as caught:
        again(**values)
    assert text in str(caught.value)


def test_wrong_settings_are_refused_before_the_corpus_is_opened(again, given, monkeypatch):
    def opened(*_):
        raise AssertionError("the corpus was opened")

    monkeypatch.setattr(loop, "open_split", opened)
    heads = {"model__pattern": (softmax.Config(heads=3), glu.Config())}
    for values, text in (
        ({"model__width": 32}, "model.width 16, now 32"),
        ({"mesh": Mesh(data=2)}, "does not divide 1 devices"),
        ({"model__vocabulary": 100}, "smaller than the tokenizer's"),
    ):
        with pytest.raises(ValueError, match=text):
            again(**values)
    with pytest.raises(ValueError, match="heads=3 does not divide"):
        loop.make_plan(given(**heads))


def test_another_tokenizer_of_as_many_ids_is_refused(given, corpora, tmp_path):
    specs = []
    for name in ("one", "two"):
        file = tmp_path / f"{name}.json"
        tokenizers.train(Data(f"text:{corpora / name}"), 264, file)
        specs.append(f"bpe:{file}")
    old, new = (given(data__tokenizer=spec, model__vocabulary=0) for spec in specs)
    assert loop.settled(old).model.vocabulary == loop.settled(new).model.vocabulary
    loop.train(old, str(tmp_path / "x"), None)
    with pytest.raises(ValueError, match="with data.tokenizer bpe:.*one.json, now bpe:.*two.json"):
        loop.train(new, str(tmp_path / "x"), None)
    moved = tmp_path / "moved.json"
    shutil.copy(tmp_path / "one.json", moved)
    same = given(data__tokenizer=f"bpe:{moved}", model__vocabulary=0)
    loop.train(same, str(tmp_path / "x"), None)  # its contents decide, not its name
    run = runs.load(tmp_path / "x")
    assert run.tokenizer.vocabulary == run.experiment.model.vocabulary
    shutil.copy(tmp_path / "two.json", tmp_path / "one.json")
    with pytest.raises(ValueError, match="one.json of other contents,"):
        loop.train(old, str(tmp_path / "x"), None)
    with pytest.raises(ValueError, match="one.json is not the one that"):
        _ = runs.load(tmp_path / "x").tokenizer


def test_other_rows_and_numbers_are_said_in_one_line(again):
    result, said = again(
        steps=6, data__batch=2, data__seed=1, seed=7, optimizer__learning_rate=1e-3
    )
    assert said == [
        "resume: changed since step 4: seed 0, now 7; data.batch 4, now 2; data.seed 0, now 1; "
        "optimizer.learning_rate 0.003, now 0.001. Rows are numbered anew: some come twice, others "
        "later or never.",
        "resume: the run had ended after 4 steps at a learning rate of 0.0001; with steps=6 it "
        "goes on at 0.000186 (cosine).",
    ]

    lines = result.paths["metrics"].read_text().splitlines()
    tokens = {record["step"]: record["tokens"] for record in map(json.loads, lines)}
    assert tokens == {1: 32, 2: 64, 3: 96, 4: 128, 5: 144, 6: 160}  # of 4 x 8, then of 2 x 8


def test_more_steps_after_a_finished_cosine(again):
    result, said = again(steps=8)
    assert result.finished and result.step == 8
    assert said == [
        "resume: the run had ended after 4 steps at a learning rate of 0.0003; with steps=8 it "
        "goes on at 0.00135 (cosine)."
    ]
    assert again(steps=8)[1] == []


def test_fewer_steps_than_the_checkpoint_has(again, finished):
    result, said = again(steps=3)
    assert said == [
        "resume: the checkpoint is of step 4, beyond steps=3: nothing is trained, it is validated "
        "as it is."
    ]
    assert (result.finished, result.step) == (True, 4)
    assert result.score == pytest.approx(finished[1], rel=1e-6)
    assert set(losses(result)) == {1, 2, 3, 4}


def test_a_finished_run_without_its_records_is_validated(again, tmp_path, finished):
    shutil.copytree(finished[0], tmp_path / "x")
    for name in ("metrics.jsonl", "config.json", "loss.png"):
        (tmp_path / "x" / name).unlink()
    result, said = again()
    assert said == [] and result.score == pytest.approx(finished[1], rel=1e-6)


def test_an_old_checkpoint_is_compared_by_what_it_says(again, finished, tmp_path):
    """Before configs and tokenizers were stored: config.json if it is there, else the prints."""
    shutil.copytree(finished[0], tmp_path / "x")
    folder = tmp_path / "x" / "checkpoints"
    for step in checkpoint.committed(folder):
        head = manifest.read(folder / str(step))
        head["meta"] = {k: v for k, v in head["meta"].items() if k not in ("config", "tokenizer")}
        (folder / str(step) / manifest.MANIFEST).unlink()
        manifest.seal(folder / str(step), {k: v for k, v in head.items() if k != "files"})
    assert again()[1] == []
    with pytest.raises(ValueError, match="with model.width 16, now 32"):
        again(model__width=32)
    (tmp_path / "x" / "config.json").unlink()
    with pytest.raises(ValueError, match="with model [0-9a-f]{16}, now [0-9a-f]{16}"):
        again(model__width=32)


def test_three_lines_load_the_model_of_a_run(finished, given):
    folder, score = finished
    run = runs.load(folder)
    assert (run.step, run.experiment) == (STEPS, given()) and run.tokenizer.name == "bytes"
    plan = loop.make_plan(run.experiment)
    params = params_of(run.model)
    assert loop.evaluate(plan, params, 2) == pytest.approx(score, rel=1e-6)
    tokens = jnp.asarray(run.tokenizer.encode(b"a line")[None].astype(np.int32))
    hidden, _ = run.model(tokens)
    assert run.model.logits(hidden).shape == (1, 6, 257)


@pytest.mark.parametrize(
    "settings", [{"optimizer__ema": 0.5}, {"optimizer__rule": schedule_free.Config()}]
)
def test_the_weights_that_are_loaded_are_those_that_were_judged(given, tmp_path, settings):
    result = loop.train(given(**settings), str(tmp_path), None)
    loaded, judged = params_of(runs.load(tmp_path).model), params_of(result.model)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(judged), strict=True):
        np.testing.assert_array_equal(a, b)


def params_of(model):
    return nnx.to_pure_dict(nnx.split(model)[1])


@pytest.mark.parametrize("file", ["{}", "[3]", "no json", '{"class": "configs.schema.Data"}', None])
def test_a_folder_that_is_no_run_is_one_line(tmp_path, finished, file):
    with pytest.raises(ValueError, match="^no checkpoint in .*: name the workdir of a run.$"):
        runs.load(tmp_path)
    if file is not None:
        (tmp_path / "config.json").write_text(file)
    with pytest.raises(ValueError, match="^[^\n]* holds no config.json of a run: name"):
        runs.experiment_of(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "loss.png"])
def test_files_of_something_else_are_not_written_over(given, tmp_path, name):
    """A folder with the config.json of another library's model."""
    (tmp_path / name).write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(ValueError, match=f"holds {name}, which no run of this program wrote"):
        loop.train(given(), str(tmp_path), None)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_last_step_that_cannot_be_saved_is_refused_before_training(given, tmp_path):
    taken = tmp_path / "checkpoints" / str(STEPS) / "default"
    taken.mkdir(parents=True)
    (taken / "weights").write_text("of another program")
    with pytest.raises(ValueError, match="4 holds files of something else, and step 4 is to be"):
        loop.train(given(), str(tmp_path), None)
    with pytest.raises(checkpoint.NoUsableCheckpoint) as caught:
        loop.train(given(steps=6), str(tmp_path), None)
    assert caught.value.code == 3 and (taken / "weights").read_text() == "of another program"


@pytest.mark.parametrize("damage", ["lost", "torn"])
def test_a_config_that_is_damaged_is_taken_from_the_checkpoint(finished, given, damage):
    folder = shutil.copytree(finished[0], finished[0].parent / damage)
    whole, file = (folder / "config.json").read_bytes(), folder / "config.json"
    for read in (lambda: runs.recover(folder), lambda: loop.train(given(), str(folder), None)):
        file.unlink() if damage == "lost" else file.write_bytes(whole[:100])
        read()
        assert file.read_bytes() == whole


def test_carried_states_belong_to_their_rows(given, tmp_path, capsys):
    stream = {"carry_state": True, "data__layout": "stream"}
    loop.train(given(**stream), str(tmp_path / "x"), None)
    for key, old, new in (("batch", 4, 2), ("length", 8, 4)):
        with pytest.raises(ValueError, match=rf"with data\.{key} {old}, now {new}\. Use another"):
            loop.train(given(**stream, **{f"data__{key}": new}), str(tmp_path / "x"), None)
    capsys.readouterr()
    loop.train(given(**stream, data__seed=5, steps=6), str(tmp_path / "x"), None)
    assert "or never. The first of them go on from the old rows' state." in capsys.readouterr().out


def test_the_last_step_is_on_record(given, tmp_path):
    result = loop.train(given(log_every=3), str(tmp_path), None)
    assert set(losses(result)) == {1, 3, STEPS}


def test_many_epochs_are_said(given):
    rows = loop.describe(loop.make_plan(given(steps=100_000)))
    assert "epochs, more than the 40 that teach anything" in rows["steps"]
    assert "more than" not in loop.describe(loop.make_plan(given()))["steps"]


def test_a_run_is_a_config(finished, given, capsys):
    """--config=RUN/config.json, with flags on top, read as it was written."""
    file = finished[0] / "config.json"
    (experiment,), _ = loading.parse([f"--config={file}", "--config.steps=9"], {"workdir": ""})
    assert experiment == given(steps=9)
    (experiment,), options = loading.parse(
        [f"--workdir={finished[0]}"],
        {"workdir": ""},
        otherwise=lambda values: [f"{values['workdir']}/config.json"],
    )
    assert experiment == given() and options["config"] == [str(file)]
