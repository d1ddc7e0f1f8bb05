"""A report as one HTML file: comparisons, table, notes and pictures, without any other file."""

from collections.abc import Sequence
from html import escape
from string import Template

from report import figures
from report.picture import Picture
from report.report import RESOURCES, Column, Report, row_names
from report.table import LEGEND, LETTERS, cell, human, origin, told
from resources.row import Row

# The policy forbids requests and scripts, whatever a config's name or a note might smuggle in.
_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header>
<h1>$title</h1>
<p class="origin">$origin</p>
</header>
<main>
$parts
</main>
<footer><p>$legend</p><p class="origin">$origin</p></footer>
</body>
</html>
""")

_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; padding: 1rem; max-width: 100rem; background: #fff; color: #1c1e22;
  font: .95rem/1.5 system-ui, "Segoe UI", "Liberation Sans", Arial, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
a { color: #0033bb; }
.origin, .about, figcaption { color: #555b66; font-size: .82rem; }
.origin { margin: .3rem 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { padding: .18rem .7rem; text-align: right; vertical-align: top; white-space: nowrap; }
thead th { border-bottom: 1.5px solid #1c1e22; }
tbody th { text-align: left; font-weight: 400; }
tbody th[scope=row] { position: sticky; left: 0; background: #fff; min-width: 13rem;
  white-space: normal; }
thead th:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
tbody tr:hover > * { background: #f2f4f7; }
tbody th[scope=rowgroup] { font-weight: 700; padding-top: .8rem; }
td small { display: block; font-size: .95em; line-height: 1.2; color: #555b66; }
.list { columns: 30rem; }
td.gap { color: #6a707b; }
abbr { text-decoration: none; font-weight: 600; }
sup { line-height: 0; }
sup a { text-decoration: none; padding-left: .1rem; }
ol, ul { font-size: .82rem; padding-left: 2rem; }
li, figcaption { overflow-wrap: anywhere; }
figure { margin: 0 0 2rem; break-inside: avoid; }
figure h3 { font-size: 1rem; margin: 0 0 .3rem; }
figure svg { height: auto; min-width: 30rem; max-width: 100%; }
figcaption { max-width: 48rem; }
@media (max-width: 45rem) {
  th, td { padding: .18rem .4rem; }
  tbody th[scope=row] { min-width: 6.5rem; }
}
@media print {
  @page { size: A4 landscape; margin: 12mm; }
  :root { font-size: 9pt; }
  body { max-width: none; padding: 0; }
  .wide { overflow: visible; }
  table { width: 100%; font-size: 6pt; line-height: 1.25; }
  th, td { padding: .1rem .25rem; white-space: normal; overflow-wrap: anywhere; }
  tbody th[scope=row], thead th:first-child { position: static; min-width: 0; }
  thead { display: table-header-group; }
  tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
}
"""


def page(
    report: Report,
    *,
    title: str = "",
    pictures: list[Picture] | None = None,
    confidence: str = "99 %",
) -> str:
    """The whole page. It asks for nothing from elsewhere and runs no script.

    `pictures` stand in place of those that `figures.draw` makes of the report; `confidence` is that
    of its intervals.
    """
    names = [column.config for column in report.columns]
    count = "one config" if len(names) == 1 else f"{len(names)} configs"
    drawn = _figures(figures.draw(report) if pictures is None else pictures)
    numbers = _table(report, confidence)
    parts = [numbers, _comparisons(report), drawn, *map(_profile, report.columns)]
    return _PAGE.substitute(
        title=escape(title or f"Resources of {count}"),
        style=_STYLE,
        origin=escape(origin(report)),
        parts="\n".join(parts),
        legend=_letters(),
    )


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>"


def _letters() -> str:
    """What the letters behind the numbers mean."""
    return "; ".join(escape(part) for part in LEGEND.split("   "))


def _comparisons(report: Report) -> str:
    """How the configs were sized, who was faster, and from which size on."""
    said = (*report.notes, *map(told, (*report.contests, *report.crossovers)))
    lines = [f"<li>{escape(line)}</li>" for line in said]
    if not lines:
        return ""
    return _section("Comparisons", '<ul class="list">\n' + "\n".join(lines) + "\n</ul>")


def _table(report: Report, confidence: str) -> str:
    """Resource after resource; the notes are numbered below."""
    notes: dict[str, int] = {}
    heads = "".join(f'<th scope="col">{escape(column.config)}</th>' for column in report.columns)
    bodies = [_body(resource, report.columns, notes) for resource in RESOURCES]
    text = (
        f'<p class="about" id="letters">{_letters()}. Under a number: the interval in which it '
        f"lies with {confidence} confidence.</p>\n"
        '<div class="wide" tabindex="0" role="region" aria-label="table of all numbers">\n'
        '<table aria-describedby="letters">\n'
        f'<thead><tr><th scope="col">number</th>{heads}</tr></thead>\n'
        + "\n".join(filter(None, bodies))
        + "\n</table>\n</div>"
    )
    if notes:
        items = [f'<li id="note-{number}">{escape(note)}</li>' for note, number in notes.items()]
        text += "\n<h3>Notes</h3>\n<ol>\n" + "\n".join(items) + "\n</ol>"
    return _section("Numbers", text)


def _body(resource: str, columns: Sequence[Column], notes: dict[str, int]) -> str:
    """One resource's lines; empty where no config has any."""
    names = row_names(columns, resource)
    if not names:
        return ""
    head = f'<tr><th scope="rowgroup" colspan="{len(columns) + 1}">{escape(resource)}</th></tr>'
    lines = []
    for name in names:
        cells = "".join(_cell(_row(column, resource, name), notes) for column in columns)
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    return "<tbody>\n" + "\n".join([head, *lines]) + "\n</tbody>"


def _row(column: Column, resource: str, name: str) -> Row | None:
    rows = column.resources.get(resource, ())
    return next((row for row in rows if row.name == name), None)


def _cell(row: Row | None, notes: dict[str, int]) -> str:
    if row is None:
        return "<td></td>"
    note = ""
    if row.note:
        number = notes.setdefault(row.note, len(notes) + 1)
        note = f'<sup><a href="#note-{number}" aria-label="note {number}">{number}</a></sup>'
    if row.value is None or row.provenance is None:
        return f'<td class="gap">{cell(row)}{note}</td>'
    letter = f'<abbr title="{row.provenance}">{LETTERS[row.provenance]}</abbr>'
    interval = ""
    if row.interval is not None:
        low, high = (human(end, row.unit) for end in row.interval)
        number, _, unit = low.rpartition(" ")
        if unit and high.endswith(f" {unit}"):
            low = number
        interval = f"<small>{escape(f'{low} to {high}')}</small>"
    return f"<td>{escape(human(row.value, row.unit))} {letter}{note}{interval}</td>"


def _profile(column: Column) -> str:
    """Where a config's training step spends its time; empty where it was not traced."""
    if not column.profile:
        return ""
    heads = ("module", "pass", "time (measured)", "share", "bytes (compiled)")
    lines = ["".join(f'<th scope="col">{head}</th>' for head in heads)]
    for hot in column.profile:
        numbers = human(hot.seconds, "s"), f"{hot.share:.1%}", human(hot.bytes, "B")
        cells = "".join(f"<td>{escape(text)}</td>" for text in (hot.direction, *numbers))
        lines.append(f'<th scope="row">{escape(hot.path)}</th>{cells}')
    rows = "\n".join(f"<tr>{line}</tr>" for line in lines[1:])
    table = f"<table>\n<thead><tr>{lines[0]}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>"
    title = f"Where a training step of {column.config} spends its time"
    return _section(title, f'<div class="wide">{table}</div>')


def _figures(pictures: list[Picture]) -> str:
    """The pictures, then which are left out and why."""
    drawn = [
        f'<figure id="{p.name}">\n<h3>{escape(p.title)}</h3>\n<div class="wide">{p.svg}</div>\n'
        f"<figcaption>{escape(p.text)}</figcaption>\n</figure>"
        for p in pictures
        if p.svg is not None
    ]
    gaps = [f"<li>{escape(p.title)}: {escape(p.text)}</li>" for p in pictures if p.svg is None]
    text = "\n".join(drawn)
    if gaps:
        text += "\n<h3>Not drawn</h3>\n<ul>\n" + "\n".join(gaps) + "\n</ul>"
    return _section("Figures", text)
