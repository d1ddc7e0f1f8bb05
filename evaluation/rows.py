"""The rows of one config that need no clock: parameters, FLOPs, memory, network."""

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
from flax import nnx

from evaluation import speed
from evaluation.subject import Subject
from models import weights
from report.report import Hot
from report.table import human
from resources import compute, devices, gap, network, trace
from resources import memory as bytes_of
from resources.row import Row, not_available

CONTEXTS = {"1k": 1024, "4k": 4096, "64k": 65536, "1M": 2**20}  # tokens before a state is weighed
NO_STATE = "an encoder keeps no state"
_NO_MORE = "--html= --markdown= --csv= --sized= --curves= --profile=0 --pareto=".split()


def parameters(subject: Subject) -> list[Row]:
    """How many weights there are, outside of the vocabulary, and at work on each token."""
    sizes = _sizes(subject)
    dims = weights.dims(subject.abstract)
    words = jax.tree.map(lambda n, names: n * ("vocab" in names), sizes, dims)
    total = sum(jax.tree.leaves(sizes))
    return [
        Row("parameters, total", total, "", "compiled"),
        Row("parameters, non-embedding", total - sum(jax.tree.leaves(words)), "", "compiled"),
        Row("parameters, active", weights.active(subject.abstract), "", "compiled"),
    ]


def _sizes(subject: Subject) -> dict:
    weights = nnx.to_pure_dict(nnx.split(subject.abstract)[1])
    return jax.tree.map(lambda leaf: math.prod(leaf.shape), weights)


def model_flops(subject: Subject) -> float:
    """FLOPs that the loss of one batch needs."""
    trainer = subject.trainer
    return compute.model_flops(_loss(subject), trainer.abstract.params, trainer.batch).total


def _loss(subject: Subject):
    def loss(params, batch):
        model = nnx.merge(subject.trainer.graph, params)
        more = {name: batch.get(name) for name in ("hidden", "answers")}
        return model.loss(batch["inputs"], batch["targets"], batch["weights"], **more)

    return loss


def flops(subject: Subject) -> list[Row]:
    """FLOPs per token of the loss and of a training step, by three counts."""
    needed = model_flops(subject)
    rows = []
    for kind, compiled, times in (("forward", subject.forward, 1), ("train", subject.train, 3)):
        executed = compute.executed_flops(compiled.jaxpr)
        counts = subject.tokens, subject.mesh.size, times * needed, executed
        rows += compute.rows(kind, *counts, compiled.program)
    return rows


def gaps(subject: Subject) -> list[Row]:
    """By operation, what a training step executes beyond the model FLOPs, and why."""
    trainer, unit = subject.trainer, "FLOP/token"
    inputs = trainer.abstract.params, trainer.batch
    parts = gap.parts(trainer.step, (trainer.abstract, trainer.batch), _loss(subject), inputs)
    rows = []
    for part in parts:
        why = [(name, getattr(part, name)) for name in ("form", "gradient", "recomputed", "other")]
        told = (f"{name} {human(v / subject.tokens, unit)}" for name, v in why if v)
        beyond = (part.executed - part.model) / subject.tokens
        name = f"train FLOPs beyond the model's, {part.operation}"
        rows.append(Row(name, beyond, unit, "modelled", ", ".join(told)))
    return rows


def utilisation(subject: Subject, seconds: float, device: devices.Device | None) -> list[Row]:
    """MFU and HFU of a training step that takes so long, and where it lies under the roofline."""
    executed = compute.executed_flops(subject.train.jaxpr).total
    dtype, needed = subject.experiment.model.dtype, 3 * model_flops(subject)
    count = subject.mesh.size
    moved = bytes_of.moved(subject.train.program.as_text())
    return [
        *compute.utilisation_rows(dtype, seconds, needed, executed, count, device),
        *compute.roofline_rows(dtype, seconds, executed / count, moved, device),
    ]


def state_bytes(subject: Subject, tokens: int) -> int:
    """Bytes that decoding carries for one sequence of so many tokens, from shapes."""
    build = lambda: subject.experiment.model.build(nnx.Rngs(0)).init_state(1, tokens)
    return bytes_of.tree_bytes(build)


def state(name: str, subject: Subject, tokens: int) -> Row:
    """`state_bytes` as a row; some models are built for a longest document."""
    if not subject.causal:
        return not_available(name, "B", NO_STATE)
    try:
        return Row(name, state_bytes(subject, tokens), "B", "compiled")
    except ValueError as error:
        return not_available(name, "B", str(error))


def memory(subject: Subject) -> list[Row]:
    """What the compiler planned for the training step, a sequence's state, the weights' file."""
    rows = bytes_of.rows("train", subject.train.program)
    for label, tokens in CONTEXTS.items():
        rows.append(state(f"state at {label} tokens", subject, tokens))
    size = weight_bytes(subject)
    return [*rows, Row("weights on disk", size, "B", "modelled", "as trained, not compressed")]


def weight_bytes(subject: Subject) -> int:
    """Bytes of the weights, as training keeps them."""
    return bytes_of.tree_bytes(lambda: nnx.to_pure_dict(nnx.split(subject.abstract)[1]))


def profile(subject: Subject, most: int) -> list[Hot]:
    """The paths of modules in which a training step spends the most time."""
    compiled, call, _ = speed.training(subject)
    found = trace.profile(compiled.program.as_text(), call)
    return [
        Hot(one.path, one.direction, one.calls, one.seconds, one.share, one.bytes)
        for one in trace.by_path(found.operations)[:most]
    ]


def planned_peak(subject: Subject) -> Row:
    """What the compiler plans to hold at once for a training step."""
    return bytes_of.rows("train", subject.train.program)[0]


def traffic(subject: Subject, device: devices.Device | None, seconds: float | None) -> list[Row]:
    """Bytes that a training step sends between devices."""
    found = network.traffic(subject.train.program.as_text(), subject.mesh)
    return network.rows("train", found, subject.tokens, subject.mesh, device, seconds)


def peak(subject: Subject) -> Row:
    """The measured peak of this process's first training step."""
    _, call, _ = speed.training(subject)
    return bytes_of.peak_row("train", call)


def peak_elsewhere(subject: Subject, limit: float) -> Row:
    """`peak` of a fresh process, which has no other program's memory to use again.

    The process is this program again, with the same command line and --only=peak; what else that
    line asks for is left out.
    """
    name, unit = "train memory, measured", "B"
    if limit <= 0:
        return not_available(name, unit, f"left out by --peak_seconds={limit:g}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "peak.json"
        options = ("--only=peak", f"--column={subject.index}", f"--json={file}", *_NO_MORE)
        command = [sys.executable, *sys.argv, *options]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return not_available(name, unit, f"its process took more than {limit:g} s")
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        if done.returncode == 2:
            raise ValueError(lines[-1].removeprefix("config error: "))
        if done.returncode:
            return not_available(name, unit, f"its process failed: {lines[-1]}")
        column = json.loads(file.read_text())["columns"][0]
        return Row(**column["resources"]["memory"][0])
