"""The catalogue: python -m models [NAME ...] [--markdown FILE] [--renew]

One line a variant, worked out from the code: its family, its paper, the operations of `kernels/`
that it runs, the bytes that decoding carries after 4k and after 1M tokens, and how its work grows
with the length of a row. NAME keeps the variants whose name contains it. What was worked out before
is read from models/facts.json; --renew works it all out again and writes that file.
"""

import argparse
import math
import sys
from pathlib import Path

from configs.schema import on_disk
from models import catalogue, facts
from parallel import launch

PIPED = 10_000  # columns for what is piped: it is not cut to a screen's width
COLUMNS = ("name", "family", "paper", "kernels", "state 4k", "state 1M", "work")
PAGE = f"""# Architectures

Written by `python -m models --renew --markdown docs/architectures.md`. States are bytes a layer and
sequence at width {facts.WIDTH} in bfloat16, with the variant's own settings; an encoder reads both
ways and has none. Work is how the FLOPs of a row grow with its length T (T up to 16,384, counted
from the program that runs).

"""


def main() -> None:
    """Read the command line and print or write the table."""
    launch.prepare()
    parser = argparse.ArgumentParser(description="The catalogue of architectures.")
    parser.add_argument("names", nargs="*", help="keep the lines that contain one of these")
    parser.add_argument("--markdown", type=on_disk, default="", help="write the page here")
    parser.add_argument("--renew", action="store_true", help="work all out again, and record it")
    given = parser.parse_args()
    wanted = lambda name: not given.names or any(part in name for part in given.names)
    cases = {name: config for name, config in catalogue.cases().items() if wanted(name)}
    if given.renew:
        if given.names:
            parser.error("--renew records all variants: give no names")
        facts.write({name: (config, facts.facts(config)) for name, config in cases.items()})
    rows = [
        line(name, facts.known(config) or facts.facts(config)) for name, config in cases.items()
    ]
    if given.markdown:
        bars = ["| " + " | ".join(row) + " |" for row in (COLUMNS, ("---",) * len(COLUMNS), *rows)]
        count = len(catalogue.architectures())
        end = f"\n{len(rows)} variants of {count} architectures.\n"
        Path(given.markdown).write_text(PAGE + "\n".join(bars) + "\n" + end)
        return
    from rich.console import Console
    from rich.table import Table

    files = len({type(config).__module__ for config in cases.values()})
    table = Table(*COLUMNS, caption=f"{len(rows)} variants of {files} files")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else PIPED).print(table)


def line(name: str, found: facts.Facts) -> tuple[str, ...]:
    """The cells of one variant."""
    family, _, short = name.partition(".")
    states = [_bytes(found.states[tokens]) for tokens in ("4k", "1M")]
    return (
        short.partition(":")[2] or short,
        family,
        found.paper,
        ", ".join(found.kernels) or "-",
        *states,
        found.work,
    )


def _bytes(count: int | None) -> str:
    if count is None:
        return "encoder"
    power = max(0, min(3, int(math.log10(max(count, 1)) / 3)))
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB')[power]}"


if __name__ == "__main__":
    main()
