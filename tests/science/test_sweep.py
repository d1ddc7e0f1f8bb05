"""sweep.py as a user starts it: workers that are killed, faults, early stopping, the comparison."""

import contextlib
import json
import os
import random
import re
import signal
import sys
import time

import optuna
import pytest
import sqlalchemy

import sweep
from configs import loading

pytestmark = pytest.mark.xdist_group("sweep")


def finish(process, code=0):
    """The output of a process that ends with this code."""
    output, _ = process.communicate(timeout=500)
    assert process.returncode == code, output
    return output


def trials(folder, state=optuna.trial.TrialState.COMPLETE, storage=""):
    """The trials of the study in a folder."""
    address = storage or f"sqlite:///{folder / 'study.db'}"
    return optuna.load_study(study_name="s", storage=address).get_trials(states=(state,))


def scores(output):
    """Lines of the table up to the seeds: labels, score, interval."""
    rows = [line for line in output.splitlines() if " +-" in line]
    return [re.split(r"\s{2,}", row.strip())[:4] for row in rows]


def killed(start, kills, seed, running):
    """Two workers, one of which is killed and started again, `kills` times at random moments.

    `running()` says whether any trial runs: nothing is killed before.
    """
    rng, workers = random.Random(seed), [start(), start()]
    for _ in range(kills):
        deadline = time.monotonic() + 200
        while not running():
            assert time.monotonic() < deadline
            time.sleep(0.2)
        time.sleep(rng.uniform(0, 3))
        i = rng.randrange(2)
        os.killpg(workers[i].pid, signal.SIGKILL)
        workers[i].wait()
        workers[i] = start()
    for worker in workers:
        finish(worker)


def check_kills(command, tmp_path, flags, points, kills, storage=""):
    """Every point is finished exactly once, and the table is that of an unbroken sweep."""
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    given = [*flags, "--study=s", f"--workdir={broken}", f"--storage={storage}"]

    def found(state):
        return trials(broken, getattr(optuna.trial.TrialState, state), storage)

    def running():
        with contextlib.suppress(KeyError, ValueError, sqlalchemy.exc.SQLAlchemyError):
            return bool(found("RUNNING"))  # the first worker has not made the study yet
        return False

    killed(lambda: command(*given, "--workers=0"), kills, kills, running)
    done = found("COMPLETE")
    assert len(done) == points == len({trial.user_attrs["point"] for trial in done})
    assert found("FAIL"), "no kill has met a trial"
    assert not found("RUNNING") and not found("WAITING")
    table = scores(finish(command(*given, "--show")))
    unbroken = finish(command(*flags, "--workers=2", f"--workdir={whole}", "--study=s"))
    assert table and table == scores(unbroken)
    for folder in (broken, whole):
        assert len([path for path in folder.iterdir() if path.is_dir()]) == points


def test_killed_workers_finish_every_point_once(command, tmp_path):
    """Four points, two workers, three kills."""
    flags = ["--sweep.optimizer.learning_rate=1e-3,3e-2", "--seeds=2"]
    check_kills(command, tmp_path, flags, 4, 3)


@pytest.mark.long
def test_ten_kills_of_a_sweep_of_twenty_four(command, tmp_path):
    """The same of two architectures, three rates and four seeds."""
    flags = ["--sweep.model.pattern=gla,attention", "--seeds=4"]
    flags += ["--sweep.optimizer.learning_rate=1e-3,3e-3,1e-2"]
    check_kills(command, tmp_path, flags, 24, 10)


def test_a_comparison_tells_what_failed_and_what_was_tuned(command, tmp_path):
    """One point of four cannot be built: the others are run, and a page is written."""
    flags = ["--sweep.model.pattern=attention,attention(heads=3)", f"--workdir={tmp_path}"]
    flags += ["--sweep.optimizer.learning_rate=1e-3,3e-2", "--tune=optimizer.learning_rate"]
    output = finish(command(*flags, "--study=s"), 1)
    assert output.count("failed: ") >= 2 and "3" in output
    assert re.search(r"attention\(heads=3\)\s+failed: ", output)
    assert "learning_rate, tuned" in output
    report = json.loads((tmp_path / "comparison.json").read_text())
    assert [column["config"] for column in report["columns"]] == ["attention", "attention(heads=3)"]
    assert "<svg" in (tmp_path / "comparison.html").read_text()
    assert "best of 2" in (tmp_path / "comparison.html").read_text()
    again = finish(command(*flags, "--study=s"), 1)  # nothing is left to run
    assert "accuracy" in again and not re.search(r"^\d+/\d+", again, re.MULTILINE)


def test_a_signal_saves_and_the_same_command_goes_on(command, tmp_path):
    """SIGTERM to the parent of two workers: each saves its trial; then all are finished."""
    flags = ["--sweep.optimizer.learning_rate=1e-3,3e-2", f"--workdir={tmp_path}", "--study=s"]
    flags += ["--config.steps=2000", "--config.checkpoint.every_steps=0", "--workers=2"]
    process = command(*flags)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("*/metrics.jsonl"))) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    assert "goes on from there" in finish(process, 3)
    saved = [int(path.parent.name) for path in tmp_path.glob("*/checkpoints/*/marker.json")]
    assert not trials(tmp_path) and len(list(tmp_path.glob("*/checkpoints"))) == 2, saved
    finish(command(*flags))
    assert len(trials(tmp_path)) == 2
    events = [json.loads(line) for path in tmp_path.glob("*/events.jsonl") for line in open(path)]
    assert sum(event["event"] == "start" and event["step"] > 0 for event in events) == 2


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--sweep.model.widht=1,2"], "did you mean"),
        (["--sweep.model.width="], "is empty"),
        (["--tune=model.width"], "no axis"),
        (["--halving=2"], "--tune"),
        (["--storage=sqlite:////no/such/folder/study.db"], "does not open"),
        (["--storage=oracle://x"], "--storage=oracle://x"),
        (["--storage=nonsense"], "does not open"),
        (["--storage=postgresql+psycopg://u:secret@127.0.0.1:1/x"], "u@127.0.0.1:1/x"),
        (["--workdir=gs://bucket/x"], "is an address"),
        (["--seeds=-1"], "seeds"),
        (["--workers=-1"], "workers"),
        (["--heartbeat=0"], "heartbeat"),
        (["--sweep.model.width"], "is empty"),
        (["--sweeep.model.width=1,2"], "did you mean"),
        (["--sweep=1,2"], "has no key"),
        (["--sweep.data.source=parity,copying"], "accuracy and rows all right"),
        (["--workdir=sweep.py"], "is a file"),
    ],
)
def test_a_bad_sweep_is_one_line(config, tmp_path, monkeypatch, flags, words):
    """A UsageError, which is exit code 2 and one line, without a secret; nothing is trained."""
    flags = flags if "--workdir" in flags[0] else [*flags, f"--workdir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["sweep.py", f"--config={config}", *flags])
    with pytest.raises(loading.UsageError) as refused:
        sweep.main()
    line = str(refused.value)
    assert words in line and "\n" not in line and "secret" not in line
    assert not list(tmp_path.glob("*/config.json"))


def test_halving_stops_the_worse_half_early(command, tmp_path):
    """Of four rates at most two go beyond the second validation; all four count as tried."""
    flags = ["--sweep.optimizer.learning_rate=1e-4,1e-3,3e-2,1e-1", f"--workdir={tmp_path}"]
    flags += ["--tune=optimizer.learning_rate", "--halving=2", "--study=s"]
    output = finish(command(*flags))
    stopped = trials(tmp_path, optuna.trial.TrialState.PRUNED)
    assert len(stopped) + len(trials(tmp_path)) == 4 and stopped
    assert output.count("stopped early") == len(stopped)
    (row,) = [line for line in output.splitlines() if line.strip().startswith(("0.", "1."))]
    assert row.split()[3] == "4", row
