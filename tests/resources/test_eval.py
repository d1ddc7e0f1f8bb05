"""eval.py from the command line to the JSON, and its parts on their own."""

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from configs import schema
from models import lm
from parallel import sharding
from tests.resources.test_report import check_layout
from training import checkpoint, loop

pytestmark = pytest.mark.xdist_group("eval")  # one worker: its fixtures are runs
ROOT = Path(__file__).parents[2]
ruler = importlib.import_module("eval")

CONFIG = """
from configs.schema import Data, Experiment, Optimizer
from models import lm
from models.attention import softmax


def get_config():
    model = lm.Config(width=32, depth=2, pattern=(softmax.Config(heads=2, window=16),))
    data = Data(length=32, batch=4)
    return Experiment(model, steps=9, data=data, optimizer=Optimizer(warmup_steps=0))
"""
MEASURED = {
    f"{kind} {what}"
    for kind in ("train", "prefill", "decode")
    for what in ("throughput", "call, median", "call, p95", "compile")
}
COMPILED = {
    "parameters, total",
    "parameters, non-embedding",
    "parameters, active",
    *(f"train memory, {part}" for part in ("arguments", "outputs", "aliased", "temporaries")),
    *(f"state at {context} tokens" for context in ("1k", "4k", "64k")),
    *(f"{kind} FLOPs, by XLA" for kind in ("forward", "train")),
}
MODELLED = {
    "train memory, peak",
    *(f"{kind} FLOPs, {which}" for kind in ("forward", "train") for which in ("model", "executed")),
}


def run(folder: Path, *options: str) -> subprocess.CompletedProcess:
    file = folder / "tiny.py"
    file.write_text(CONFIG)
    command = [sys.executable, "eval.py", f"--config={file}", *options]
    environment = {"PATH": "", "JAX_PLATFORMS": "cpu", "HOME": str(folder)}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """The table and the JSON of one config given twice."""
    folder = tmp_path_factory.mktemp("twins")
    json_file = folder / "out" / "twins.json"
    again = f"--config={folder / 'tiny.py'}"
    done = run(folder, again, "--seconds=0.5", "--peak_seconds=200", f"--json={json_file}")
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(json_file.read_text())


def rows_of(found: dict, column: int) -> dict[str, dict]:
    return {row["name"]: row for row in found["columns"][column]["rows"]}


def test_every_row_is_there_with_its_provenance(twins):
    _, found = twins
    check_layout(found)
    assert [column["config"] for column in found["columns"]] == ["tiny", "tiny (2)"]
    rows = rows_of(found, 0)
    by_provenance = {}
    for name, row in rows.items():
        by_provenance.setdefault(row["provenance"], set()).add(name)
    grown = {"train memory, measured"} if sys.platform == "linux" else set()
    assert by_provenance["measured"] == MEASURED | grown
    assert by_provenance["compiled"] == COMPILED
    assert by_provenance["modelled"] == MODELLED
    assert rows["validation"]["note"] == "no --workdir with a checkpoint"


def test_equal_configs_have_equal_programs_and_like_times(twins):
    _, found = twins
    first, second = rows_of(found, 0), rows_of(found, 1)
    assert found["columns"][0]["fingerprint"] == found["columns"][1]["fingerprint"]
    for name in COMPILED | MODELLED:
        assert first[name] == second[name]
    for kind in ("train", "prefill", "decode"):
        times = [rows[f"{kind} call, median"]["value"] for rows in (first, second)]
        assert max(times) < 3 * min(times)


def test_the_numbers_fit_together(twins):
    _, found = twins
    rows = {name: row["value"] for name, row in rows_of(found, 0).items()}
    assert rows["parameters, total"] - rows["parameters, non-embedding"] == 257 * 32
    assert rows["train throughput"] == pytest.approx(4 * 32 / rows["train call, median"])
    assert rows["decode throughput"] == pytest.approx(4 * 32 / rows["decode call, median"])
    assert rows["train FLOPs, model"] == pytest.approx(3 * rows["forward FLOPs, model"])
    assert rows["forward FLOPs, model"] < 1.05 * rows["forward FLOPs, executed"]
    assert rows["train FLOPs, by XLA"] < rows["train FLOPs, executed"]  # two layers, one body
    assert rows["state at 1k tokens"] == rows["state at 64k tokens"]  # the window is 16
    for name, row in rows_of(found, 0).items():
        assert row["value"] is None or row["value"] > 0, name


def test_the_table_holds_what_the_json_holds(twins):
    text, found = twins
    for name in rows_of(found, 0):
        assert name in text
    assert "tiny (2)" in text and "not available (1)" in text
    assert str(ROOT) not in text


def test_one_group_alone_and_a_wrong_one(tmp_path):
    done = run(tmp_path, "--only=parameters")
    assert done.returncode == 0 and "parameters, active" in done.stdout
    assert "throughput" not in done.stdout
    done = run(tmp_path, "--only=sped")
    assert done.returncode == 2
    known = ", ".join(ruler.GROUPS)
    assert done.stderr.strip().endswith(f"--only=sped: no group 'sped'. Use {known}.")


def test_columns_are_named_after_files_and_chosen_by_number():
    experiment = schema.Experiment()
    files = ["a/x.py", "b/y.py:wide", "b/x.py"]
    named = ruler.choose_subjects([experiment] * 3, files, -1)
    assert [subject.name for subject in named] == ["x", "y:wide", "x (2)"]
    assert [subject.index for subject in ruler.choose_subjects([experiment] * 3, files, 1)] == [1]
    with pytest.raises(ValueError, match=r"--column=3 must be -1 \(all\) to 2"):
        ruler.choose_subjects([experiment] * 3, files, 3)


def test_a_failing_process_is_a_reason_and_a_wrong_config_an_error(monkeypatch):
    subject = ruler.Subject("x", schema.Experiment(), 0)

    def ends(code, text):
        done = subprocess.CompletedProcess([], code, "", text)
        monkeypatch.setattr(ruler.subprocess, "run", lambda *_, **__: done)

    ends(1, "Traceback\nRuntimeError: no memory\n")
    row = ruler.peak_elsewhere(subject, 1.0)
    assert row.value is None and row.note == "its process failed: RuntimeError: no memory"
    ends(2, "config error: heads=3 does not divide\n")
    with pytest.raises(ValueError, match="^heads=3 does not divide"):
        ruler.peak_elsewhere(subject, 1.0)
    assert ruler.peak_elsewhere(subject, 0.0).note == "left out by --peak_seconds=0"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's folder with one checkpoint of random weights, its config and its plan."""
    folder = tmp_path_factory.mktemp("trained")
    for split in ("train", "validation", "test"):
        (folder / "text" / split).mkdir(parents=True)
        (folder / "text" / split / "a.txt").write_text(f"{split}: abcdefgh\n" * 200)
    experiment = schema.Experiment(
        lm.Config(width=16, depth=1),
        data=schema.Data(
            source=f"text:{folder / 'text'}", length=16, batch=8, folder=str(folder / "cache")
        ),
    )
    plan = loop.make_plan(experiment)
    state = plan.trainer.init()
    saved = checkpoint.Checkpoints(folder / "run" / "checkpoints")
    meta = {"model": schema.fingerprint(experiment.model), "data": "", "metric": 0.0}
    saved.save(3, state, meta)
    saved.close()
    with sharding.on(plan.mesh):
        expected = loop.evaluate(plan, state.params, experiment.evaluation.batches)
    return str(folder / "run"), experiment, expected


def test_validation_reads_the_checkpoint(trained):
    workdir, experiment, expected = trained
    row = ruler.quality(ruler.Subject("x", experiment, 0), workdir)
    assert (row.value, row.unit, row.provenance) == (expected, "bit/byte", "measured")
    assert 6 < row.value < 10  # random weights
    assert row.note.startswith("step 3, ")


def test_another_model_s_checkpoint_is_no_number(trained):
    workdir, experiment, _ = trained
    wider = dataclasses.replace(experiment, model=lm.Config(width=24, depth=1))
    row = ruler.quality(ruler.Subject("x", wider, 0), workdir)
    assert row.value is None and "does not fit this model" in row.note
    capped = dataclasses.replace(experiment, model=lm.Config(width=16, depth=1, softcap=30.0))
    row = ruler.quality(ruler.Subject("x", capped, 0), workdir)
    assert row.value is None and row.note.endswith("is of another model")
    row = ruler.quality(ruler.Subject("x", experiment, 0), workdir + "/elsewhere")
    assert row.value is None and row.note.startswith("no checkpoint in")
