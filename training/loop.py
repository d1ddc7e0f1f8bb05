"""One run: open the data, build the step, resume, train, validate, save; `_run` is the loop."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from configs import schema
from data import generated, masking
from data.pipeline import Split, open_split, tokenizer_of
from models import lm, weights
from parallel import sharding
from parallel.host import from_first
from parallel.mesh import make_mesh
from training import guards, layout, metrics, plot, runs, tracing
from training.checkpoint import Checkpoints
from training.log import Log
from training.step import State, Trainer, fitted, make_trainer, put_batch

REPEATS = 40  # epochs after which the same data again no longer lowers the loss


class Plan(NamedTuple):
    """Everything decided before the first step."""

    experiment: schema.Experiment
    mesh: jax.sharding.Mesh
    trainer: Trainer
    train: Split
    validation: Split


@dataclasses.dataclass
class Result:
    """What a finished run leaves: the model, its score and where its files are."""

    plan: Plan
    model: lm.LM
    step: int
    score: float  # on validation, by the metric of the data
    tokens_per_second: float  # of training steps after compilation, this run only
    program: Any  # the compiled training step
    wall_time: str  # where it went, in one line
    paths: dict[str, Path]
    finished: bool  # False: stopped by a signal and saved


def make_plan(experiment: schema.Experiment) -> Plan:
    """Mesh, data and step of `experiment`; ValueError where they do not fit together."""
    experiment = settled(experiment)
    mesh = make_mesh(**dataclasses.asdict(experiment.mesh))
    trainer = _trainer(experiment, mesh)  # what does not fit is refused before minutes of encoding
    host, hosts = jax.process_index(), jax.process_count()
    held_out = dataclasses.replace(
        experiment.data, length=experiment.evaluation.length or experiment.data.length
    )
    read = {"train": experiment.data, "validation": held_out}
    splits = [open_split(data, name, host, hosts) for name, data in read.items()]
    if experiment.model.objective == "masked":
        splits = [masking.masked(split, lm.HIDDEN) for split in splits]
    return Plan(experiment, mesh, trainer, *splits)


def _trainer(experiment: schema.Experiment, mesh: jax.sharding.Mesh) -> Trainer:
    tokenizer = tokenizer_of(experiment.data)
    lengths = np.zeros(experiment.model.vocabulary, np.float32)
    answers = metrics.of(experiment.data).count is not None  # of a task: a symbol counts as one
    lengths[: tokenizer.vocabulary] = 1 if answers else tokenizer.byte_lengths
    return make_trainer(experiment, mesh, lengths)


def settled(experiment: schema.Experiment) -> schema.Experiment:
    """The experiment with the size of its vocabulary; ValueError if the tokenizer has more ids."""
    model, words = experiment.model, tokenizer_of(experiment.data).vocabulary
    if model.vocabulary == 0:
        model = dataclasses.replace(model, vocabulary=words)
        return dataclasses.replace(experiment, model=model)
    if model.vocabulary < words:
        raise ValueError(
            f"model.vocabulary={model.vocabulary} is smaller than the tokenizer's {words}. Use "
            f"{words}, or 0: what the tokenizer has."
        )
    return experiment


def describe(plan: Plan, resume_step: int = 0, program=None) -> dict[str, str]:
    """The start block: what will run, on what, and how large it is."""
    experiment, params = plan.experiment, plan.trainer.stored.params
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    outer = params["embed"].size + (params["head"].size if "head" in params else 0)
    active = weights.active(nnx.merge(plan.trainer.graph, params))
    device = jax.devices()[0]
    tokens = experiment.data.batch * experiment.data.length
    epochs = experiment.steps / len(plan.train)
    far = f", more than the {REPEATS} that teach anything (arXiv 2305.16264)"
    rows_are = f"{plan.train.tokens:,} training tokens"
    again = f" ({epochs:,.2f} epochs{far * (epochs > REPEATS)})"
    if plan.train.rows >= generated.UNENDING:
        rows_are, again = "every training row is new", ""
    rows = {
        "devices": f"{jax.device_count()} x {device.device_kind}, {jax.process_count()} host(s)",
        "mesh": ", ".join(f"{axis}={size}" for axis, size in plan.mesh.shape.items()),
        "vocabulary": _vocabulary(plan),
        "parameters": f"{total:,} total, {total - outer:,} non-embedding, {active:,} active",
        "data": f"{experiment.data.source}: {rows_are} ({plan.train.fingerprint[:12]})",
        "tokens per step": f"{tokens:,} ({experiment.data.batch} x {experiment.data.length})",
        "steps": f"{experiment.steps:,}{again}",
    }
    if program is not None:
        memory = program.memory_analysis()
        size = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        rows["memory estimate"] = f"{size / 2**20:,.0f} MiB per device (compiled)"
    return rows | {"resume step": f"{resume_step:,}"}


def _vocabulary(plan: Plan) -> str:
    """Ids of the model; what the tokenizer leaves unused, and what the mesh adds."""
    size, words = plan.experiment.model.vocabulary, plan.train.tokenizer.vocabulary
    rows = plan.trainer.abstract.params["embed"].shape[0]
    text = f"{size:,}"
    if size > words:
        far = "far above" if size >= 2 * words else "above"
        text += f", {far} the tokenizer's {words:,}: ids from there on are never read or written"
    return text + f" (in tables of {rows:,} rows, which the mesh divides)" * (rows > size)


def compile_step(plan: Plan):
    """The training step, compiled for the shapes of the plan."""
    with sharding.on(plan.mesh):
        return plan.trainer.step.lower(plan.trainer.abstract, plan.trainer.batch).compile()


def train(
    experiment: schema.Experiment,
    workdir: str,
    profile: tuple[int, int] | None,
    started: float | None = None,
    judged: Callable[[int, float], None] = lambda step, score: None,
) -> Result:
    """Train, resuming from `workdir` where it holds a checkpoint of the same experiment.

    `profile=(a, b)` writes a trace of steps a to b; `started` is the `time.perf_counter()` at which
    the program began; `judged` hears of every validation, and what it raises ends the run. Raises
    the errors of `training.guards` and `training.checkpoint`; SIGTERM and SIGINT save the current
    step and return.
    """
    folder = Path(workdir)
    tracing.check(profile, experiment.steps)
    guards.preflight(workdir)
    runs.refuse_foreign(folder)
    with contextlib.ExitStack() as stack:
        stack.enter_context(guards.RunLock(folder, jax.process_index() == 0, from_first))
        stop = stack.enter_context(guards.GracefulStop())
        log = stack.enter_context(Log(folder, experiment.steps, started))
        runs.refuse(folder, settled(experiment))
        plan = make_plan(experiment)
        saved = experiment.checkpoint
        checkpoints = Checkpoints(
            folder / runs.CHECKPOINTS, keep=saved.keep, keep_best=saved.keep_best
        )
        stack.callback(checkpoints.close)
        checkpoints.refuse_taken(experiment.steps)
        stack.enter_context(sharding.on(plan.mesh))
        return _run(plan, log, checkpoints, stop, profile, judged)


def _run(plan: Plan, log: Log, checkpoints: Checkpoints, stop, profile, judged) -> Result:
    experiment, trainer = plan.experiment, plan.trainer
    state, start, tokens, remarks = _resume(plan, log, checkpoints)
    trace = tracing.Trace(profile, log.folder, start, experiment.steps)
    with log.phase("compile"):
        program = compile_step(plan)
    log.begin(describe(plan, start, program), start, schema.to_dict(experiment))
    for line in remarks:
        log.line(line)
    meter, score = _Meter(experiment, log, start, tokens), math.nan
    with contextlib.ExitStack() as stack:
        watchdog = guards.Watchdog(experiment.guards.hang_timeout_s, log.folder)
        stack.enter_context(watchdog)
        batches = stack.enter_context(contextlib.closing(plan.train.batches(start)))
        stack.enter_context(trace)
        for step in range(start + 1, experiment.steps + 1):
            trace.before(step)
            with log.phase("data"):
                rows = next(batches)
            last = step == experiment.steps or stop.requested
            judge = step == experiment.steps or _due(experiment.evaluation.every_steps, step)
            save = last or _due(experiment.checkpoint.every_steps, step)
            with log.phase("step"), meter.timed():
                state, metrics = program(state, put_batch(trainer.batch, rows))
                meter.finish()  # the step before, while this one runs: no device waits for a host
                meter.pending = (step, metrics)
                if judge or save:
                    meter.finish()
            trace.after(step, meter.finish)
            watchdog.beat()
            if judge:
                with log.phase("evaluation"):
                    count = experiment.evaluation.batches
                    score = evaluate(plan, trainer.weights(state), count, watchdog.beat)
                name = f"validation_{plan.validation.metric}"
                log.record(step, {name: score} | meter.position(step))
                judged(step, score)
            if save:
                with log.phase("save"):
                    meta = _meta(plan, score if judge else math.nan) | meter.position(step)
                    checkpoints.save(step, fitted(state, trainer.stored), meta)
            if last:
                break
    if start >= experiment.steps:  # nothing was left to do but to say how good it is
        score = evaluate(plan, trainer.weights(state), experiment.evaluation.batches)
    else:
        with log.phase("save"):
            checkpoints.wait()
            while checkpoints.failures:  # the last step must not be lost; raises after three
                checkpoints.save(step, fitted(state, trainer.stored), meta)
                checkpoints.wait()
    return _finish(plan, log, checkpoints, state, score, program, meter.rate())


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


class _Meter:
    """Waits for a finished step, checks and records it, and keeps the rate of steady steps."""

    def __init__(self, experiment: schema.Experiment, log: Log, start: int, tokens: int):
        self.start, self.tokens = start, tokens  # the step resumed from, and tokens up to there
        self.log, self.every = log, experiment.log_every
        self.bad = guards.BadSteps(experiment.guards.max_bad_steps)
        self.last = experiment.steps
        self.of = "bits_per_answer" if metrics.of(experiment.data).count else "bits_per_byte"
        self.tokens_per_step = experiment.data.batch * experiment.data.length
        self.pending: tuple[int, dict] | None = None
        self.steps, self.seconds = -1, 0.0  # the first step of a process is left out

    @contextlib.contextmanager
    def timed(self):
        """Counts the seconds of the block as those of steps."""
        begin = time.perf_counter()
        yield
        if self.steps > 0:
            self.seconds += time.perf_counter() - begin

    def rate(self) -> float:
        """Tokens a second over the steps so far, evaluation and saving left out."""
        return self.steps * self.tokens_per_step / self.seconds if self.seconds else 0.0

    def position(self, step: int) -> dict[str, float]:
        """Tokens read up to `step`, over all runs of this workdir."""
        return {"tokens": self.tokens + (step - self.start) * self.tokens_per_step}

    def finish(self) -> None:
        """Wait for the pending step; check it, and write it where it is due."""
        if self.pending is None:
            return
        step, metrics = self.pending
        self.pending = None
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.bad.update(bool(metrics.pop("finite")), step)
        self.steps += 1
        weight, size = metrics.pop("tokens"), metrics.pop("bytes")
        if step % self.every == 0 or step in (1, self.last):
            bits = metrics["loss"] * weight / max(size, 1.0) / math.log(2)
            more = {self.of: bits, "tokens_per_s": self.rate(), "targets": weight}
            self.log.record(step, metrics | more | self.position(step))


def _resume(plan: Plan, log: Log, checkpoints: Checkpoints) -> tuple[State, int, int, list[str]]:
    """The newest good state, its step, the tokens read so far, and remarks; or a fresh one.

    ValueError where the checkpoint is of another model, tokenizer or corpus.
    """
    experiment, trainer = plan.experiment, plan.trainer
    former, remarks = [experiment.model], []

    def shapes(meta):
        found = runs.difference(log.folder, meta, experiment, plan.train.fingerprint)
        runs.refuse_reuse(log.folder, meta, [*found.model, *found.state, *found.corpus])
        remarks.extend(runs.remarks(meta, found, experiment))
        former[0] = runs.former_layout(log.folder, meta, experiment.model)
        return stored_in(plan, former[0])

    with log.phase("restore"):
        restored = checkpoints.restore(shapes)
        if restored is not None:
            state = layout.relaid(restored.tree, former[0], trainer.stored, experiment.model)
            start, tokens = runs.position(log.folder, restored.meta, experiment.data)
            return fitted(state, trainer.abstract), start, tokens, remarks
    with log.phase("initialization"):
        return jax.block_until_ready(trainer.init()), 0, 0, remarks


def stored_in(plan: Plan, model: lm.Config) -> State:
    """What a checkpoint of `model` holds, where it is the plan's but for the layout of layers."""
    if model.layers == plan.experiment.model.layers:
        return plan.trainer.stored
    return _trainer(dataclasses.replace(plan.experiment, model=model), plan.mesh).stored


def _meta(plan: Plan, score: float) -> dict:
    described = runs.describe(plan.experiment, plan.train.tokenizer, plan.train.fingerprint)
    falls = -score if metrics.of(plan.experiment.data).higher else score  # the best is the lowest
    return {"metric": falls, **described}


def evaluate(plan: Plan, params, batches: int, beat: Callable[[], None] = lambda: None) -> float:
    """The score of the first `batches` validation batches (0: all); `beat` after each."""
    total = size = 0.0
    count = min(batches or len(plan.validation), len(plan.validation))
    for index in range(count):
        batch = put_batch(plan.trainer.batch, plan.validation.batch(index))
        found, read = plan.trainer.evaluate(params, batch)
        total, size = total + float(found), size + float(read)
        beat()
    return total / max(size, 1.0) * metrics.of(plan.experiment.data).scale


def _finish(plan, log, checkpoints, state, score, program, rate) -> Result:
    step = int(state.step)
    picture = log.folder / "loss.png"
    if log.writes:
        with contextlib.suppress(ValueError, OSError):  # records may be gone, or the disk full
            plot.loss_curve([log.folder], picture)
    steps = checkpoints.steps()
    paths = {
        "checkpoint": checkpoints.folder / str(steps[-1]) if steps else checkpoints.folder,
        "metrics": log.metrics_path,
        "loss curve": picture,
    }
    return Result(
        plan,
        nnx.merge(plan.trainer.graph, plan.trainer.weights(state)),
        step,
        score,
        rate,
        program,
        log.account.text(),
        paths,
        step >= plan.experiment.steps,
    )
