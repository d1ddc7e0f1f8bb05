"""eval.py from the command line to the JSON, and its parts on their own."""

import csv
import html
import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from configs import loading, schema
from eval import OPTIONS
from evaluation import groups, rows
from evaluation.subject import Subject, choose
from models import lm
from tests.evaluation.process import ROOT, program
from tests.report.test_report import SCHEMA

pytestmark = pytest.mark.xdist_group("eval")  # one worker: its fixtures are runs

CONFIG = """
from configs.schema import Data, Experiment, Optimizer
from models import lm
from models.attention import softmax


def get_config():
    model = lm.Config(width=32, depth=2, pattern=(softmax.Config(heads=2, window=16),))
    data = Data(length=32, batch=4)
    return Experiment(model, steps=9, data=data, optimizer=Optimizer(warmup_steps=0))
"""
KINDS = ("train", "prefill", "decode")
MEASURED = {
    "roof, compute",
    "roof, memory",
    *(
        f"{kind} {what}"
        for kind in KINDS
        for what in ("throughput", "call, median", "call, p95", "compile")
    ),
    *(
        f"{name}, {which}"
        for name in ("time to first token", "time per output token")
        for which in ("median", "p95")
    ),
}
COMPILED = {
    "train bytes moved",
    "parameters, total",
    "parameters, non-embedding",
    "parameters, active",
    *(f"train memory, {part}" for part in ("arguments", "outputs", "aliased", "temporaries")),
    *(f"state at {context} tokens" for context in ("1k", "4k", "64k", "1M")),
    *(f"{kind} FLOPs, by XLA" for kind in ("forward", "train")),
    *(f"train network, {what}" for what in ("all", "per token", "share of the call")),
}
EXACT = {  # modelled on shapes alone
    *(
        f"train FLOPs beyond the model's, {what}"
        for what in ("attention", "cross_entropy", "other contractions", "other arithmetic")
    ),
    "train memory, peak",
    "weights on disk",
    *(f"{kind} FLOPs, {which}" for kind in ("forward", "train") for which in ("model", "executed")),
}
CLOCKED = {  # modelled on seconds
    *(f"{kind} energy" for kind in KINDS),
    "training run energy",
    "training run emissions",
    *(f"{kind} cost" for kind in KINDS),
    "training run cost",
    "training cost a parameter",
    "train MFU, of the measured peak",
    "train HFU, of the measured peak",
    "train achieved",
    "train share of the roofline",
    "train intensity",
}
STATED = ("--watts=65", "--price=0.5")


def run(folder: Path, *options: str) -> subprocess.CompletedProcess:
    file = folder / "tiny.py"
    file.write_text(CONFIG)
    return program(folder, f"--config={file}", *options)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The table of one config given twice, and the folder of its report in all forms."""
    folder = tmp_path_factory.mktemp("twins")
    out = folder / "out"
    again = f"--config={folder / 'tiny.py'}"
    spent = "--seconds=0.5", "--peak_seconds=200"
    forms = {"json": "json", "csv": "csv", "markdown": "md", "html": "html"}
    files = (f"--{form}={out / f'twins.{suffix}'}" for form, suffix in forms.items())
    done = run(folder, again, *spent, *STATED, *files)
    assert done.returncode == 0, done.stderr
    return done.stdout, out


@pytest.fixture(scope="module")
def twins(written):
    """The table and the JSON of one config given twice."""
    text, out = written
    return text, json.loads((out / "twins.json").read_text())


def rows_of(found: dict, column: int) -> dict[str, dict]:
    resources = found["columns"][column]["resources"].values()
    return {row["name"]: row for rows in resources for row in rows}


def test_every_row_is_there_with_its_provenance(twins):
    _, found = twins
    jsonschema.validate(found, SCHEMA)
    assert [column["config"] for column in found["columns"]] == ["tiny", "tiny (2)"]
    rows = rows_of(found, 0)
    by_provenance = {}
    for name, row in rows.items():
        by_provenance.setdefault(row["provenance"], set()).add(name)
    grown = {"train memory, measured"} if sys.platform == "linux" else set()
    assert by_provenance["measured"] == MEASURED | grown
    assert by_provenance["compiled"] == COMPILED
    assert by_provenance["modelled"] == EXACT | CLOCKED
    assert rows["validation"]["note"] == "no --workdir with a checkpoint"
    assert {"listed" in name for name, row in rows.items() if "peak is known" in row["note"]} == {
        True
    }


def test_equal_configs_have_equal_programs_and_like_times(twins):
    _, found = twins
    first, second = rows_of(found, 0), rows_of(found, 1)
    assert found["columns"][0]["fingerprint"] == found["columns"][1]["fingerprint"]
    for name in COMPILED | EXACT:
        assert first[name] == second[name]
    for kind in KINDS:
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
    joules = 65 * rows["train call, median"]
    assert rows["train energy"] == pytest.approx(joules / (4 * 32))
    assert rows["training run cost"] == pytest.approx(0.5 / 3600 * 9 * rows["train call, median"])
    for name, row in rows_of(found, 0).items():
        may_be_zero = "network" in name or "beyond the model's" in name
        assert row["value"] is None or row["value"] > 0 or may_be_zero, name


def test_the_table_holds_what_the_json_holds(twins):
    text, found = twins
    for name in rows_of(found, 0):
        assert name in text
    assert "tiny (2)" in text and "not available (" in text
    assert str(ROOT) not in text


def test_every_form_holds_what_the_json_holds(written, twins):
    _, out = written
    _, found = twins
    lines = list(csv.DictReader((out / "twins.csv").read_text().splitlines()))
    for i, config in enumerate(("tiny", "tiny (2)")):
        mine = [line for line in lines if line["config"] == config]
        numbers = {line["name"]: line for line in mine if line["resource"] != "curve"}
        assert numbers.keys() == rows_of(found, i).keys()
        for name, row in rows_of(found, i).items():
            value = numbers[name]["value"]
            assert (float(value) if value else None) == row["value"]
            assert numbers[name]["provenance"] == (row["provenance"] or "not available")
            assert numbers[name]["note"] == row["note"]
        states = [int(line["value"]) for line in mine if line["name"] == "state"]
        assert states == [row["value"] for row in found["columns"][i]["curves"][0]["rows"]]
    table = (out / "twins.md").read_text().split("\n\n")[0].splitlines()
    assert {line.count(" | ") for line in table[2:]} == {2}  # a name and two configs
    assert set(rows_of(found, 0)) <= {line.split(" | ")[0].removeprefix("| ") for line in table}
    page = (out / "twins.html").read_text()
    assert page.startswith("<!doctype html>") and page.count("<svg") == page.count("</svg>") > 0
    for name in rows_of(found, 0):
        assert f">{html.escape(name)}</th>" in page


def test_two_reports_are_compared(written, tmp_path):
    """A report beside itself, and beside one that claims half the parameters."""
    _, out = written
    before, after = out / "twins.json", tmp_path / "after.json"
    same = program(tmp_path, "--compare", str(before), str(before))
    assert (same.returncode, same.stderr) == (0, "")
    found = json.loads(before.read_text())
    valued = [row for i in (0, 1) for row in rows_of(found, i).values() if row["value"] is not None]
    assert f"{len(valued)} rows are equal." in same.stdout
    rows_of(found, 0)["parameters, total"]["value"] /= 2
    after.write_text(json.dumps(found))
    changed = program(tmp_path, "--compare", str(before), str(after))
    assert changed.returncode == 0
    assert f"{len(valued) - 1} rows are equal." in changed.stdout
    (line,) = (line for line in changed.stdout.splitlines() if "parameters" in line)
    assert line.split()[:2] == ["parameters,", "total"] and line.rstrip().endswith("x 0.500")


@pytest.mark.parametrize("wrong", ["none.json", "no_json.json", "other.json", ""])
def test_files_that_are_no_reports_are_one_line(written, tmp_path, wrong):
    _, out = written
    (tmp_path / "no_json.json").write_text("train: 3")
    (tmp_path / "other.json").write_text('{"schema_version": 1}')
    files = [str(out / "twins.json"), *([str(tmp_path / wrong)] if wrong else [])]
    done = program(tmp_path, "--compare", *files)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    if wrong:
        assert line.startswith(f"config error: {tmp_path / wrong} is no report of eval.py --json: ")
    else:
        assert line == "config error: --compare takes two reports, not 1: A.json B.json"


def test_one_group_alone_and_a_wrong_one(tmp_path):
    done = run(tmp_path, "--only=parameters")
    assert done.returncode == 0 and "parameters, active" in done.stdout
    assert "throughput" not in done.stdout
    done = run(tmp_path, "--only=sped")
    assert done.returncode == 2
    known = ", ".join(groups.GROUPS)
    assert done.stderr.strip().endswith(f"--only=sped: no group 'sped'. Use {known}.")


def test_columns_are_named_after_files():
    files = ["a/x.py", "b/y.py:wide", "b/x.py"]
    named = choose([schema.Experiment(lm.Config())] * 3, files)
    assert [subject.name for subject in named] == ["x", "y:wide", "x (2)"]
    assert [subject.index for subject in named] == [0, 1, 2]


def test_a_failing_process_is_a_reason_and_a_wrong_config_an_error(monkeypatch):
    subject = Subject("x", schema.Experiment(), 0)

    def ends(code, text):
        done = subprocess.CompletedProcess([], code, "", text)
        monkeypatch.setattr(rows.subprocess, "run", lambda *_, **__: done)

    ends(1, "Traceback\nRuntimeError: no memory\n")
    row = rows.peak_elsewhere(subject, 1.0)
    assert row.value is None and row.note == "its process failed: RuntimeError: no memory"
    ends(2, "config error: heads=3 does not divide\n")
    with pytest.raises(ValueError, match="^heads=3 does not divide"):
        rows.peak_elsewhere(subject, 1.0)
    assert rows.peak_elsewhere(subject, 0.0).note == "left out by --peak_seconds=0"


def test_the_process_of_the_peak_does_nothing_else(monkeypatch, tmp_path):
    """Its one row has no curve, no rank, and no place in the files of the whole report."""
    (tmp_path / "tiny.py").write_text(CONFIG)
    config = f"--config={tmp_path / 'tiny.py'}"
    files = "--json=a.json", "--html=a.html", "--markdown=a.md", "--csv=a.csv", "--sized=a"
    more = "--curves=length:8,16,32", "--profile=3", "--pareto=train throughput", "--watts=65"
    monkeypatch.setattr(sys, "argv", ["eval.py", config, config, *files, *more])
    commands = []

    def runs(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "")

    monkeypatch.setattr(rows.subprocess, "run", runs)
    rows.peak_elsewhere(Subject("x", schema.Experiment(), 1), 1.0)
    _, options = loading.parse(commands[0][2:], OPTIONS)
    assert options["json"] != "a.json"
    set_to = {name: options[name] for name in OPTIONS if options[name] != OPTIONS[name]}
    assert set_to == {"only": "peak", "column": 1, "json": options["json"], "watts": 65.0}
