"""Rows carry a provenance or a reason; the table and the JSON show both."""

import io
import json

import pytest

from resources import report
from resources.report import Column, Report, Row, human, not_available

ROWS = [
    Row("train throughput", 12_345.6, "tok/s", "measured", "median of 5"),
    Row("state at 1k", 4_500_000, "B", "compiled"),
    Row("model FLOPs", 1.25e9, "FLOP/token", "modelled"),
    not_available("energy", "J/token", "no counter on this device"),
]


def make(columns=("a", "b")) -> Report:
    return Report(
        [Column(name, "0123456789abcdef", ROWS) for name in columns],
        device="cpu",
        versions=report.versions(),
        commit=report.commit(),
    )


def printed(given: Report) -> str:
    file = io.StringIO()
    report.show(given, file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("x", 1.0, "s", "guessed"), "provenance 'guessed'"),
        (("x", 1.0, "s", None), "provenance None"),
        (("x", None, "s", None), "give the reason"),
        (("x", None, "s", "measured", "why"), "give the reason, no provenance"),
    ],
)
def test_a_number_without_provenance_and_a_gap_without_reason_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        Row(*row)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (12_345.6, "tok/s", "12.35k tok/s"),
        (4_500_000, "B", "4.5 MB"),
        (999, "B", "999 B"),
        (1.25e9, "FLOP/token", "1.25 GFLOP/token"),
        (0.0182, "s", "18.2 ms"),
        (61.04, "s", "61.04 s"),
        (3e-7, "s", "0.3 us"),
        (0, "s", "0 s"),
        (0, "B", "0 B"),
        (2.3456, "bit/byte", "2.346 bit/byte"),
        (1_234_567, "", "1.235M"),
    ],
)
def test_human_units(value, unit, text):
    assert human(value, unit) == text


def test_the_table_shows_every_number_with_its_letter():
    text = printed(make())
    assert text.count("12.35k tok/s m (1)") == 2
    assert text.count("4.5 MB c") == 2
    assert text.count("1.25 GFLOP/token f") == 2
    assert text.count("not available (2)") == 2
    for line in ("(1) median of 5", "(2) no counter on this device", report.LEGEND, "jax "):
        assert line in text


def test_rows_that_one_config_lacks_stay_empty():
    found = Report(
        [Column("a", "0", ROWS[:1]), Column("b", "1", ROWS[1:2])], "cpu", {"jax": "1"}, None
    )
    text = printed(found)
    assert text.count("12.35k") == text.count("4.5 MB") == 1
    assert "commit unknown" in text


def test_json_layout(tmp_path):
    given = make()
    given.write(tmp_path / "new" / "report.json")
    found = json.loads((tmp_path / "new" / "report.json").read_text())
    check_layout(found)
    assert [row["name"] for row in found["columns"][0]["rows"]] == [row.name for row in ROWS]


def check_layout(found: dict) -> None:
    """The layout that `schema_version` 1 promises."""
    assert set(found) == {"schema_version", "columns", "device", "versions", "commit"}
    assert found["schema_version"] == 1
    assert isinstance(found["device"], str)
    assert found["commit"] is None or len(found["commit"].split("+")[0]) == 40
    assert {"python", "jax", "jaxlib", "flax"} <= set(found["versions"])
    for column in found["columns"]:
        assert set(column) == {"config", "fingerprint", "rows"}
        names = [row["name"] for row in column["rows"]]
        assert len(names) == len(set(names))
        for row in column["rows"]:
            assert set(row) == {"name", "value", "unit", "provenance", "note"}
            if row["value"] is None:
                assert row["provenance"] is None and row["note"]
            else:
                assert isinstance(row["value"], int | float)
                assert row["provenance"] in ("measured", "compiled", "modelled", "assumed")


def test_outside_of_a_repository_the_commit_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "_ROOT", tmp_path)
    assert report.commit() is None
