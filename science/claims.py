"""The ledger of claims: python -m science.claims [NAME ...] [--run] [--markdown FILE]

Each file of configs/papers/ holds a claim of a paper and the sweep that tests it. Without --run
their verdicts are listed, from the records beside them; --run trains what is missing, by the same
rules as sweep.py, and writes the record. NAME keeps the files whose path contains it.
"""

import argparse
import dataclasses
import datetime
import hashlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy import stats

from configs import loading, schema, sweep
from configs.claims import Above, Claim, Reaches
from configs.schema import Experiment, on_disk
from parallel import launch
from report.table import human

ROOT = Path(__file__).parents[1]
PAPERS = ROOT / "configs" / "papers"
REPRODUCED, NOT, NOT_RUN = "reproduced", "not reproduced", "not run"
KEPT = ("parameters", "flops", "state")  # sizes of a row that its record keeps
CONFIDENCE = 0.95
PAGE = """# Claims

Written by `python -m science.claims --markdown docs/claims.md`. Each line is a file of
`configs/papers/`: a claim of a paper, what is trained or counted to test it, and in the record
beside it what came out.
`python -m science.claims NAME --run` runs one again. A score is a mean over seeds with its 95 %
interval (Student's t).

"""


class Entry(NamedTuple):
    """One file of the ledger."""

    file: Path
    claim: Claim
    sweeps: bool  # it is trained; else it is measured
    record: dict[str, Any] | None  # what the last run wrote

    @property
    def name(self) -> str:
        """Paper and file."""
        return str(self.file.relative_to(PAPERS).with_suffix(""))

    @property
    def verdict(self) -> str:
        """In a word or two."""
        if self.record is None:
            return f"needs {self.claim.needs}" if self.claim.needs else NOT_RUN
        return self.record["verdict"]

    @property
    def stale(self) -> bool:
        """Whether the record is of other experiments or checks than the file has now."""
        kept = self.record
        return bool(kept) and (kept["checks"], kept["experiments"]) != (
            _checks(self.claim),
            _experiments(self),
        )


def ledger(names: Sequence[str] = ()) -> list[Entry]:
    """Every claim whose path contains one of `names`."""
    found = []
    for file in sorted(PAPERS.glob("*/[!_]*.py")):
        if names and not any(name in str(file.relative_to(PAPERS)) for name in names):
            continue
        module, kept = loading.module(file), file.with_suffix(".json")
        record = json.loads(kept.read_text()) if kept.exists() else None
        found.append(Entry(file, module.CLAIM, hasattr(module, "get_sweep"), record))
    return found


def fails(claim: Claim, scores: dict[str, Sequence[float]], higher: bool) -> list[str]:
    """Which checks do not hold, a phrase each; `scores` has those of every row."""
    return list(filter(None, (_fails(check, claim, scores, higher) for check in claim.checks)))


def _fails(check, claim: Claim, scores: dict[str, Sequence[float]], higher: bool) -> str:
    rows = (check.better, check.worse) if isinstance(check, Above) else (check.row,)
    for row in rows:
        if row not in scores:
            raise ValueError(f"no row {row!r} in the sweep; it has {', '.join(scores)}.")
        if not scores[row]:
            return f"{row} has no score"
    if isinstance(check, Above):
        better, worse = scores[check.better], scores[check.worse]
        low, mean = difference(better, worse) if higher else difference(worse, better)
        if low > check.by:
            return ""
        return (
            f"{check.better} is {mean:.3f} better than {check.worse}, by {low:.3f} at least "
            f"(more than {check.by:g} is claimed)"
        )
    value = summary(scores[check.row], claim.statistic, higher)
    holds = value >= check.value if isinstance(check, Reaches) else value <= check.value
    word = "at least" if isinstance(check, Reaches) else "at most"
    said = f"{check.row} has {value:.3f} ({claim.statistic}), {word} {check.value:g} is claimed"
    return "" if holds else said


def summary(scores: Sequence[float], statistic: str, higher: bool) -> float:
    """Mean, median or best of the seeds."""
    if statistic == "best":
        return max(scores) if higher else min(scores)
    return (statistics.fmean if statistic == "mean" else statistics.median)(scores)


def difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Lower end of the 95 % interval of mean(a) - mean(b), by Welch's t; and the difference itself.

    With a seed each there is no interval: minus infinity.
    """
    mean = statistics.fmean(a) - statistics.fmean(b)
    if len(a) < 2 or len(b) < 2:
        return -math.inf, mean
    parts = [statistics.variance(x) / len(x) for x in (a, b)]
    if sum(parts) == 0:
        return mean, mean
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(x) - 1) for part, x in zip(parts, (a, b), strict=True)
    )
    return mean - stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * math.sqrt(sum(parts)), mean


def _checks(claim: Claim) -> list:
    """The checks as JSON values."""
    return [[type(check).__name__, *dataclasses.astuple(check)] for check in claim.checks]


def run(entry: Entry) -> dict[str, Any]:
    """Run what a claim lacks, and write the record beside its file; the record.

    Started twice it runs twice as many trials at once.
    """
    from report import report
    from resources import throughput

    found = _trained(entry) if entry.sweeps else _measured(entry)
    scores = {row["name"]: row["scores"] for row in found.rows}
    record = {
        "verdict": "",
        "date": datetime.date.today().isoformat(),
        "command": f"python -m science.claims {entry.name} --run",
        "device": throughput.device_name(),
        "versions": report.versions(),
        "commit": report.commit(),
        "experiments": _experiments(entry),
        "checks": _checks(entry.claim),
        "metric": found.metric,
        "higher": found.higher,
        "seconds": round(found.seconds, 1),
        "rows": found.rows,
        "fails": fails(entry.claim, scores, found.higher),
    }
    record["verdict"] = NOT if record["fails"] else REPRODUCED
    entry.file.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    return record


class Found(NamedTuple):
    """What a run of a claim gave."""

    rows: list[dict[str, Any]]
    metric: str
    higher: bool
    seconds: float  # of all its trials, whenever they ran


def _trained(entry: Entry) -> Found:
    from science import page, study, table, worker
    from training import metrics

    base, found, points = _points(entry.file)
    metric = metrics.of(base.data)
    root = ROOT / "runs" / "claims" / entry.name
    root.mkdir(parents=True, exist_ok=True)
    kept = study.opened(entry.name, study.default_storage(root), 15, metric.higher)
    say = lambda line: print(line, flush=True)
    if not worker.work(kept, points, root, tuned=found.tuned, say=say):
        raise SystemExit(3)
    rows = table.entries(kept, points, found.tuned, metric.higher)
    page.write(root, rows, entry.claim.says, metric.title, found.tuned)
    held = study.of_points(kept)
    seconds = sum(held[point.key].user_attrs.get("seconds", 0) for point in points)
    kept_rows = [
        {
            "name": row.name,
            "scores": row.scores,
            "tuned": row.tuned,
            "tried": row.tried,
            "sizes": {name: row.sizes[name] for name in KEPT if name in row.sizes},
        }
        for row in rows
    ]
    return Found(kept_rows, metric.title, metric.higher, seconds)


def _measured(entry: Entry) -> Found:
    from science import measures

    began, rows = time.monotonic(), []
    measured = loading.module(entry.file).get_measures()
    for name, one in measured.items():
        rows.append({"name": name, "scores": [measures.score(one)]})
        print(f"{name}: {rows[-1]['scores'][0]:.4g}", flush=True)
    one = next(iter(measured.values()))
    title = one.quantity if one.form == "value" else f"{one.quantity}, {one.form}"
    return Found(rows, title, True, time.monotonic() - began)


def _points(file: Path) -> tuple[Experiment, sweep.Sweep, list[sweep.Point]]:
    base = loading.parse([f"--config={file}"], {}, single=True)[0][0]
    found = loading.sweep(str(file), base)
    assert found is not None, f"{file} has no get_sweep"
    return base, found, sweep.points(found)


def _experiments(entry: Entry) -> str:
    """What a claim runs, as a print that changes with any of its settings."""
    if entry.sweeps:
        return _print(point.key for point in _points(entry.file)[2])
    measured = loading.module(entry.file).get_measures()
    parts = (
        [name, m.quantity, m.at, m.form, schema.to_dict(m.experiment)]
        for name, m in measured.items()
    )
    return _print(map(str, parts))


def _print(keys: Iterable[str]) -> str:
    return hashlib.sha256(" ".join(sorted(keys)).encode()).hexdigest()[:16]


def told(entry: Entry) -> list[str]:
    """Scores of all rows, and what does not hold: phrases."""
    if entry.record is None:
        return []
    scores = [f"{row['name']} {_score(row['scores'])}" for row in entry.record["rows"]]
    changed = ["the file has changed since"] * entry.stale
    return [*scores, *entry.record["fails"], *changed]


def _score(scores: Sequence[float]) -> str:
    from science.table import interval

    if not scores:
        return "no score"
    mean, around = statistics.fmean(scores), interval(scores)
    return f"{mean:.4g}" + (f" +-{around[1] - mean:.2g}" if around else "")


def show(entries: Sequence[Entry]) -> None:
    """A block for each claim."""
    for entry in entries:
        print(f"{entry.verdict:15} {entry.name}: {entry.claim.says}")
        for line in told(entry):
            print(f"{'':16}{line}")
    counts = {verdict: 0 for verdict in (REPRODUCED, NOT, NOT_RUN)}
    for entry in entries:
        counts[entry.verdict] = counts.get(entry.verdict, 0) + 1
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count))


def markdown(entries: Sequence[Entry]) -> str:
    """The page: a table of verdicts, then a section for each claim."""
    lines = [PAGE, "| claim | source | verdict | date | time |\n", "|---|---|---|---|---:|\n"]
    for entry in entries:
        record = entry.record or {}
        taken = _duration(record["seconds"]) if record else entry.claim.cost
        cells = (
            f"[{entry.name}](#{entry.name.replace('/', '')})",
            entry.claim.source,
            f"**{entry.verdict}**",
            record.get("date", ""),
            taken,
        )
        lines.append(f"| {' | '.join(cells)} |\n")
    return "".join(lines) + "".join(map(_section, entries))


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _section(entry: Entry) -> str:
    claim, record = entry.claim, entry.record
    text = f"\n## {entry.name}\n\n{claim.says} ({claim.source})\n\n"
    text += f"Published: {claim.published}\n\nHere: {claim.scaled}\n\n"
    if record is None:
        return text + f"Verdict: {entry.verdict}. Cost: {claim.cost}.\n"
    text += f"| row | {record['metric']} | seeds | tuned | parameters | state |\n"
    text += "|---|---:|---:|---|---:|---:|\n"
    text += "".join(f"| {' | '.join(_cells(row))} |\n" for row in record["rows"])
    why = "".join(f"\n- {line}" for line in record["fails"])
    text += f"\nVerdict: **{entry.verdict}**, {record['date']}, {record['device']}, "
    text += f"jax {record['versions']['jax']}; `{record['command']}`.{why}\n"
    return text


def _cells(row: dict[str, Any]) -> list[str]:
    chosen = ", ".join(f"{sweep.short(a)} {v}" for a, v in row.get("tuned", {}).items())
    chosen += f" (of {row['tried']})" if chosen else ""
    sizes = row.get("sizes", {})
    units = {"parameters": "", "state": "B"}
    shown = [human(sizes[name], unit) if name in sizes else "" for name, unit in units.items()]
    return [row["name"], _score(row["scores"]), str(len(row["scores"])), chosen, *shown]


def main() -> None:
    """Read the command line; run, list or write."""
    launch.prepare()
    parser = argparse.ArgumentParser(prog="python -m science.claims", description=__doc__)
    parser.add_argument("names", nargs="*", help="keep the claims whose path contains one of these")
    parser.add_argument("--run", action="store_true", help="train what is missing, and record it")
    parser.add_argument("--markdown", type=on_disk, default="", help="write the page here")
    given = parser.parse_args()
    found = ledger(given.names)
    if not found:
        parser.error(f"no claim of configs/papers is named {' or '.join(given.names)}")
    if given.run:
        from parallel import compile_cache, host

        host.keep_memory()
        compile_cache.use(True)
        for entry in found:
            run(entry)
        found = ledger(given.names)
    if given.markdown:
        Path(given.markdown).write_text(markdown(found))
        return
    try:
        show(found)
    except BrokenPipeError:  # a reader that has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
