"""Whole runs of train.py that are killed, stopped and damaged: what resumes is bit-identical."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.xdist_group("faults")  # one worker: its fixtures are runs
ROOT = Path(__file__).parents[1]
STEPS = 40


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder of 60 small text files: opening it takes no time."""
    folder = tmp_path_factory.mktemp("corpus")
    words = "the cat sat on a mat and then it ran to see who was at the door".split()
    rng = random.Random(0)
    for i in range(60):
        (folder / f"{i}.txt").write_text(" ".join(rng.choices(words, k=400)))
    return folder


def command(corpus, workdir, *extra):
    """A run of the quickstart's architecture, small enough to start and end within seconds."""
    config = "--config=configs/quickstart.py"
    settings = dict(
        steps=STEPS,
        log_every=1,
        **{
            "model.width": 32,
            "model.depth": 2,
            "data.source": f"text:{corpus}",
            "data.length": 64,
            "data.batch": 4,
            "optimizer.warmup_steps": 5,
            "checkpoint.every_steps": 2,
            "evaluation.every_steps": 20,
            "evaluation.sample_tokens": 8,
        },
    )
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    return [sys.executable, "train.py", config, *flags, f"--workdir={workdir}", *extra]


def start(*args):
    """train.py in a process of its own, on one CPU device, with a compile cache of these tests."""
    caches = str(args[0].with_name("caches"))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": caches}
    return subprocess.Popen(
        command(*args),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*args):
    """Run to the end; the output. Fails the test unless the exit code is 0."""
    process = start(*args)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def losses(workdir) -> dict[int, str]:
    """Exact loss of every step, each of them recorded once."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss_hex" in record]
    assert len({record["step"] for record in steps}) == len(steps), "a step is recorded twice"
    return {record["step"]: record["loss_hex"] for record in steps}


def parameters(workdir) -> str:
    """SHA-256 over all arrays of the newest checkpoint."""
    from training import checkpoint

    digest = hashlib.sha256()
    for array in checkpoint.arrays(workdir / "checkpoints"):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def unfinished(workdir) -> bool:
    """Whether a step is on disk, at least in part, that is not committed yet."""
    from training import checkpoint

    folder = workdir / "checkpoints"
    if not folder.exists():
        return False
    return len(list(folder.iterdir())) > len(checkpoint.committed(folder))


@pytest.fixture(scope="module")
def unbroken(corpus, tmp_path_factory):
    """The run that nothing disturbs."""
    workdir = tmp_path_factory.mktemp("unbroken")
    output = finish(corpus, workdir)
    return workdir, output


def test_ends_with_score_sample_table_and_paths(unbroken):
    workdir, output = unbroken
    assert "validation bits per byte" in output
    for name in ("metrics.jsonl", "loss.png", "config.json", "environment.json"):
        assert (workdir / name).stat().st_size > 0, name
    assert str(workdir / "metrics.jsonl") in output.replace("\n", "")
    assert "FLOPs" in output


@pytest.mark.long  # the tests below compare every loss of a broken run with those of `unbroken`
def test_twice_the_same_bits(unbroken, corpus, tmp_path):
    finish(corpus, tmp_path)
    assert losses(tmp_path) == losses(unbroken[0])
    assert parameters(tmp_path) == parameters(unbroken[0])


@pytest.mark.parametrize("kills", [4, pytest.param(10, marks=pytest.mark.long)])
def test_kill_at_some_moments(unbroken, corpus, tmp_path, kills):
    rng = random.Random(1)
    inside = 0
    for kill in range(kills):
        process = start(corpus, tmp_path)
        wait_for_step(process, tmp_path)
        if kill < kills // 2:  # aim at a save: go when the files are there and the marker is not
            deadline = time.monotonic() + 20
            while not unfinished(tmp_path) and time.monotonic() < deadline:
                time.sleep(0.0005)
        else:
            time.sleep(rng.uniform(0.0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.wait()
        inside += unfinished(tmp_path)
    finish(corpus, tmp_path)
    assert inside >= kills // 3, f"only {inside} kills fell inside a save"
    assert losses(tmp_path) == losses(unbroken[0])
    assert parameters(tmp_path) == parameters(unbroken[0])


def wait_for_step(process, workdir) -> None:
    """Return once the process has recorded a new step; fail if it ends before."""
    metrics = workdir / "metrics.jsonl"
    size = metrics.stat().st_size if metrics.exists() else 0
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.stat().st_size <= size:
        size = min(size, metrics.stat().st_size) if metrics.exists() else size
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "no step within two minutes"
        time.sleep(0.002)


def test_signals_save_and_exit_0(unbroken, corpus, tmp_path):
    """One run that is stopped by each signal, and goes on to its end."""
    from training import checkpoint

    for number in (signal.SIGTERM, signal.SIGINT):
        process = start(corpus, tmp_path)
        wait_for_step(process, tmp_path)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
        stopped = max(losses(tmp_path))
        assert stopped < STEPS and checkpoint.committed(tmp_path / "checkpoints")[-1] == stopped
    finish(corpus, tmp_path)
    assert losses(tmp_path) == losses(unbroken[0])
    assert parameters(tmp_path) == parameters(unbroken[0])


def flip(path: Path) -> None:
    """Invert one bit in the middle of the file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    """Cut the file's second half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(  # tests/training/test_checkpoint_restore.py damages every file so
    "damage",
    [
        pytest.param(flip, id="flip"),
        pytest.param(truncate, id="truncate", marks=pytest.mark.long),
        pytest.param(Path.unlink, id="delete", marks=pytest.mark.long),
    ],
)
def test_damaged_checkpoint_falls_back(unbroken, corpus, tmp_path, damage):
    import shutil

    from training import checkpoint

    workdir = tmp_path / "run"
    shutil.copytree(unbroken[0], workdir)
    newest, before = reversed(checkpoint.committed(workdir / "checkpoints")[-2:])
    files = [path for path in (workdir / "checkpoints" / str(newest)).rglob("*") if path.is_file()]
    damage(max(files, key=lambda path: path.stat().st_size))
    output = finish(corpus, workdir)
    warnings = [line for line in output.splitlines() if "checkpoint error" in line]
    assert len(warnings) == 1 and str(newest) in warnings[0] and str(before) in warnings[0]
    assert losses(workdir) == losses(unbroken[0])
    assert parameters(workdir) == parameters(unbroken[0])
