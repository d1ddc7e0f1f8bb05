"""Two reports side by side: what differs, and what may be said of it."""

import io

import pytest

from report import compare
from report.report import Column, Report
from resources.row import Row, not_available

THROUGHPUT = Row("train throughput", 100.0, "tok/s", "measured", interval=(95.0, 105.0))


def report(*rows: Row, config: str = "a") -> Report:
    return Report([Column(config, "", {"compute": rows})], "cpu", {"jax": "1"}, None)


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        (Row("x", 100.0, "tok/s", "measured", interval=(95, 105)), "equal"),
        (Row("x", 104.0, "tok/s", "measured", interval=(99, 109)), "no difference seen"),
        (Row("x", 130.0, "tok/s", "measured", interval=(120, 140)), "x 1.300, distinct"),
        (Row("x", 130.0, "tok/s", "measured"), "spread not known"),
        (not_available("x", "tok/s", "why"), "not available in one"),
        (None, "only in one"),
    ],
)
def test_a_measured_number_changed_only_where_the_intervals_are_apart(after, verdict):
    assert compare.verdict(THROUGHPUT, after).startswith(verdict)


def test_exact_numbers_need_no_interval_and_modelled_ones_of_a_clock_do():
    state = [Row("state", value, "B", "compiled") for value in (100, 150)]
    assert compare.verdict(*state) == "x 1.500"
    flops = [Row("model", value, "FLOP/token", "modelled") for value in (10.0, 5.0)]
    assert compare.verdict(*flops) == "x 0.500"
    share = [Row("train MFU", value, "%", "modelled") for value in (10.0, 20.0)]
    assert compare.verdict(*share) == "spread not known"
    gaps = [not_available("x", "B", reason) for reason in "ab"]
    assert compare.verdict(*gaps) == ""


def test_configs_are_paired_by_name_and_two_single_ones_in_any_case():
    single = compare.changes(report(THROUGHPUT), report(THROUGHPUT, config="b"))
    assert [(change.config, change.verdict) for change in single] == [("a -> b", "equal")]
    several = Report([*report(THROUGHPUT).columns, *report(config="b").columns], "cpu", {}, None)
    assert {change.config for change in compare.changes(several, report(THROUGHPUT))} == {"a"}
    with pytest.raises(ValueError, match="no config in common: a, b and c"):
        compare.changes(several, report(THROUGHPUT, config="c"))


def test_only_what_changed_is_printed():
    file = io.StringIO()
    before = report(THROUGHPUT, Row("state", 10, "B", "compiled"))
    after = report(THROUGHPUT, Row("state", 30, "B", "compiled"))
    compare.show(before, after, file)
    text = file.getvalue()
    assert "x 3.000" in text and "train throughput" not in text and "1 rows are equal" in text
