"""Pages of docs/ that a run of tests writes, from what the tests that passed saw.

    pytest tests/test_contract.py -m "" -n 2 --page=conformance
    pytest -m zoo -n 2 --page=zoo

Cells of tests that the run leaves out, by -k for example, stay as they are; those of tests that
fail go, and a test of the page misses them. A test gives its cells with
`record_property("cells", [...])`.
"""

import re
from collections.abc import Callable
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


class Recorder:
    """A pytest plugin: gathers the cells of the tests of `function`, then writes the page.

    Tests go by the ids of their parameters, as they stand in brackets after the function's name.
    `wanted` are all of them; `found` begins with the cells that the page has.
    """

    def __init__(
        self,
        page: str,
        function: str,
        wanted: list[str],
        found: dict[str, list[str]],
        write: Callable[[dict], str],
    ):
        self.file, self.wanted, self.found, self.write = DOCS / f"{page}.md", wanted, found, write
        self.pattern = re.compile(rf"::{function}\[(.+?)\](@|$)")
        self.ran = self.passed = 0

    def pytest_runtest_logreport(self, report):
        """A test has run, here or in a worker."""
        match = self.pattern.search(report.nodeid)
        if match and report.when == "call":
            self.ran += 1
            self.found.pop(match[1], None)
            if report.outcome == "passed":
                self.found[match[1]] = dict(report.user_properties)["cells"]
                self.passed += 1

    def pytest_terminal_summary(self, terminalreporter):
        """Write the page, and say what it lacks."""
        if not self.ran:
            return
        self.file.write_text(self.write(self.found))
        missing = [name for name in self.wanted if name not in self.found]
        line = f"{self.file.name} written: {self.passed} cells are new, {len(missing)} missing"
        terminalreporter.write_line(f"{line}, as {missing[:3]}" if missing else line)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def read(page: str) -> list[list[str]]:
    """The cells of the table of a page: header first, without the line of dashes."""
    file = DOCS / f"{page}.md"
    lines = file.read_text().splitlines() if file.exists() else []
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "| " in line]
    return [row for row in rows if row[0] != "---"]
