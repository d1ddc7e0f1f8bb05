"""The ledger of claims: verdicts by hand, records that belong to their files, the page of today."""

import math

import pytest

from configs.claims import Above, Claim, Measured, Reaches, Stays
from configs.papers import _resources
from models.attention import softmax
from models.linear_attention import linear_transformer
from science import claims, measures

LEDGER = claims.ledger()
PAGE = claims.ROOT / "docs" / "claims.md"


def claim(*checks, statistic="mean"):
    """One with these checks."""
    return Claim("it is so", "here", "1", "nothing", checks, "none", statistic=statistic)


def test_the_difference_of_means_by_hand():
    """Welch: a = 1, 2, 3, b = 2, 4, 6: s_a^2/3 = 1/3, s_b^2/3 = 4/3, 2.941 degrees, t = 3.2188."""
    low, mean = claims.difference((2.0, 4.0, 6.0), (1.0, 2.0, 3.0))
    freedom = (5 / 3) ** 2 / ((1 / 3) ** 2 / 2 + (4 / 3) ** 2 / 2)
    assert freedom == pytest.approx(2.941, abs=1e-3) and mean == 2.0
    assert low == pytest.approx(2 - 3.2188 * math.sqrt(5 / 3), abs=1e-3)
    assert claims.difference((1.0,), (0.0, 0.1))[0] == -math.inf
    assert claims.difference((1.0, 1.0), (0.5, 0.5)) == (0.5, 0.5)


SCORES = {"a": (0.97, 0.99, 0.98), "b": (0.5, 0.6, 0.4), "c": (0.5, 0.99, 0.52), "d": ()}


@pytest.mark.parametrize(
    "check, statistic, holds",
    [
        (Reaches("a", 0.98), "mean", True),
        (Reaches("a", 0.99), "mean", False),
        (Reaches("c", 0.95), "best", True),
        (Reaches("c", 0.95), "median", False),
        (Reaches("c", 0.95), "mean", False),
        (Stays("b", 0.5), "mean", True),
        (Stays("b", 0.5), "best", False),
        (Above("a", "b"), "mean", True),
        (Above("a", "b", 0.48), "mean", False),
        (Above("a", "c"), "mean", False),  # by 0.31, with an interval that holds 0
        (Above("b", "a"), "mean", False),
        (Reaches("d", 0.0), "mean", False),
    ],
)
def test_a_check_holds_by_its_numbers(check, statistic, holds):
    """And what does not is said with them."""
    found = claims.fails(claim(check, statistic=statistic), SCORES, higher=True)
    assert bool(found) != holds and all("\n" not in line for line in found)


def test_lower_scores_are_better_where_the_metric_says_so():
    """Bits per byte: the better row has fewer."""
    assert not claims.fails(claim(Above("b", "a")), SCORES, higher=False)
    assert claims.fails(claim(Above("a", "b")), SCORES, higher=False)
    assert claims.summary(SCORES["c"], "best", higher=False) == 0.5


def test_a_row_that_is_not_in_the_sweep_is_named():
    """A slip in a claim's file."""
    with pytest.raises(ValueError, match="no row 'e' in the sweep; it has a, b"):
        claims.fails(claim(Reaches("e", 1.0)), SCORES, higher=True)


def test_measures_by_hand():
    """A cache of one layer: two arrays of 64 numbers of two bytes, and a document's number."""
    attention = _resources.experiment(softmax.Config())
    slope = Measured("state", attention, (64, 128), "slope")
    assert measures.score(slope) == 2 * 64 * 2 + 4
    constant = _resources.experiment(linear_transformer.Config())
    assert measures.score(Measured("state", constant, (64, 4096), "growth")) == 1
    flops = [measures.score(Measured("flops", attention, (n,), "value")) for n in (64, 128)]
    growth = Measured("flops", attention, (64, 128), "growth")
    assert measures.score(growth) == pytest.approx(flops[1] / flops[0])


@pytest.mark.parametrize("entry", LEDGER, ids=lambda entry: entry.name)
def test_a_claim_is_whole_and_its_record_is_of_it(entry):
    """Every field says something; the record is of today's experiments, and its verdict follows."""
    said = entry.claim
    texts = (said.says, said.source, said.published, said.scaled, said.cost)
    assert all(len(text) > 4 for text in texts) and "arXiv" in said.source and said.checks
    head = entry.file.read_text()
    assert f"python -m science.claims {entry.name} --run" in head and "Expected:" in head
    assert entry.record or said.needs, "a claim that runs here has been run"
    if entry.record:
        assert not entry.stale
        scores = {row["name"]: row["scores"] for row in entry.record["rows"]}
        assert claims.fails(said, scores, entry.record["higher"]) == entry.record["fails"]
        assert (entry.verdict == claims.REPRODUCED) == (not entry.record["fails"])


def test_the_page_is_that_of_the_records():
    """docs/claims.md is written by its command."""
    assert PAGE.read_text() == claims.markdown(LEDGER)
