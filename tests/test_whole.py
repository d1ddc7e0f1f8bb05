"""Any options, settings and architectures go together, or are refused in one line.

The normal run takes every value of every option and setting once, several at a time, and the first
pairs; `-m long` the rest of 200 random pairs, and `-m pairs` of 2,000.
"""

import dataclasses

import pytest

from models import catalogue, lm
from models.attention import softmax
from models.recurrent import rg_lru
from tests import whole

FIRST, LONG, ALL = 3, 200, 2000  # pairs of the normal run, of `long`, of `pairs`
BLOCK = 100  # pairs in one test of `pairs`
TWO = (rg_lru.Config(), softmax.Config(heads=4, window=8))
pytestmark = pytest.mark.usefixtures("programs_are_kept")  # a run that resumes compiles again


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The folder of text and tokenizer that all experiments read."""
    folder = tmp_path_factory.mktemp("corpus")
    whole.write_corpus(folder)
    return folder


def test_every_option_and_setting_has_values():
    """A new field needs values in `tests/whole.py`, or a reason to be left out."""
    listed = {*whole.options(), *whole.settings(), *whole.OF_ARCHITECTURES}
    outside = lambda key: any(key == name or key.startswith(f"{name}.") for name in whole.OUTSIDE)
    for key, _ in whole.fields(whole.base()):
        assert (key in listed) != outside(key), f"{key} has no values to be tried with"
    for field in dataclasses.fields(lm.Config):
        assert f"model.{field.name}" in listed


def test_every_value_of_a_choice_is_tried():
    assert {"model.remat": "dots"} in whole.options()["model.remat"]
    assert {"data.layout": "packed"} in whole.settings()["data.layout"]
    combined = [change for group in whole.combinations(TWO) for change in group]
    for values in (*whole.options().values(), *whole.settings().values()):
        assert all(change in combined for change in values)
    assert {name for name in catalogue.cases()} < set(whole.architectures())


def test_pairs_are_drawn_from_all_and_the_few_are_the_first_of_the_many():
    few, many = whole.pairs(LONG), whole.pairs(ALL)
    assert many[:LONG] == few and len({whole.name(*pair) for pair in many}) == ALL
    changed = {key for pair in few for change in pair for key in change}
    assert changed >= {*whole.OF_ARCHITECTURES, "mesh.tensor", "model.remat", "carry_state"}


@pytest.mark.parametrize("changes", whole.combinations(TWO), ids=lambda c: str(len(c)))
def test_every_value_once_in_one_of_a_few_experiments(changes, corpus, tmp_path):
    assert whole.run(changes, corpus, tmp_path) == ""


@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=[pytest.mark.long] * (n >= FIRST)) for n in range(LONG)]
)
def test_a_pair_trains_resumes_and_decodes_or_is_refused(number, corpus, tmp_path):
    pair = whole.pairs(ALL)[number]
    print(whole.name(*pair), "->", whole.run(pair, corpus, tmp_path) or "done")


@pytest.mark.pairs
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("start", range(LONG, ALL, BLOCK))
def test_many_pairs(start, corpus, tmp_path):
    failed = []
    for number, pair in enumerate(whole.pairs(ALL)[start : start + BLOCK], start):
        try:
            whole.run(pair, corpus, tmp_path / str(number))
        except Exception as error:  # the others shall be heard too
            failed.append(f"{number}: {whole.name(*pair)}: {type(error).__name__}: {error}")
    assert not failed, "\n".join(failed)


def test_a_refusal_that_is_not_known_fails():
    with pytest.raises(AssertionError, match="refused without need"):
        whole.refusal("model.width=64 is not liked.")
    with pytest.raises(AssertionError, match="several lines"):
        whole.refusal("one\ntwo")
    line = "data.batch=1 does not split over 2 devices. Use 2."
    assert whole.refusal(line) == line
