"""What the pictures of a report share: colours, markers, axes, legends, and the text of an SVG."""

import dataclasses
import io
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from report.report import Report
from report.table import LETTERS, human, origin
from resources.row import Row

# For each kind of dichromacy, and for none, every two differ by 0.1 or more in Oklab (a test).
COLOURS = (
    *("#0033bb", "#bb9900", "#880000", "#33bb99", "#995588"),
    *("#667700", "#aa99ff", "#553366", "#111111", "#5566ee"),
)
# As many markers as to meet each colour only once in 110 configs.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
INK, QUIET, FAINT = "#22252b", "#70757f", "#e3e5e9"
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "text.parse_math": False,  # a config's name may hold a dollar
    "svg.fonttype": "path",  # looks the same without the font
    "svg.hashsalt": "report",
    "hatch.linewidth": 0.6,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 4.5,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
}
_SVG = "http://www.w3.org/2000/svg"


@dataclasses.dataclass(frozen=True)
class Picture:
    """One figure with its caption; or no SVG, and in `text` the reason why not."""

    name: str  # of letters, digits and "-": its identifiers in the page begin with it
    title: str
    svg: str | None
    text: str


def missing(title: str, reason: str) -> Picture:
    """What stands for a picture that the report has no numbers for."""
    return Picture(_name(title), title, None, reason)


def finish(
    figure: Figure, title: str, report: Report, rows: Mapping[int, Sequence[Row]], text: str
) -> Picture:
    """The picture of these rows, by the index of their column.

    Its caption ends with their provenance, device, versions and commit; so does the SVG's
    description, which goes with the picture where it is copied to.
    """
    kinds = {row.provenance for found in rows.values() for row in found}
    caption = f"{text} Numbers: {', '.join(k for k in LETTERS if k in kinds)}. {origin(report)}."
    configs = ", ".join(report.columns[i].config for i in rows)
    name = _name(title)
    return Picture(name, title, _svg(figure, name, title, f"{configs}. {caption}"), caption)


@contextmanager
def style() -> Iterator[None]:
    """The same look whatever the user's settings, which are as before afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def colour(i: int) -> str:
    """The colour of the config in column `i`."""
    return COLOURS[i % len(COLOURS)]


def mark(i: int, **other: Any) -> dict[str, Any]:
    """How matplotlib draws the config in column `i`."""
    marker = MARKERS[i % len(MARKERS)]
    return {"color": colour(i), "marker": marker, "markeredgewidth": 0} | other


def short(name: str) -> str:
    """A name that fits beside a picture."""
    name = " ".join(name.split())
    return name if len(name) <= 28 else f"{name[:16]}…{name[-11:]}"


def log_ticks(axis: Axis, unit: str, ratio: float) -> None:
    """Few ticks with units, for numbers whose largest is `ratio` times the smallest."""
    subs = (1.0, 2.0, 5.0) if ratio < 100 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=7))
    axis.set_major_formatter(FuncFormatter(lambda value, _: human(value, unit)))
    axis.set_minor_locator(NullLocator())


def linear_ticks(axis: Axis, count: int) -> None:
    """At most `count` steps; the unit stands at the axis."""
    axis.set_major_locator(MaxNLocator(count))
    axis.set_major_formatter(FuncFormatter(lambda value, _: human(value, "")))


def legend(
    axes: Axes, entries: Sequence[tuple[str, Line2D]], at: tuple[float, float] = (1.02, 1.0)
) -> None:
    """Labels and their lines, the upper left corner at this part of the panel."""
    lines = [line for _, line in entries]
    drawn = axes.legend(
        lines, ["."] * len(lines), loc="upper left", bbox_to_anchor=at, borderaxespad=0
    )
    for text, (label, _) in zip(drawn.get_texts(), entries, strict=True):
        text.set_text(label)  # afterwards: a label that begins with "_" would be dropped
    drawn.set_in_layout(at[0] >= 1)


def _name(title: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in title.lower())


def _svg(figure: Figure, name: str, title: str, description: str) -> str:
    """SVG to be put into a page beside others: its identifiers begin with the picture's name."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(stream.getvalue())
    _drop(root, lambda tag: tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"))
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        for key, value in attributes.items():
            if key == "id":
                attributes[key] = f"{name}-{value}"
            elif key == "href":
                attributes[key] = f"#{name}-{value.removeprefix('#')}"
            else:
                attributes[key] = value.replace("url(#", f"url(#{name}-")
        element.attrib.clear()
        element.attrib.update(attributes)
    root.attrib |= {"xmlns": _SVG, "role": "img", "aria-labelledby": f"{name}-title"}
    root.attrib |= {"stroke-linejoin": "round", "stroke-linecap": "butt"}
    for place, (tag, content) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(tag, {"id": f"{name}-{tag}"})
        element.text = content
        root.insert(place, element)
    return ElementTree.tostring(root, encoding="unicode")


def _drop(element: ElementTree.Element, unwanted: Callable[[str], bool]) -> None:
    for child in list(element):
        if unwanted(child.tag):
            element.remove(child)
        else:
            _drop(child, unwanted)
