"""A study: the trials of a sweep in a database, shared by any number of workers, which may die.

Optuna keeps the trials and hears each worker's heartbeat. Every point of a sweep has one trial that
counts, the first that is waiting, running or ended for good: who finds a point without one, because
its worker died, adds another, and of two that were added at once the later one is spare.
"""

import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from configs.sweep import Point

ATTEMPTS = 20  # workers that may die of one point before it counts as failed
TRIES, RETRY_S = 3, 0.5  # to open a storage
LOCK_WAIT_S = 60  # for another worker's write to SQLite
# Attributes of a trial: its experiment, what it competes in, what ended it, another has its point.
POINT, HEAT, FAULT, SPARE = "point", "heat", "fault", "spare"
LIVE = (TrialState.WAITING, TrialState.RUNNING)
GOOD = (TrialState.COMPLETE, TrialState.PRUNED)


def opened(
    name: str, storage: str, heartbeat_s: int, higher: bool, pruner: Any = None
) -> optuna.Study:
    """The study of that name, new or old; ValueError in one line where the storage does not work.

    A worker that is not heard of for three heartbeats is taken for dead.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    for tries_left in reversed(range(TRIES)):
        try:
            return optuna.create_study(
                study_name=name,
                storage=_storage(storage, heartbeat_s),
                direction="maximize" if higher else "minimize",
                pruner=pruner or optuna.pruners.NopPruner(),
                load_if_exists=True,
            )
        except ImportError as error:
            needs = f"{error.name or error}: pip install -e '.[postgres]'"
            raise ValueError(f"--storage={_hidden(storage)} needs {needs}") from error
        except Exception as error:  # of SQLAlchemy, its drivers and Optuna: no common class
            if not tries_left:
                reason = str(error).strip().partition("\n")[0]
                raise ValueError(f"--storage={_hidden(storage)} does not open: {reason}") from error
            time.sleep(RETRY_S)  # two that start at once both make its tables
    raise AssertionError


def _storage(address: str, heartbeat_s: int) -> optuna.storages.RDBStorage:
    return optuna.storages.RDBStorage(
        address,
        engine_kwargs=_engine(address),
        heartbeat_interval=heartbeat_s,
        grace_period=3 * heartbeat_s,
    )


def _engine(storage: str) -> dict[str, Any]:
    if storage.startswith("sqlite"):
        return {"connect_args": {"timeout": LOCK_WAIT_S}}
    return {"pool_pre_ping": True}  # a server may have dropped what was idle


def _hidden(storage: str) -> str:
    """An address without its password."""
    before, at, after = storage.rpartition("@")
    scheme, slashes, who = before.partition("://")
    return f"{scheme}{slashes}{who.partition(':')[0]}{at}{after}" if at else storage


def trials(study: optuna.Study) -> list[FrozenTrial]:
    """All trials, as the storage has them now."""
    return study.get_trials(deepcopy=False)


def of_points(study: optuna.Study) -> dict[str, FrozenTrial]:
    """The trial that counts for each point that has one; see the top of this file."""
    found: dict[str, FrozenTrial] = {}
    for trial in trials(study):  # in the order of their numbers
        key = trial.user_attrs.get(POINT)
        if key and key not in found and counts(trial):
            found[key] = trial
    return found


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial holds its point: it is not that of a worker that died, nor spare."""
    if SPARE in trial.user_attrs:
        return False
    return trial.state in (*LIVE, *GOOD) or FAULT in trial.user_attrs


class Halving(optuna.pruners.BasePruner):
    """Asynchronous successive halving (arXiv 1810.05934): at steps `first * rate^k` a trial goes on
    if it is among the best 1/rate of those that have been there.

    Only values of tuned axes compete, for one row and seed of the comparison.
    """

    def __init__(self, first: int, rate: int):
        self.first, self.rate = first, rate

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether the trial ends at the step that it reported last."""
        step, rung = trial.last_step, self.first
        if step is None:
            return False
        while rung < step:
            rung *= self.rate
        if rung != step:
            return False
        sign = -1 if study.direction == optuna.study.StudyDirection.MAXIMIZE else 1
        heat = trial.user_attrs[HEAT]
        rivals = (t for t in trials(study) if t.user_attrs.get(HEAT) == heat and counts(t))
        there = [
            sign * t.intermediate_values[step] for t in rivals if step in t.intermediate_values
        ]
        places = -(-len(there) // self.rate)
        return sign * trial.intermediate_values[step] > sorted(there)[places - 1]


def add_missing(study: optuna.Study, points: Sequence[Point], tuned: Sequence[str] = ()) -> int:
    """Add a waiting trial for each point that has none; how many were added.

    Called before the first trial and whenever a worker finds nothing to do; a point of which
    `ATTEMPTS` workers died is marked as failed.
    """
    held, added = of_points(study), 0
    failed = (t for t in trials(study) if t.state == TrialState.FAIL)
    died = Counter(t.user_attrs.get(POINT) for t in failed if SPARE not in t.user_attrs)
    for point in points:
        if point.key in held:
            continue
        state = TrialState.WAITING
        says = {POINT: point.key, "name": str(point), "folder": point.folder}
        says[HEAT] = str([point.seed, *(v for a, v in point.labels.items() if a not in tuned)])
        if died[point.key] >= ATTEMPTS:
            state, says[FAULT] = TrialState.FAIL, f"{ATTEMPTS} workers died of it"
        study.add_trial(optuna.trial.create_trial(state=state, user_attrs=says))
        added += 1
    return added


def is_spare(study: optuna.Study, trial: optuna.Trial) -> bool:
    """Whether another trial holds the point of a running one."""
    held = of_points(study).get(trial.user_attrs[POINT])
    return held is None or held.number != trial.number


def pending(study: optuna.Study, points: Sequence[Point]) -> dict[str, FrozenTrial]:
    """The trials of these points that wait or run."""
    keys = {point.key for point in points}
    held = of_points(study)
    return {key: t for key, t in held.items() if key in keys and t.state in LIVE}


def default_storage(root: Path) -> str:
    """SQLite in the folder of a study: for workers of one machine."""
    return f"sqlite:///{root / 'study.db'}"
