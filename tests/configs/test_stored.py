"""A config that was written as JSON comes back as it was, from our own modules alone."""

import dataclasses
import json

import pytest

from configs import schema
from models import catalogue, lm
from models.attention import softmax
from tests.configs import shipped
from training.optimizers import muon


def there_and_back(tree):
    return schema.from_dict(json.loads(json.dumps(schema.to_dict(tree))))


@pytest.mark.parametrize("file", shipped.FILES)
def test_shipped_configs_come_back(file):
    experiment = shipped.read(f"--config={file}" + ":gla*2" * file.endswith("pattern.py"))
    back = there_and_back(experiment)
    assert back == schema.from_dict(schema.to_dict(experiment))
    assert schema.fingerprint(back) == schema.fingerprint(experiment)
    assert type(back) is schema.Experiment and schema.changes(schema.to_dict(back), back) == []


def test_every_variant_comes_back():
    for name, config in catalogue.variants().items():
        assert there_and_back(config) == config, name
        assert type(there_and_back(config)) is type(config), name


def test_who_freezes_a_variant_freezes_their_own():
    config = schema.freeze(schema.freeze(catalogue.variants()["window"]))  # of CASES: one object
    other = catalogue.variants()["window"]
    assert type(other) is softmax.Config is type(config).__mro__[1]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.heads = 3
    other.heads = 3
    assert catalogue.variants()["window"].heads != 3


def stored(**values):
    return schema.to_dict(schema.Experiment(model=lm.Config())) | values


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (stored(steps="many"), "steps='many' is not an int."),
        (stored(stepz=1), "unknown key 'stepz' (did you mean 'steps'?) in a stored config."),
        (stored(model={"class": "os.system"}), "model: 'os.system' is no class of a config"),
        (stored(model={"class": "subprocess.Popen"}), "'subprocess.Popen' is no class"),
        (stored(model={"class": "models.lm.LM"}), "'models.lm.LM' is no class"),
        (stored(model={"class": "models.lm.residual.Config"}), "is no class"),
        (stored(model={"class": "models..lm.Config"}), "is no class"),
        (stored(model={"class": "models.nowhere.Config"}), "is no class"),
        (stored(model={"class": ["models.lm.Config"]}), "is no class"),
        (stored(model={"width": 3}), "model: None is no class"),
        ({"class": "configs.loading.Experiment"}, "outermost: 'configs.loading.Experiment' is no"),
        ({"class": "models.block.shared.Config"}, "outermost: "),
        (
            stored(model={"class": "models.lm.Config", "pattern": 3}),
            "model.pattern=3 is not",
        ),
    ],
)
def test_what_is_not_ours_is_refused_in_one_line(values, text):
    with pytest.raises(ValueError, match="^[^\n]*$") as caught:
        schema.from_dict(values)
    assert text in str(caught.value)


def test_changes_are_named_by_key():
    old = schema.Experiment(model=lm.Config(pattern=(softmax.Config(heads=4),)))
    described = json.loads(json.dumps(schema.to_dict(old)))
    new = there_and_back(old)
    new.data.batch, new.model.pattern[0].heads, new.model.channel = 8, 2, None
    assert [str(change) for change in schema.changes(described, new)] == [
        "model.pattern[0].heads 4, now 2",
        "model.channel glu, now None",
        "data.batch 16, now 8",
    ]
    new = there_and_back(old)
    new.model.pattern *= 2
    assert [str(change) for change in schema.changes(described, new)] == [
        "model.pattern (softmax), now (softmax, softmax)"
    ]
    del described["data"]["seed"], described["guards"]  # written before there were such settings
    assert schema.changes(described, old) == []
    old.data.seed = 3
    assert [str(change) for change in schema.changes(described, old)] == ["data.seed 0, now 3"]


def test_an_optimizer_of_old_has_a_rule_today():
    described = schema.to_dict(schema.Experiment(model=lm.Config()))
    rule = described["optimizer"].pop("rule")
    assert rule["class"] == "training.optimizers.adamw.Config"
    described["optimizer"] |= {"name": "muon", "b1": 0.8, "b2": 0.95, "eps": 1e-8}
    found = schema.from_dict(described)
    assert found.optimizer.rule == muon.Config(b1=0.8)
    assert schema.changes(described, found) == []
    adam = schema.Experiment(model=lm.Config())
    assert [str(c) for c in schema.changes(described, adam)] == ["optimizer.rule muon, now adamw"]
