"""A worker: takes trials of a study one after another, trains each in a folder of its own.

A trial's folder is its experiment's: who takes over from a worker that died goes on from its newest
checkpoint, and `run.lock` keeps two workers out of one folder.
"""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import optuna
from optuna.trial import TrialState

from configs import schema
from configs.schema import Experiment
from configs.sweep import Point
from evaluation import budget
from science import study as studies
from training import guards, loop, metrics

IDLE_S = 0.5  # between two looks at a study where nothing is left but what others run


class Interrupted(Exception):
    """The worker was told to stop; its trial is saved and free for the next worker."""


class Faulty(Exception):
    """The trial failed, and would again; its fault says why."""


def work(
    study: optuna.Study,
    points: Sequence[Point],
    root: Path,
    *,
    tuned: Sequence[str] = (),
    say: Callable[[str], None] = print,
    patience_s: float = 15.0,
) -> bool:
    """Run trials until every point has been run; False if a signal ended it before.

    `say` gets a line for each trial that ends; `patience_s` is how long to wait for a folder that
    another process holds.
    """
    job = _Job(study, {point.key: point for point in points}, root, say, patience_s)
    while True:
        optuna.storages.fail_stale_trials(study)
        studies.add_missing(study, points, tuned)
        pending = studies.pending(study, points)
        if not pending:
            return True
        if all(trial.state == TrialState.RUNNING for trial in pending.values()):
            time.sleep(IDLE_S)
            continue
        try:
            study.optimize(job.run, n_trials=1, catch=(Faulty,))
        except Interrupted:
            return False
        except optuna.exceptions.UpdateFinishedTrialError:
            continue  # the trial was given to another worker
        finally:
            jax.clear_caches()  # programs of a hundred trials fill the address space


class _Job:
    """What a worker knows of the sweep while it runs trials."""

    def __init__(self, study, points: dict[str, Point], root: Path, say, patience_s: float):
        self.study, self.points, self.root, self.say = study, points, root, say
        self.patience_s = patience_s
        self.known: dict[str, dict[str, Any]] = {}  # sizes by model and shape of its rows

    def run(self, trial: optuna.Trial) -> float:
        """One trial: its score. What is wrong with the point itself is kept as its fault."""
        point = self.points.get(trial.user_attrs.get(studies.POINT, ""))
        if point is None or studies.is_spare(self.study, trial):
            self.leave(trial)
        began = time.monotonic()

        def judged(step: int, score: float) -> None:
            if math.isfinite(score):
                trial.report(score, step)
            if step < point.experiment.steps and trial.should_prune():
                raise optuna.TrialPruned

        try:
            result = train(point, self.root / point.folder, judged)
            if result.finished and not math.isfinite(result.score):
                raise ValueError(f"its score is {result.score}")
        except guards.InUse:  # a worker that was taken for dead lives, and trains there
            time.sleep(self.patience_s)
            self.leave(trial)
        except optuna.TrialPruned:
            self.tell(point, "stopped early")
            raise
        except optuna.exceptions.UpdateFinishedTrialError:  # this worker was taken for dead
            raise
        except Exception as error:  # whatever one point does, the others are run
            fault = " ".join(str(error).split()) or type(error).__name__
            trial.set_user_attr(studies.FAULT, fault)
            self.tell(point, f"failed: {fault}")
            raise Faulty from error
        if not result.finished:
            raise Interrupted
        found = {"seconds": time.monotonic() - began, "rate": result.tokens_per_second}
        for name, value in (found | self.sizes(result.plan.experiment)).items():
            trial.set_user_attr(name, value)
        self.tell(point, f"{metrics.of(point.experiment.data).title} {result.score:.4f}")
        return result.score

    def leave(self, trial: optuna.Trial) -> NoReturn:
        """Give a trial up: another one holds its point, or will."""
        trial.set_user_attr(studies.SPARE, True)
        raise optuna.TrialPruned

    def tell(self, point: Point, what: str) -> None:
        """Say how a trial ends, and how far the sweep is with it."""
        held = studies.of_points(self.study)
        ended = sum(key in held and held[key].state not in studies.LIVE for key in self.points)
        self.say(f"{min(ended + 1, len(self.points))}/{len(self.points)} {point}: {what}")

    def sizes(self, experiment: Experiment) -> dict[str, float]:
        """What a comparison shows beside the score; worked out once for a model and its rows."""
        data = experiment.data
        key = f"{schema.fingerprint(experiment.model)}/{data.batch}/{data.length}"
        if key not in self.known:
            measures = {"parameters": budget.parameters, "flops": budget.flops}
            if experiment.model.objective == "next":
                measures["state"] = lambda e: budget.state(e, data.length)
            self.known[key] = {}
            for name, measure in measures.items():
                with contextlib.suppress(Exception):  # what cannot be counted is left out
                    self.known[key][name] = float(measure(experiment))
        return self.known[key]


def train(point: Point, folder: Path, judged: Callable[[int, float], None]) -> loop.Result:
    """Train a point in its folder; what a run prints goes to `log.txt` there."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a") as file, contextlib.redirect_stdout(file):
        return loop.train(point.experiment, str(folder), None, judged=judged)
