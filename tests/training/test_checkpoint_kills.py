"""Checkpoints of processes that are killed with SIGKILL, and of processes that save together."""

import functools
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from training import checkpoint, manifest
from training.checkpoint import Checkpoints

ROOT = Path(__file__).parents[2]
WORDS = 2_500_000


@functools.cache
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2**32, (5, WORDS), dtype=np.uint32)


def large_tree(step: int) -> list[np.ndarray]:
    """50 MB of noise that only `step` decides."""
    return list(noise() ^ np.uint32(step * 2654435761 % 2**32))


def save_forever(folder: Path) -> None:
    """Save step after step without a pause, from the newest one on."""
    checkpoints = Checkpoints(folder, keep=2, keep_best=0)
    step = max(checkpoints.steps(), default=0)
    while True:
        step += 1
        checkpoints.save(step, [jnp.asarray(x) for x in large_tree(step)], {})


def savers(folder: str) -> None:
    """For each line on stdin, a child that saves forever: its pid, and its end, are printed.

    Forked before JAX starts its threads, so that JAX is imported once and not for every child.
    """
    noise()
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                save_forever(Path(folder))
            finally:
                os._exit(1)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def save_together(index: int, port: int, folder: str) -> None:
    """One of two processes: save, restore and compare arrays that span both."""
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=index)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    where = {"split": NamedSharding(mesh, P("data")), "whole": NamedSharding(mesh, P())}
    checkpoints = Checkpoints(Path(folder), keep=2, keep_best=0)
    assert checkpoints.restore(shapes := {n: shape(w) for n, w in where.items()}) is None
    for step in (1, 2, 3):
        tree = {n: jax.make_array_from_callback((8, 4), w, part(step)) for n, w in where.items()}
        checkpoints.save(step, tree, {"metric": 1.0})
    restored, meta = checkpoints.restore(shapes)
    assert meta["step"] == 3
    for name, value in restored.items():
        for shard in value.addressable_shards:
            assert np.array_equal(np.asarray(shard.data), part(3)(shard.index)), name
    checkpoints.close()
    print("done", index, checkpoints.steps())


def shape(sharding=None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=sharding)


def part(step: int):
    values = np.random.default_rng(step).standard_normal((8, 4)).astype(np.float32)
    return lambda index: values[index]


def start(devices: int, call: str, stderr=subprocess.STDOUT) -> subprocess.Popen:
    """A process that makes `call` on a function of this module."""
    settings = f"c('jax_platforms', 'cpu'); c('jax_num_cpu_devices', {devices})"
    module = "from tests.training import test_checkpoint_kills as me"
    code = f"import jax; c = jax.config.update; {settings}; {module}; me.{call}"
    pipe = subprocess.PIPE
    pipes = dict(stdin=pipe, stdout=pipe, stderr=stderr, text=True)
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)


def unfinished(folder: Path) -> bool:
    return bool(manifest.unfinished(folder))


def kill_one_saver(parent: subprocess.Popen, folder: Path, delay: float) -> None:
    """Let a child begin a step newer than all before, wait for `delay` seconds, and kill -9 it."""
    Checkpoints(folder, warn=lambda line: None)  # removes what the kill before this one left
    before = manifest.present(folder)[-1]
    parent.stdin.write("go\n")
    parent.stdin.flush()
    child = int(parent.stdout.readline())
    deadline = time.monotonic() + 60
    while manifest.present(folder)[-1] == before:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    assert int(parent.stdout.readline()) == -signal.SIGKILL


def first_save(folder: Path) -> float:
    """Save step 1 here; seconds that a whole save took."""
    checkpoints = Checkpoints(folder)
    tree = [jnp.asarray(x) for x in large_tree(1)]
    began = time.monotonic()
    checkpoints.save(1, tree, {})
    checkpoints.wait()
    return time.monotonic() - began


def test_kill_9_during_saves(tmp_path):
    folder, rng, inside = tmp_path / "checkpoints", random.Random(0), 0
    target, said = [jax.ShapeDtypeStruct((WORDS,), jnp.uint32)] * 5, []
    parent = start(1, f"savers({str(folder)!r})", stderr=None)
    seconds = first_save(folder)
    for _ in range(6):
        before = checkpoint.committed(folder)[-1]
        kill_one_saver(parent, folder, rng.uniform(0.0, 2.0 * seconds))
        inside += unfinished(folder)
        restored, meta = checkpoint.restore(folder, target, warn=said.append)
        assert meta["step"] == checkpoint.committed(folder)[-1] >= before
        expected = large_tree(meta["step"])
        assert all(np.array_equal(x, y) for x, y in zip(restored, expected, strict=True))
    parent.communicate()
    assert said == [], "a kill leaves nothing that looks damaged"
    assert inside >= 2, f"only {inside} of 6 kills fell inside a save"
    left = sorted(set(manifest.present(folder)) - set(checkpoint.committed(folder)))
    checkpoints = Checkpoints(folder, warn=said.append)
    assert manifest.present(folder) == checkpoints.steps()
    assert said == [f"checkpoint: removed the unfinished save of step {s}." for s in left]


def test_two_processes_save_together(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path / "checkpoints"
    both = [start(2, f"save_together({i}, {port}, {str(folder)!r})") for i in range(2)]
    for index, process in enumerate(both):
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and f"done {index}" in output, output
    assert checkpoint.committed(folder) == [2, 3]
    alone, _ = checkpoint.restore(folder, {"split": shape(), "whole": shape()})
    for value in alone.values():
        assert np.array_equal(np.asarray(value), part(3)(slice(None)))
