"""The log: exact records, no step twice across kills, honest time accounts, a readable curve."""

import json
import math
import re
import time
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from training import log, plot
from training.log import Account, Log

ROWS = {"devices": "8 x cpu [auto]", "parameters": "1,234 total, 1,000 non-embedding"}


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics_of(step: int) -> dict[str, float]:
    loss = float(np.float32(1.0) / np.float32(step + 2))
    rates = {"learning_rate": 1e-3, "grad_norm": 0.25, "tokens_per_s": 1234.5}
    return {"tokens": 64.0 * step, "loss": loss, "bits_per_byte": loss / math.log(2)} | rates


def run(folder: Path, start_step: int, steps) -> Log:
    with Log(folder, 20) as written:
        written.begin(ROWS, start_step, {"model": {"width": 8}})
        for step in steps:
            written.record(step, metrics_of(step))
    return written


def test_records_are_exact(tmp_path):
    written = run(tmp_path, 0, [1, 2, 3])
    found = records(written.metrics_path)
    assert [record["step"] for record in found] == [1, 2, 3]
    for record in found:
        expected = metrics_of(record["step"])
        assert {name: record[name] for name in expected} == expected
        assert float.fromhex(record["loss_hex"]) == expected["loss"]
        assert float.fromhex(record["grad_norm_hex"]) == expected["grad_norm"]


def test_not_finite_is_null(tmp_path):
    with Log(tmp_path, 3) as written:
        written.begin(ROWS, 0, {})
        written.record(1, {"loss": math.nan, "grad_norm": math.inf})
    (record,) = records(written.metrics_path)
    assert (record["loss"], record["loss_hex"]) == (None, "nan")
    assert (record["grad_norm"], record["grad_norm_hex"]) == (None, "inf")


def test_resume_drops_later_steps_and_a_torn_line(tmp_path):
    path = run(tmp_path, 0, range(1, 8)).metrics_path
    with open(path, "a") as file:
        file.write('{"step": 3, "loss": 0.')  # a torn line, even of an early step
    assert [record["step"] for record in log.records(path)] == list(range(1, 8))
    written = run(tmp_path, 4, range(5, 9))
    assert [record["step"] for record in records(path)] == list(range(1, 9))
    assert written.lost_steps == 3
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"time": 1')
    run(tmp_path, 8, [9])
    starts = [e for e in records(tmp_path / "events.jsonl") if e["event"] == "start"]
    assert [(e["step"], e["lost_steps"]) for e in starts] == [(0, 0), (4, 3), (8, 0)]
    assert run(tmp_path, 0, [1]).lost_steps == 9
    assert [record["step"] for record in records(path)] == [1], "a fresh start keeps nothing"


def test_an_untouched_file_is_not_rewritten(tmp_path):
    path = run(tmp_path, 0, [1, 2]).metrics_path
    before = path.stat().st_ino
    assert log.drop_records(path, 2) == 0 and path.stat().st_ino == before


def test_full_disk_drops_records_with_one_warning(tmp_path, capsys):
    written = Log(tmp_path, 20)
    with written:
        written.begin(ROWS, 0, {})
        written.record(1, metrics_of(1))
        real = written._metrics._file

        class Full:
            """Takes half of a line, then nothing, as a disk does that fills up."""

            def write(self, content):
                return real.write(content[: len(content) // 2])

            def __getattr__(self, name):
                return getattr(real, name)

        written._metrics._file = Full()
        written.record(2, metrics_of(2))
        written.record(3, metrics_of(3))
        written._metrics._file = real
        written.record(4, metrics_of(4))
    assert [record["step"] for record in records(written.metrics_path)] == [1, 4]
    assert capsys.readouterr().err.count("log error: ") == 1


def tensorboard_events(folder: Path) -> list:
    """Every event of all TensorBoard files in `folder`: length, its CRC, content, its CRC."""
    events = []
    for path in sorted((folder / "events").glob("events.out.tfevents.*")):
        content, at = path.read_bytes(), 0
        while at < len(content):
            size = int.from_bytes(content[at : at + 8], "little")
            event = event_pb2.Event()
            event.ParseFromString(content[at + 12 : at + 12 + size])
            events.append(event)
            at += 12 + size + 4
    return events


def test_tensorboard_scalars_and_purge(tmp_path):
    with Log(tmp_path, 20) as written:
        written.begin(ROWS, 4, {})
        written.record(5, metrics_of(5))
        written.record(5, {"validation_bits_per_byte": 2.5})
    events = tensorboard_events(tmp_path)
    scalars = {(v.tag, e.step): v.simple_value for e in events for v in e.summary.value}
    assert scalars["train/loss", 5] == np.float32(metrics_of(5)["loss"])
    assert scalars["validation/bits_per_byte", 5] == 2.5
    starts = [e.step for e in events if e.session_log.status == event_pb2.SessionLog.START]
    assert starts == [5], "TensorBoard drops steps from here on that older files hold"


def test_terminal_lines(tmp_path, capsys):
    with Log(tmp_path, 20) as written:
        written.begin(ROWS, 0, {})
        written.record(1, metrics_of(1))
        written.record(2, metrics_of(2) | {"loss": 2.0})
        written.record(2, {"validation_bits_per_byte": 2.5})
        written.line("saved step 2")
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[:2] == [
        "devices     8 x cpu [auto]",
        "parameters  1,234 total, 1,000 non-embedding",
    ]
    number = r"step 2/20  loss 2\.0000  [\d.]+ bits/byte  grad 0\.25  lr 1\.00e-03  1,23[45] tok/s"
    assert re.fullmatch(number + r"  eta \d+:\d\d", lines[3]), lines[3]
    assert lines[4:] == ["step 2/20  validation 2.5000 bits/byte", "saved step 2"]


@pytest.mark.parametrize("columns, bar", [(80, False), (140, True)])
def test_bar_on_a_terminal(tmp_path, capsys, monkeypatch, columns, bar):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    with Log(tmp_path, 20_000) as written:
        written.begin(ROWS, 0, {})
        written.record(1000, metrics_of(2) | {"tokens_per_s": 123456.0})
        written.record(2000, metrics_of(2) | {"tokens_per_s": 123456.0})
        written.line("saved step 2000")
    output = capsys.readouterr().out
    assert "step 2000/20000" in output and "saved step 2000" in output and "devices" in output
    assert re.search(r"123,456 tok/s  eta \d+:\d\d", output), "the line was cut"
    assert ("━" in output) == bar


def test_environment_and_config(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_dump_to=/some/where --xla_b=~/x")
    run(tmp_path, 0, [])
    facts = json.loads((tmp_path / "environment.json").read_text())
    assert facts["xla_flags"] == "--xla_a=1 --xla_dump_to=PATH --xla_b=PATH"
    assert facts["devices"] == 8 and facts["platform"] == "cpu"
    assert set(facts["packages"]) == {"jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"}
    assert facts["commit"] is None or re.fullmatch("[0-9a-f]{40}", facts["commit"])
    assert "/" not in json.dumps(facts)
    assert json.loads((tmp_path / "config.json").read_text()) == {"model": {"width": 8}}


def test_account_adds_up(monkeypatch):
    clock = iter(float(second) for second in range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    account = Account(started=-5.0)
    with account.phase("compile"):  # at 0
        pass  # to 1
    account.settle()  # at 2
    with account.phase("step"):  # from 3
        with account.phase("data"):  # from 4 to 5
            pass
        with pytest.raises(KeyError), account.phase("save"):  # from 6 to 7
            raise KeyError
    seconds = account.summary()  # step ended at 8, now it is 9
    assert seconds.pop("total") == sum(seconds.values()) == 14.0
    used = {name: s for name, s in seconds.items() if s}
    assert used == {
        "startup": 6.0,
        "compile": 1.0,
        "step": 3.0,
        "data": 1.0,
        "save": 1.0,
        "other": 2.0,
    }
    with pytest.raises(ValueError, match="phase 'sleep' is unknown. Use one of startup, init"):
        account.phase("sleep").__enter__()


def test_account_of_a_run_equals_wall_time(tmp_path):
    started = time.perf_counter()
    with Log(tmp_path, 5, started) as written:
        with written.phase("compile"):
            time.sleep(0.05)
        written.begin(ROWS, 0, {})
        for _ in range(3):
            with written.phase("step"):
                time.sleep(0.02)
        text = written.account.text()
        least = time.perf_counter() - started
    most = time.perf_counter() - started  # however long a loaded machine takes to close files
    end = records(tmp_path / "events.jsonl")[-1]
    goodput = end["goodput"]
    assert end["event"] == "end" and least <= goodput["total"] <= most
    assert set(end["programs"]) == {"cached", "compiled", "saved_s"}
    assert goodput["compile"] >= 0.05 and goodput["step"] >= 0.06
    assert re.search(r"^\d+\.\d s: .*compile \d+\.\d %", text)


def written_run(folder):
    """The folder of a run of 14 steps, as a log leaves it."""
    folder.mkdir()
    pattern = [{"class": "models.recurrent.rg_lru.Config"}] * 2
    pattern += [{"class": "models.block.residual.Config", "mixer": pattern[0]}]
    model = {"class": "models.lm.Config", "width": 8, "depth": 3, "pattern": pattern}
    with Log(folder, 20) as written:
        written.begin(ROWS, 0, {"model": model})
        for step in range(1, 15):
            written.record(step, metrics_of(step))
        written.record(14, {"validation_bits_per_byte": 0.5})
    return folder


def test_loss_curve(tmp_path):
    run = written_run(tmp_path / "first")
    picture = plot.loss_curve([run], run / "loss.png")
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    text = picture.with_suffix(".svg").read_text()
    assert "<svg" in text and "<dc:date>" not in text
    assert "first: rg_lru, width 8, depth 3" in text, "titled by run and model"
    train, validation, unit, _ = plot._series(run)
    assert unit == "tokens" and train[-1, 0] == 64 * 14
    assert validation.tolist() == [[64 * 14, 0.5]], "placed by its step"


def test_several_runs_in_one_picture(tmp_path):
    runs = [written_run(tmp_path / name) for name in ("first", "second")]
    text = plot.loss_curve(runs, tmp_path / "deeper" / "x.png").with_suffix(".svg").read_text()
    assert all(f"<!-- {run.name}, last" in text for run in runs)
    assert all(colour in text for colour in plot.COLOURS[:2]) and plot.COLOURS[2] not in text


def test_what_is_no_run_is_not_drawn(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "grad_norm": 1.0}\n')
    with pytest.raises(ValueError, match="nothing to draw"):
        plot.loss_curve([tmp_path], tmp_path / "x.png")
    with pytest.raises(ValueError, match="is no folder of a run"):
        plot.loss_curve([tmp_path / "none"], tmp_path / "x.png")
