"""Points of a sweep: every combination once, checked, each named by what is in it."""

import dataclasses

import pytest

from configs import sweep
from configs.schema import Data, Experiment, Optimizer
from models import lm
from models.attention import softmax
from models.linear_attention import gla
from training.optimizers import lion


@pytest.fixture(scope="module")
def base():
    """A small experiment."""
    return Experiment(
        model=lm.Config(width=32, depth=2, pattern=(softmax.Config(heads=2),)),
        steps=20,
        data=Data(length=16, batch=4),
        optimizer=Optimizer(warmup_steps=5),
    )


def made(base, axes, **settings):
    """The points of axes given as flags."""
    return sweep.points(sweep.Sweep(base, sweep.parse(list(axes.items())), **settings))


def test_every_combination_is_a_point_with_every_seed(base):
    """Three patterns, two rates and two seeds: twelve, each with its own values."""
    axes = {
        "model.pattern": "gla,attention,(gla*3,window:8)",
        "optimizer.learning_rate": "1e-3,3e-3",
    }
    points = made(base, axes, seeds=2)
    found = [(p.experiment.model.pattern, p.experiment.optimizer.learning_rate) for p in points]
    assert len(points) == len({p.key for p in points}) == len({p.folder for p in points}) == 12
    assert {len(pattern) for pattern, _ in found} == {1, 4}
    assert {rate for _, rate in found} == {1e-3, 3e-3}
    assert [p.experiment.seed for p in points[:2]] == [0, 1]
    assert [p.experiment.data.seed for p in points[:2]] == [0, 1]
    assert points[0].labels == {"model.pattern": "gla", "optimizer.learning_rate": "1e-3"}
    assert isinstance(points[0].experiment.model.pattern[0], gla.Config)
    assert str(points[1]) == "pattern=gla, learning_rate=1e-3, seed=1"


def test_the_base_stays_as_it_was(base):
    """Points are copies."""
    before = dataclasses.asdict(base)
    made(base, {"optimizer.rule": "lion,muon", "model.width": "16,64"})
    assert dataclasses.asdict(base) == before
    assert not hasattr(type(base), "_frozen")


def test_values_may_be_configs_named_or_not_and_set_several_keys(base):
    """In a file an axis holds Configs, or names for settings of several keys."""
    axes = {
        "optimizer.rule": (lion.Config(),),
        "model": {
            "thin": {"model.width": 16, "model.depth": 4},
            "wide": {"model.width": 64, "model.pattern": (gla.Config(heads=2),)},
        },
    }
    thin, wide = sweep.points(sweep.Sweep(base, axes))
    assert thin.labels == {"optimizer.rule": "lion", "model": "thin"}
    assert (thin.experiment.model.width, thin.experiment.model.depth) == (16, 4)
    assert wide.experiment.model.pattern[0].heads == 2
    assert isinstance(wide.experiment.optimizer.rule, lion.Config)


def test_equal_experiments_are_one_point(base):
    """1e-3 and 0.001 are the same rate: nothing is trained twice."""
    assert len(made(base, {"optimizer.learning_rate": "1e-3,0.001"})) == 1


def test_a_name_of_a_folder_cannot_leave_it(base):
    """Whatever a value holds, the folder is one name of plain letters."""
    for text in ("text:../../x", "text:/etc", "text:a b;c"):
        (point,) = made(base, {"data.source": text})
        assert not set(point.folder) & set("/\\ ;:") and ".." not in point.folder.split("=")[0]


@pytest.mark.parametrize(
    "axes, settings, words",
    [
        ({"model.widht": "1,2"}, {}, "did you mean 'model.width'"),
        ({"optimizer.learning_rate": ""}, {}, "is empty"),
        ({"optimizer.learning_rate": "1e-3,,2e-3"}, {}, "empty value"),
        ({"optimizer.learning_rate": "1e-3,fast"}, {}, "not a number"),
        ({"optimizer.learning_rate": "-1"}, {}, "greater than 0"),
        ({"model.pattern": "(gla"}, {}, "bracket"),
        ({"model.pattern": "gla)"}, {}, "bracket"),
        ({"model.pattern": "glaa"}, {}, "did you mean 'gla'"),
        ({"model.pattern": "gla(heads=two)"}, {}, "not int"),
        ({"model.width": "32,32"}, {}, "twice"),
        ({"model.width": "32.5"}, {}, "Use 32 or 33"),
        ({"data": "x"}, {}, "sets a whole section"),
        ({"data.source": "text"}, {}, "text:FOLDER"),
        ({"data.source": "mqar", "data.layout": "packed"}, {}, "makes its own rows"),
        ({"optimizer.rule": "sgdd"}, {}, "must be one of"),
        ({"optimizer.warmup_steps": "5,50"}, {}, "warmup_steps=50 is more than"),
        ({"optimizer.accumulation": "1,3"}, {}, "does not divide"),
        ({"carry_state": "true"}, {}, "layout='stream'"),
        ({"seed": "0,4294967296"}, {}, "seed=4294967296"),
        ({}, {"seeds": 0}, "seeds=0"),
        ({}, {"seeds": 2**32}, "points, more than"),
        ({"model.width": "16,32"}, {"tuned": ("model.depth",)}, "no axis"),
        ({"": "1"}, {}, "unknown key"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(base, axes, settings, words):
    """Before anything is trained, and saying what would do."""
    with pytest.raises(ValueError, match=".") as refused:
        made(base, axes, **settings)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_an_axis_twice_and_one_without_values_are_refused():
    """What only a command line can say."""
    with pytest.raises(ValueError, match="given twice"):
        sweep.parse([("model.width", "1"), ("model.width", "2")])
    assert sweep.parse([("model.width", None)]) == {"model.width": ()}
