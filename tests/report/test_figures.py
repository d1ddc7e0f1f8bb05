"""Pictures show what is there, say what is not, and look the same for a config in all of them."""

import dataclasses
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest

from report import figures, picture
from report.report import Column, Report
from resources.row import Curve, Row, not_available
from tests.report.example_report import ENCODER, NO_METER, example

SVG = "{http://www.w3.org/2000/svg}"
# Machado, Oliveira and Fernandes 2009, severity 1.0, over linear RGB.
BLIND = {
    "none": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216]]
    + [[-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413]]
    + [[-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602]]
    + [[0.004733, 0.691367, 0.303900]],
}


@pytest.fixture(scope="module")
def pictures() -> dict[str, picture.Picture]:
    return {found.name: found for found in figures.draw(example())}


def report(columns: list[Column]) -> Report:
    return Report(columns, "a device", {"jax": "1"}, "c0ffee")


def rows(name: str, unit: str, values, resource: str = "compute", **other) -> Report:
    """A config for each value, which is in one row."""
    found = [Row(name, value, unit, "measured", **other) for value in values]
    return report([Column(f"c{i}", "0", {resource: [row]}) for i, row in enumerate(found)])


def curve(name: str, at, values, unit="s", over="length") -> Column:
    gap = lambda value: value is None
    points = [
        not_available(name, unit, "too long") if gap(v) else Row(name, v, unit, "measured")
        for v in values
    ]
    return Column(f"of {name}", "0", {}, [Curve(name, over, at, points)])


def paths(
    svg: str | None, colour: str, kind: str = "stroke"
) -> list[list[tuple[str, float, float]]]:
    """The steps of every path that this colour draws, in the units of the picture; y is down."""
    assert svg is not None
    found = []
    for path in ElementTree.fromstring(svg).iter(f"{SVG}path"):
        if f"{kind}: {colour}" in path.get("style", ""):
            steps = re.findall(r"([ML]) (\S+) (\S+)", path.get("d", ""))
            found.append([(letter, float(x), float(y)) for letter, x, y in steps])
    return found


def test_every_picture_of_a_full_report_is_drawn(pictures):
    assert [found.title for found in pictures.values()] == [
        "Time over length",
        "State over context",
        "Train memory over length",
        "Throughput",
        "Energy of a token",
        "Roofline of a training step",
        "Train throughput against state at 64k tokens",
        "Validation against train throughput",
    ]
    assert all(found.svg for found in pictures.values())


def test_an_svg_is_whole_describes_itself_and_refers_to_itself_only(pictures):
    seen = set()
    for found in pictures.values():
        root = ElementTree.fromstring(found.svg)
        assert root.get("role") == "img"
        title = root.find(f"{SVG}title")
        assert title is not None and title.text == found.title
        assert root.get("aria-labelledby") == title.get("id")
        names = [element.get("id") for element in root.iter() if element.get("id")]
        assert len(names) == len(set(names)) and not seen & set(names)
        seen |= set(names)
        text = found.svg.replace('xmlns="http://www.w3.org/2000/svg"', "")
        wanted = {*re.findall(r'href="#([^"]+)"', text), *re.findall(r"url\(#([^)]+)\)", text)}
        assert wanted <= set(names)
        assert len(re.findall(r"href=|url\(", text)) == len(re.findall(r'href="#|url\(#', text))
        assert not re.search(r"https?:|<style|<metadata|<script|<text|<!--", text)


def test_the_caption_ends_with_provenance_device_versions_and_commit(pictures):
    for found in pictures.values():
        assert re.search(
            r"Numbers: [a-z, ]+\. cpu; python 3\.11\.7, jax .* commit 5ca1ab", found.text
        )
    assert "Numbers: compiled." in pictures["state-over-context"].text
    assert "Numbers: measured, modelled." in pictures["energy-of-a-token"].text


def test_a_caption_explains_what_is_drawn_only(pictures):
    time, state = (pictures[name].text for name in ("time-over-length", "state-over-context"))
    for sign in ("Bands", "p: fitted", "n²"):
        assert sign in time and sign not in state


def test_configs_that_a_picture_shows_are_named_in_it_with_their_colour(pictures):
    names = [column.config for column in example().columns]
    without = {"Throughput": [], "Energy of a token": ["moe_top2", "bidirectional"]}
    without["Roofline of a training step"] = []
    without["Validation against train throughput"] = ["moe_top2", "bidirectional"]
    for found in pictures.values():
        absent = without.get(found.title, ["bidirectional"])
        described = found.svg.partition("<desc")[2].partition("</desc>")[0].partition(". ")[0]
        assert described.partition(">")[2].split(", ") == [n for n in names if n not in absent]
        if " against " not in found.title:
            shown = [i for i, name in enumerate(names) if name not in absent]
            assert all(picture.COLOURS[i] in found.svg for i in shown), found.title


def test_what_has_no_numbers_is_said():
    empty = {found.title: found for found in figures.draw(report([]))}
    assert all(found.svg is None for found in empty.values())
    assert empty["Time over length"].text == "no config has a curve of time over length"
    assert "no config has a row 'train throughput'" in empty["Throughput"].text
    assert "'roof, compute'" in empty["Roofline of a training step"].text
    last = example().columns[-1]
    encoder = {found.title: found for found in figures.draw(report([last]))}
    assert NO_METER in encoder["Energy of a token"].text
    assert (
        "an encoder keeps no state" in encoder["Train throughput against state at 64k tokens"].text
    )
    assert "fewer than two" in encoder["Validation against train throughput"].text
    assert encoder["Throughput"].svg is not None
    one = figures.front(report([example().columns[0]]), "train throughput", "validation")
    assert one.text == "fewer than two configs have both numbers"
    found = figures.bars(report([last]), "Reading", ["prefill throughput"])
    assert found.svg is None and found.text == f"prefill throughput: {ENCODER}"
    found = figures.curves(report([curve("train call", [1, 2], [None, None])]), "length", "s")
    assert (found.svg, found.text) == (None, "too long")


def test_a_curve_without_numbers_takes_no_panel_from_others():
    timed, gone = (curve(name, [1, 2], v) for name, v in (("train call", [1, 2]), ("x", [None, 0])))
    both = dataclasses.replace(timed, curves=[*timed.curves, *gone.curves])
    found = figures.curves(report([both]), "length", "s")
    assert found.title == "Train call over length" and found.svg is not None


def test_a_config_without_a_drawable_curve_is_named():
    columns = [curve("state", [1, 10], [5, 9], "B"), curve("state", [1, 10], [0, 0], "B")]
    columns[1] = dataclasses.replace(columns[1], config="stateless")
    found = figures.curves(report(columns), "length", "B")
    assert "Without a number above 0: stateless." in found.text


@pytest.mark.parametrize(("power", "guide"), [(1, 0), (2, 1)])
def test_a_power_law_is_parallel_to_its_guide(power, guide):
    at = [128, 512, 2048]
    column = curve("train call", at, [1e-6 * n**power for n in at])
    found = figures.curves(report([column]), "length", "s")
    line = next(path for path in paths(found.svg, picture.COLOURS[0]) if len(path) == 3)
    slope = lambda path: (path[-1][2] - path[0][2]) / (path[-1][1] - path[0][1])
    first = (line[1][2] - line[0][2]) / (line[1][1] - line[0][1])
    assert math.isclose(first, slope(line), rel_tol=1e-4)
    dashed = [path for path in paths(found.svg, picture.QUIET) if len(path) == 2]
    assert math.isclose(slope(dashed[guide]), slope(line), rel_tol=1e-4)


def test_a_gap_in_a_curve_stays_a_gap():
    column = curve("train call", [1, 2, 4, 8, 16], [1, 2, None, 3, 5])
    found = figures.curves(report([column]), "length", "s")
    drawn = ["".join(step[0] for step in path) for path in paths(found.svg, picture.COLOURS[0])]
    assert "MLML" in drawn


def test_noise_of_a_flat_curve_is_not_magnified():
    """Two percent of a decade that fills the panel are less than a hundredth of its height."""
    found = figures.curves(report([curve("x", [1, 2, 4], [1, 1.02, 1])]), "length", "s")
    line = next(path for path in paths(found.svg, picture.COLOURS[0]) if len(path) == 3)
    heights = [y for _, _, y in line]
    (_, _, low), (_, _, high) = paths(found.svg, picture.QUIET)[1]
    assert 0 < max(heights) - min(heights) < 0.01 * abs(high - low)


def test_bars_begin_at_zero():
    found = figures.bars(rows("a", "tok/s", [1000, 3000]), "Bars", ["a"])
    widths = []
    for colour in picture.COLOURS[:2]:
        bar = paths(found.svg, colour, "fill")[0]
        widths.append(max(x for _, x, _ in bar) - min(x for _, x, _ in bar))
    assert math.isclose(widths[1], 3 * widths[0], rel_tol=1e-4)


def test_modelled_and_assumed_bars_are_hatched_and_measured_ones_are_not():
    one = rows("a", "J/token", [1.0, 2.0])
    assert "<pattern" not in (figures.bars(one, "E", ["a"]).svg or "")
    for kind in ("modelled", "assumed"):
        row = Row("a", 1.0, "J/token", kind)
        both = report([*one.columns, Column("last", "0", {"energy": [row]})])
        assert (figures.bars(both, "E", ["a"]).svg or "").count("<pattern") == 1


def test_every_row_of_joules_a_token_is_a_panel_and_spreads_are_whiskers():
    found = [Row(f"{kind} energy", 2.0, "J/token", "measured") for kind in ("train", "decode")]
    bare = report([Column("a", "0", {"energy": found})])
    spread = Row("train energy, spread", 0.5, "J/token", "measured")
    whiskered = report([Column("a", "0", {"energy": [*found, spread]})])
    inks = []
    for given in (bare, whiskered):
        drawn = {p.title: p for p in figures.draw(given)}["Energy of a token"].svg
        assert len(paths(drawn, picture.COLOURS[0], "fill")) == 2
        inks.append(len(paths(drawn, "#ffffff")))  # the white below a whisker
    assert inks == [0, 1]


def test_the_front_is_in_colour_and_the_rest_is_grey():
    states, rates = (
        [10, 20, 30, 40],
        [1, 5, 4, 9],
    )  # the third: more bytes and slower than the second
    columns = [
        Column(
            f"c{i}",
            "0",
            {
                "memory": [Row("state", states[i], "B", "compiled")],
                "compute": [Row("rate", rates[i], "tok/s", "measured")],
            },
        )
        for i in range(4)
    ]
    found = figures.front(report(columns), "state", "rate")
    assert found.svg is not None
    assert [colour in found.svg for colour in picture.COLOURS[:4]] == [True, True, False, True]
    assert figures.DOMINATED in found.svg
    (line,) = [path for path in paths(found.svg, picture.INK) if len(path) == 3]
    assert line[0][1] < line[1][1] < line[2][1] and line[0][2] > line[1][2] > line[2][2]


def test_the_roofline_bends_at_the_ridge():
    values = {"train intensity": 4.0, "train achieved": 5e9, "roof, compute": 1e11}
    found = [Row(name, value, "", "measured") for name, value in values.items()]
    found.append(Row("roof, memory", 1e10, "B/s", "measured"))  # the ridge is at 10 FLOP/B
    drawn = figures.roofline(report([Column("a", "0", {"compute": found})]))
    roof = next(path for path in paths(drawn.svg, picture.QUIET) if len(path) == 3)
    (_, left, low), (_, ridge, top), (_, right, end) = roof
    assert top == end < low
    # From 4 / 3 to 30 FLOP/B on a logarithmic axis.
    share = math.log(10 / (4 / 3)) / math.log(30 / (4 / 3))
    assert math.isclose((ridge - left) / (right - left), share, rel_tol=1e-4)


def test_settings_of_the_user_change_nothing_and_stay():
    given = rows("a", "tok/s", [1.0, 2.0])
    plain = figures.bars(given, "Bars", ["a"])
    with matplotlib.rc_context({"font.size": 31, "axes.facecolor": "pink"}):
        assert figures.bars(given, "Bars", ["a"]) == plain
        assert matplotlib.rcParams["font.size"] == 31


def test_names_that_matplotlib_would_read_otherwise():
    """Dollars are mathematics to it, a leading underscore hides a label, and < ends an SVG."""
    odd = ["_hidden", "$x_$", "a</svg><script>alert(1)</script>", "x" * 200, "two\nlines"]
    column = curve("train call", [1, 2, 4], [1, 2, 3])
    columns = [dataclasses.replace(column, config=name) for name in odd]
    found = figures.curves(report(columns), "length", "s")
    assert found.svg is not None and "<script" not in found.svg
    description = ElementTree.fromstring(found.svg).findtext(f"{SVG}desc") or ""
    assert all(name in description for name in odd)


def test_pyplot_and_its_global_state_stay_out():
    code = "import sys, report.html; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


@pytest.mark.parametrize("kind", BLIND)
def test_colours_can_be_told_apart(kind):
    """By distance in Oklab (Ottosson 2020), as the colour-blind see them."""
    codes = [[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in picture.COLOURS]
    rgb = np.array(codes)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(BLIND[kind]).T, 0, 1)
    cones = [[0.41222147, 0.53633254, 0.05144599], [0.2119035, 0.68069955, 0.10739696]]
    cones.append([0.08830246, 0.28171884, 0.62997870])
    axes = [[0.21045426, 0.79361778, -0.00407205], [1.9779985, -2.42859221, 0.45059371]]
    axes.append([0.0259040371, 0.7827717662, -0.808675766])
    lab = np.cbrt(seen @ np.array(cones).T) @ np.array(axes).T
    distance = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
    assert distance[~np.eye(len(lab), dtype=bool)].min() >= 0.1
    light = linear @ [0.2126, 0.7152, 0.0722]
    assert (1.05 / (light + 0.05) > 2).all()  # contrast with the white ground


def test_a_colour_meets_a_marker_once_in_110_configs():
    marks = [picture.mark(i) for i in range(110)]
    assert len({(mark["color"], mark["marker"]) for mark in marks}) == 110
