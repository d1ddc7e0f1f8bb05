"""Rows carry a provenance or a reason; every form of the report shows both."""

import copy
import csv
import io
import json
from pathlib import Path

import jsonschema
import pytest

from report import report, table
from report.report import Column, Contest, Crossover, Report
from resources.row import Curve, Row, not_available

SCHEMA = json.loads((Path(__file__).parents[2] / "docs/report.schema.json").read_text())
RESOURCES = {
    "compute": [
        Row("train throughput", 12_345.6, "tok/s", "measured", "median of 9", (12_000, 12_900)),
        Row("model FLOPs", 1.25e9, "FLOP/token", "modelled"),
    ],
    "memory": [Row("state at 1k", 4_500_000, "B", "compiled")],
    "energy": [not_available("train energy", "J/token", "no counter on this device")],
}
STATE = Curve("state", "context", (256, 1024), [Row("state", n, "B", "compiled") for n in (5, 6)])
FASTER = Contest("train", "b", "a", 1.31, (1.25, 1.38), "1.31x faster (1.25 to 1.38)")
FROM_512 = Crossover("prefill", "length", "b", "a", 512.0, (400.0, 600.0), "b from 512 on")


def make(columns=("a", "b")) -> Report:
    return Report(
        [Column(name, "0123456789abcdef", RESOURCES, [STATE]) for name in columns],
        device="cpu",
        versions=report.versions(),
        commit=report.commit(),
        contests=[FASTER],
        crossovers=[FROM_512],
    )


def printed(given: Report) -> str:
    file = io.StringIO()
    table.show(given, file)
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


def test_a_row_that_the_first_config_lacks_follows_its_neighbour():
    def column(*names):
        return Column("x", "", {"compute": [Row(name, 1, "", "compiled") for name in names]})

    columns = [column("a", "b", "d"), column("a", "c", "d"), column("e"), column("b", "f")]
    assert report.row_names(columns, "compute") == ["e", "a", "c", "b", "f", "d"]
    assert report.row_names(columns, "memory") == []


def test_a_column_refuses_unknown_resources_and_two_rows_of_one_name():
    with pytest.raises(ValueError, match="no resource 'speed'; use compute, memory"):
        Column("a", "", {"speed": []})
    with pytest.raises(ValueError, match="a has two rows 'state at 1k'"):
        Column("a", "", {"memory": RESOURCES["memory"] * 2})


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
        (7.25, "%", "7.25 %"),
        (2_500, "$", "2.5k $"),
        (23_960, "Wh", "23.96 kWh"),
        (2.3456, "bit/byte", "2.346 bit/byte"),
        (1_234_567, "", "1.235M"),
    ],
)
def test_human_units(value, unit, text):
    assert table.human(value, unit) == text


def test_the_table_shows_every_number_with_its_letter():
    text = printed(make())
    assert text.count("12.35k tok/s m (1)") == 2
    assert text.count("4.5 MB c") == 2
    assert text.count("1.25 GFLOP/token f") == 2
    assert text.count("not available (2)") == 2
    assert text.index("compute") < text.index("12.35k") < text.index("memory")
    for line in ("(1) median of 9", "(2) no counter on this device", table.LEGEND, "jax "):
        assert line in text
    assert "train, b against a: 1.31x faster (1.25 to 1.38)" in text
    assert "prefill over length, b against a: b from 512 on" in text


def test_rows_that_one_config_lacks_stay_empty():
    columns = [Column(name, "0", {name: RESOURCES[name]}) for name in ("compute", "memory")]
    text = printed(Report(columns, "cpu", {"jax": "1"}, None))
    assert text.count("12.35k") == text.count("4.5 MB") == 1
    assert "commit unknown" in text


def test_markdown_and_csv_hold_every_number():
    text = table.markdown(make())
    assert "| train throughput | 12.35k tok/s m (1) | 12.35k tok/s m (1) |" in text
    lines = list(csv.DictReader(io.StringIO(table.comma_separated(make()))))
    assert len(lines) == 2 * (4 + 2)
    first = lines[0]
    assert (first["config"], first["resource"], first["value"]) == ("a", "compute", "12345.6")
    assert (first["provenance"], first["low"], first["high"]) == ("measured", "12000", "12900")
    assert [line["at"] for line in lines if line["name"] == "state"] == ["256", "1024"] * 2
    (gap,) = {line["note"] for line in lines if line["provenance"] == "not available"}
    assert gap == "no counter on this device"


def test_json_keeps_to_the_published_schema_and_reads_back(tmp_path):
    given = make()
    given.write(tmp_path / "new" / "report.json")
    jsonschema.validate(json.loads((tmp_path / "new" / "report.json").read_text()), SCHEMA)
    found = report.read(tmp_path / "new" / "report.json")
    assert json.dumps(found.as_json()) == json.dumps(given.as_json())
    assert found.columns[0].row("train throughput") == RESOURCES["compute"][0]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema_version",), 1),
        (("columns",), []),
        (("commit",), "main"),
        (("columns", 0, "resources", "memory", 0, "provenance"), "guessed"),
        (("columns", 0, "resources", "memory", 0, "provenance"), None),
        (("columns", 0, "resources", "memory", 0, "value"), None),
        (("columns", 0, "resources", "memory", 0, "value"), "much"),
        (("columns", 0, "resources", "energy", 0, "note"), ""),
        (("columns", 0, "resources", "speed"), []),
        (("columns", 0, "curves", 0, "at"), [0]),
        (("contests", 0, "interval"), [1.0]),
    ],
)
def test_the_schema_refuses_what_a_report_may_not_be(path, value):
    found = copy.deepcopy(json.loads(json.dumps(make().as_json())))
    jsonschema.validate(found, SCHEMA)
    inner = found
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(found, SCHEMA)


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '{"schema_version": 1}', '{"schema_version": 2}']
)
def test_a_file_that_is_no_report_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="is no report of eval.py --json"):
        report.read(tmp_path / "x.json")


def test_outside_of_a_repository_the_commit_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "_ROOT", tmp_path)
    assert report.commit() is None
