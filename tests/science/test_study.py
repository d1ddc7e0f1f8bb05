"""The rules of a study, without training: which trial holds a point, early stopping, the table."""

import math
import types

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from configs import sweep
from configs.schema import Experiment, Optimizer
from models import lm
from science import study as studies
from science import table, worker

pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat")  # these tests ask by hand


@pytest.fixture
def study(tmp_path):
    """An empty one."""
    return studies.opened("s", f"sqlite:///{tmp_path / 'study.db'}", 15, higher=True)


@pytest.fixture(scope="module")
def points():
    """Two rates, two widths, two seeds."""
    base = Experiment(model=lm.Config(), optimizer=Optimizer(warmup_steps=2))
    axes = {"model.width": (32, 64), "optimizer.learning_rate": (1e-3, 3e-3)}
    return sweep.points(sweep.Sweep(base, axes, seeds=2))


def states(study):
    """The state of each trial, by number."""
    return [trial.state.name for trial in studies.trials(study)]


def test_every_point_has_one_trial_and_later_ones_are_spare(study, points):
    """Two workers that add at once: the lower number holds the point, whatever runs first."""
    assert studies.add_missing(study, points) == 8
    assert studies.add_missing(study, points) == 0
    twin = create_trial(state=TrialState.WAITING, user_attrs={"point": points[0].key})
    study.add_trial(twin)
    first, second = (
        optuna.Trial(study, studies.trials(study)[number]._trial_id) for number in (0, 8)
    )
    assert not studies.is_spare(study, first) and studies.is_spare(study, second)


def test_a_dead_worker_leaves_its_point_to_another(study, points):
    """A failed trial without a fault holds nothing; with one it is the last of its point."""
    studies.add_missing(study, points[:2])
    study.tell(study.ask(), state=TrialState.FAIL)
    assert studies.add_missing(study, points[:2]) == 1
    faulty = study.ask()
    faulty.set_user_attr("fault", "it does not fit")
    study.tell(faulty, state=TrialState.FAIL)
    assert studies.add_missing(study, points[:2]) == 0
    assert states(study) == ["FAIL", "FAIL", "WAITING"]
    assert list(studies.pending(study, points)) == [points[0].key]


def test_a_point_that_kills_its_workers_is_given_up(study, points):
    """After ATTEMPTS deaths it has failed."""
    for _ in range(studies.ATTEMPTS):
        assert studies.add_missing(study, points[:1]) == 1
        study.tell(study.ask(), state=TrialState.FAIL)
    studies.add_missing(study, points[:1])
    assert not studies.pending(study, points[:1])
    assert "workers died" in studies.of_points(study)[points[0].key].user_attrs["fault"]


def test_a_point_that_fails_by_itself_is_tried_once_and_the_others_are_run(
    study, points, tmp_path, monkeypatch
):
    """An error of any kind and a score that is none are faults, a line each; nothing is retried."""
    given = iter([RuntimeError("out of\nmemory"), math.nan, 0.5])

    def train(point, folder, judged):
        one = next(given)
        if isinstance(one, Exception):
            raise one
        plan = types.SimpleNamespace(experiment=point.experiment)
        return types.SimpleNamespace(finished=True, score=one, tokens_per_second=1.0, plan=plan)

    monkeypatch.setattr(worker, "train", train)
    said = []
    assert worker.work(study, points[:3], tmp_path, say=said.append)
    held = [studies.of_points(study)[point.key] for point in points[:3]]
    faults = [trial.user_attrs.get("fault") for trial in held]
    assert faults == ["out of memory", "its score is nan", None] and held[2].value == 0.5
    assert len(studies.trials(study)) == len(said) == 3
    assert said[0].startswith("1/3 ") and said[2].startswith("3/3 ")


def test_halving_keeps_the_best_of_one_heat(study, points):
    """At 4 and 8 steps the better half goes on; another width or seed is no rival."""
    rule = studies.Halving(4, 2)
    studies.add_missing(study, points, ("optimizer.learning_rate",))
    heats = [trial.user_attrs["heat"] for trial in studies.trials(study)]
    assert len(set(heats)) == 4 and heats.count(heats[0]) == 2
    rivals = [i for i, heat in enumerate(heats) if heat == heats[0]]

    def verdict(number, step, score):
        trial = optuna.Trial(study, studies.trials(study)[number]._trial_id)
        trial.report(score, step)
        return rule.prune(study, studies.trials(study)[number])

    other = next(i for i in range(8) if i not in rivals)
    assert not verdict(other, 4, 0.99)
    assert not verdict(rivals[0], 4, 0.5)  # the first there is the best so far
    assert verdict(rivals[1], 4, 0.4)
    assert not verdict(rivals[0], 6, 0.1)
    assert not verdict(rivals[1], 6, 0.05)  # worse, but no rung
    assert not verdict(rivals[1], 8, 0.4)


def test_the_table_takes_the_best_setting_and_says_what_is_missing(study, points):
    """Means over seeds choose; the interval is Student's, by hand: t(0.975, 1) = 12.7062."""
    given = {(32, 1e-3): (0.2, 0.4), (32, 3e-3): (0.5, 0.7), (64, 1e-3): (0.9,), (64, 3e-3): ()}
    for point in points:
        width, rate = point.experiment.model.width, point.experiment.optimizer.learning_rate
        values = given[width, rate]
        says = {"point": point.key, "folder": point.folder, "parameters": width}
        if point.seed < len(values):
            study.add_trial(create_trial(value=values[point.seed], user_attrs=says))
    first, second = table.entries(study, points, ("optimizer.learning_rate",), higher=True)
    assert first.tuned == {"optimizer.learning_rate": "0.003"} and first.scores == (0.5, 0.7)
    assert (first.tried, second.tried) == (2, 1)
    low, high = table.interval(first.scores)
    assert math.isclose(low, 0.6 - 12.7062 * 0.1, rel_tol=1e-5) and math.isclose(
        high - 0.6, 0.6 - low
    )
    assert second.scores == (0.9,) and second.lacks == ("not run",)
    head, rows = table.cells([first, second], "accuracy")
    assert head == ["width", "accuracy", "seeds", "learning_rate, tuned", "tried", "parameters"]
    assert rows[0] == ["32", "0.6000 +-1.2706", "2", "0.003", "2", "32"]
    assert rows[1][1] == "0.9000 (not run)"
    lowest, _ = table.entries(study, points, ("optimizer.learning_rate",), higher=False)
    assert lowest.scores == (0.2, 0.4)


def test_a_setting_with_fewer_seeds_is_not_chosen(study, points):
    """One lucky seed does not beat two."""
    for point, value in zip(points[:3], (0.2, 0.4, 0.9), strict=True):
        says = {"point": point.key, "folder": point.folder}
        study.add_trial(create_trial(value=value, user_attrs=says))
    first = table.entries(study, points[:4], ("optimizer.learning_rate",), higher=True)[0]
    assert first.scores == (0.2, 0.4)
