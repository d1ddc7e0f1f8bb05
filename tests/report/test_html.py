"""The page is one sound file that holds every number, and asks for nothing from elsewhere."""

import re
from html.parser import HTMLParser

import pytest

from report import html
from report.report import Column, Contest, Crossover, Hot, Report
from report.table import human
from resources.row import Curve, Row, not_available
from tests.report.example_report import example

VOID = {"meta", "link", "br", "img", "input", "hr"}
HOSTILE = "<script>alert('1')</script>"


class Reader(HTMLParser):
    """Elements with their attributes and text; a tag that does not close is an error."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[int] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open, f"{self.elements[self.open[-1]][0]} is never closed"

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs)), f"{tag} has an attribute twice"
        self.elements.append((tag, dict(attrs)))
        self.texts.append("")
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.texts.append("")

    def handle_endtag(self, tag):
        assert self.elements[self.open[-1]][0] == tag, f"{tag} closes another element"
        self.open.pop()

    def handle_data(self, data):
        for i in self.open:
            self.texts[i] += data

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        """Attributes and text of every element with this tag."""
        pairs = zip(self.elements, self.texts, strict=True)
        return [(attributes, text) for (name, attributes), text in pairs if name == tag]


@pytest.fixture(scope="module")
def page() -> str:
    return html.page(example())


@pytest.fixture(scope="module")
def read(page) -> Reader:
    return Reader(page)


def one(row: Row, config: str = "a", **other) -> Report:
    return Report([Column(config, "0", {"compute": [row]})], "cpu", {"jax": "1"}, None, **other)


def test_every_number_stands_in_the_table_under_its_config(read):
    report = example()
    heads = [text for attributes, text in read.all("th") if attributes["scope"] == "col"]
    assert heads == ["number", *(column.config for column in report.columns)]
    table = read.texts[[tag for tag, _ in read.elements].index("table")]
    for column in report.columns:
        for row in column.rows:
            assert row.name in table
            assert row.value is None or human(row.value, row.unit) in table
            assert row.interval is None or human(row.interval[1], row.unit) in table
    cells = [text for _, text in read.all("td")]
    lines = [text for attributes, text in read.all("th") if attributes["scope"] == "row"]
    place = lines.index("state at 64k tokens") * len(report.columns)
    line = cells[place : place + len(report.columns)]
    assert line[0] == "404.2 MB c" and line[2] == "49.16 kB c"
    assert line[9].startswith("not available")


def test_headers_have_a_scope_and_the_rows_of_a_resource_a_body(read):
    assert {attributes["scope"] for attributes, _ in read.all("th")} == {"col", "row", "rowgroup"}
    resources = [text for attributes, text in read.all("th") if attributes["scope"] == "rowgroup"]
    assert resources == ["compute", "memory", "energy", "money", "network", "quality"]
    assert len(read.all("tbody")) == 6


def test_letters_say_in_full_how_a_number_was_obtained(read):
    found = {(attributes["title"], text) for attributes, text in read.all("abbr")}
    assert found == {("measured", "m"), ("compiled", "c"), ("modelled", "f")}
    assert "a assumed" in " ".join(text for _, text in read.all("p"))


def test_notes_are_numbered_and_linked(read):
    notes = {attributes["id"]: text for attributes, text in read.all("li") if "id" in attributes}
    columns = example().columns
    assert set(notes.values()) == {row.note for c in columns for row in c.rows if row.note}
    assert list(notes) == [f"note-{i}" for i in range(1, len(notes) + 1)]
    links = [(attributes["href"], text) for attributes, text in read.all("a")]
    assert {link for link, _ in links} == {f"#{name}" for name in notes}
    assert all(link == f"#note-{text}" for link, text in links)
    cells = {text for _, text in read.all("td")}
    number = next(name for name, note in notes.items() if note.startswith("this processor"))
    assert f"not available{number.removeprefix('note-')}" in cells


def test_comparisons_are_told():
    names = dict(kind="train", config="b", than="a")
    contest = Contest(**names, ratio=1.3, interval=(1.2, 1.4), verdict="1.3x faster (1.2 to 1.4)")
    crossover = Crossover(**names, over="length", at=9.0, interval=None, verdict="from 9 on")
    report = one(Row("x", 1, "", "compiled"), contests=[contest], crossovers=[crossover])
    items = [text for _, text in Reader(html.page(report)).all("li")]
    assert "train, b against a: 1.3x faster (1.2 to 1.4)" in items
    assert "train over length, b against a: from 9 on" in items
    assert "Comparisons" not in html.page(one(Row("x", 1, "", "compiled")))


def test_every_picture_is_there_with_its_caption(read):
    pictures = html.figures.draw(example())
    assert [text for _, text in read.all("figcaption")] == [p.text for p in pictures]
    drawn = read.all("svg")
    assert len(drawn) == len(read.all("figure")) == len(pictures)
    identifiers = [attributes["id"] for _, attributes in read.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    for attributes, _ in drawn:
        assert attributes["role"] == "img" and attributes["aria-labelledby"] in identifiers


def test_a_picture_without_numbers_leaves_its_reason():
    text = html.page(one(not_available("train energy", "J/token", "no meter in reach")))
    items = [text for _, text in Reader(text).all("li")]
    assert "<svg" not in text
    assert "Energy of a token: train energy: no meter in reach" in items
    assert "Time over length: no config has a curve of time over length" in items


def test_nothing_comes_from_elsewhere_and_no_script_runs(page, read):
    without_names = page.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?:|//[a-z]|\bsrc=|@import|javascript:", without_names)
    for tag, attributes in read.elements:
        assert tag not in {"script", "img", "iframe", "object", "embed", "base", "form", "image"}
        assert not any(name.startswith("on") for name in attributes)
        target = attributes.get("href") or "#"
        assert target.startswith("#") or (tag, target) == ("link", "data:,")
    policy = next(a for a, _ in read.all("meta") if "http-equiv" in a)
    assert "default-src 'none'" in (policy["content"] or "")


def test_device_versions_and_commit_stand_in_the_footer(read):
    (_, footer), *_ = read.all("footer")
    assert "cpu; python 3.11.7, jax 0.10.2" in footer and "commit 5ca1ab1e" in footer


def test_names_and_notes_are_text_whatever_they_hold():
    quoted = f"\"'&{HOSTILE}"
    row = Row(f"row {HOSTILE}", 1.5, quoted, "measured", f"note {HOSTILE}", (1.0, 2.0))
    rate = Row("train throughput", 1.0, "tok/s", "measured")
    point = Row(quoted, 1.0, "s", "measured")
    curves = [Curve(quoted, quoted, [1, 2], [point, point])]
    column = Column(f"config {HOSTILE}", HOSTILE, {"compute": [row, rate]}, curves)
    contest = Contest(HOSTILE, HOSTILE, HOSTILE, 1.0, None, HOSTILE)
    report = Report([column], HOSTILE, {HOSTILE: HOSTILE}, HOSTILE, [contest])
    text = html.page(report)
    assert "<script" not in text
    read = Reader(text)
    assert f"config {HOSTILE}" in [text for _, text in read.all("th")]
    assert f"row {HOSTILE}" in [text for _, text in read.all("th")]
    assert f"note {HOSTILE}" in [text for _, text in read.all("li")]
    assert len(read.all("svg")) == 2
    assert all(
        re.fullmatch(r"[\w-]+", attributes["id"] or "") for attributes, _ in read.all("figure")
    )


def test_a_row_that_a_config_lacks_leaves_its_cell_empty():
    rows = [Row(name, 1, "", "compiled") for name in "xy"]
    columns = [Column("a", "0", {"compute": rows[:1]}), Column("b", "1", {"memory": rows[1:]})]
    read = Reader(html.page(Report(columns, "cpu", {}, None)))
    assert [text for _, text in read.all("td")] == ["1 c", "", "", "1 c"]


@pytest.mark.parametrize(
    ("interval", "unit", "text"),
    [
        ((0.539, 0.541), "s", "539 to 541 ms"),
        ((0.9, 1.1), "s", "900 ms to 1.1 s"),
        ((1900.0, 2100.0), "tok/s", "1.9k to 2.1k tok/s"),
        ((1.0, 2.0), "", "1 to 2"),
    ],
)
def test_an_interval_stands_under_its_number(interval, unit, text):
    read = Reader(html.page(one(Row("x", 1.0, unit, "measured", "", interval))))
    assert [text for _, text in read.all("small")] == [text]


def test_a_report_of_nothing_is_a_page():
    read = Reader(html.page(Report([], "cpu", {}, None)))
    assert [text for _, text in read.all("h1")] == ["Resources of 0 configs"]


def test_a_profile_stands_below_the_pictures():
    hot = Hot(f"stacks.0/{HOSTILE}/dot_general", "backward", 3.0, 0.0125, 0.25, 4.5e6)
    column = Column("a", "0", {"compute": [Row("x", 1.0, "s", "measured")]}, profile=[hot])
    page = html.page(Report([column], "cpu", {"jax": "1"}, None))
    cells = [text for _, text in Reader(page).all("td")]
    assert cells[-4:] == ["backward", "12.5 ms", "25.0%", "4.5 MB"]
    assert "Where a training step of a spends its time" in page and HOSTILE not in page
