"""The report of several configs: what was asked for of each, and who was faster."""

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from configs import schema
from evaluation import budget, curves, front, quality, rows, speed
from evaluation.groups import GROUPS
from evaluation.subject import Subject
from report import report
from report.report import Column, Contest, Report
from resources import devices, energy, money, throughput
from resources.row import Row, not_available

TIMED = {"speed", "energy", "money", "network"}  # groups that need the seconds of calls


class Bench:
    """Configs under measurement: what is stated of the device, and the calls that were timed."""

    def __init__(self, subjects: Sequence[Subject], options: Mapping[str, Any]):
        self.subjects, self.options = subjects, options
        table = devices.table(options["devices"] or None)
        self.device = devices.find(jax.devices()[0].device_kind, table)
        stated = {name: options[name] or None for name in ("price", "watts", "pue", "grid")}
        self.assumptions = devices.Assumptions(**stated)
        self.meter = energy.meter()
        self.idle: list[Row] = []
        self.timed: dict[str, list[speed.Timed | None]] = {}

    def rest(self) -> None:
        """Measure the idle power, where it is counted: before anything has warmed the device."""
        if not isinstance(self.meter, str):
            self.idle = [energy.idle_row(self.meter)]

    def time(self) -> None:
        """Time every kind of call, the configs in turn."""
        for kind in speed.KINDS:
            self.timed[kind] = speed.timed(self.subjects, kind, self.options["seconds"])

    def spend_alike(self) -> list[str]:
        """Give every config the steps that the first one's money buys; a line for each."""
        seconds = [timed.timing.median for timed in self.timed["train"] if timed]
        before = [subject.experiment for subject in self.subjects]
        lines = []
        for subject, new in zip(self.subjects, budget.match_dollars(before, seconds), strict=True):
            lines.append(f"{subject.name}: steps {subject.experiment.steps} -> {new.steps}")
            subject.experiment = schema.freeze(new)
        return lines

    def contests(self) -> list[Contest]:
        """Who was faster in what was timed."""
        return [
            contest
            for kind, found in self.timed.items()
            for contest in speed.contests(self.subjects, kind, found)
        ]

    def speeds(self, i: int) -> list[Row]:
        """Throughput and seconds of each kind of call, and how busy training keeps the device."""
        found = [row for kind, all in self.timed.items() for row in speed.rows(kind, all[i])]
        train = self.timed["train"][i]
        assert train is not None  # encoders train too
        seconds = train.timing.median
        return found + rows.utilisation(self.subjects[i], seconds, self.device)

    def joules(self, i: int) -> list[Row]:
        """Joules a token of each kind of call, and the energy and emissions of the whole run."""
        subject = self.subjects[i]
        measured = lambda kind, *spent: energy.rows(kind, self._counted(subject, kind), *spent)
        found = self._each_call(i, "energy", "J/token", measured)
        steps = subject.experiment.steps
        run = energy.run_rows(found[0], steps, subject.tokens, self.assumptions)
        return found + run + self.idle

    def _each_call(self, i: int, what: str, unit: str, one: Callable[..., list[Row]]) -> list[Row]:
        """`one(kind, seconds, tokens, device, devices, assumptions)` of each kind of call."""
        found: list[Row] = []
        for kind, all in self.timed.items():
            timed = all[i]
            if timed is None:
                found.append(not_available(f"{kind} {what}", unit, speed.ENCODER))
                continue
            spent = timed.timing.median, timed.tokens, self.device, _boards(self.subjects[i])
            found += one(kind, *spent, self.assumptions)
        return found

    def _counted(self, subject: Subject, kind: str) -> energy.Energy | str:
        """Measured, or why not."""
        if isinstance(self.meter, str):
            return self.meter
        _, call, _ = speed.KINDS[kind](subject)
        return energy.measure(call, self.meter, seconds=max(self.options["seconds"], 1.0))

    def dollars(self, i: int) -> list[Row]:
        """Dollars a million tokens of each kind of call, and of the whole run."""
        subject = self.subjects[i]
        found = self._each_call(i, "cost", "$/Mtok", money.rows)
        steps = subject.experiment.steps
        weights = int(rows.parameters(subject)[0].value or 0)
        loss = self.options["loss"] or None
        reached = quality.steps_to(self.trained[i], loss) if loss else None
        run = found[0], steps, subject.tokens, weights
        return found + money.run_rows(*run, loss=loss, reached=reached)

    def traffic(self, i: int) -> list[Row]:
        """What a training step sends, and the share of its time that the links need."""
        train = self.timed["train"][i]
        seconds = None if train is None else train.timing.median
        return rows.traffic(self.subjects[i], self.device, seconds)

    def qualities(self, i: int) -> list[Row]:
        """Validation of the trained weights, and likeness to the first config's."""
        first, subject = self.subjects[0], self.subjects[i]
        found = quality.validation(subject, self.trained[i])
        if i:
            found += quality.likeness(subject, first, self.trained[i], self.trained[0])
        return found

    @functools.cached_property
    def trained(self) -> list[quality.Trained | str]:
        """Every config's newest weights; one --workdir is tried for all of them."""
        folders = self.options["workdir"].split(",")
        if len(folders) == 1:
            folders *= len(self.subjects)
        if len(folders) != len(self.subjects):
            raise ValueError(
                f"--workdir={self.options['workdir']} names {len(folders)} folders for "
                f"{len(self.subjects)} configs. Give one, or one for each."
            )
        pairs = zip(self.subjects, folders, strict=True)
        return [quality.load(subject, folder) for subject, folder in pairs]


def sized(subjects: Sequence[Subject], text: str) -> list[str]:
    """Size every subject to the first one's budget; what was changed, a line for each."""
    before, known = [subject.experiment for subject in subjects], {}
    chosen = budget.named(text)
    names = [subject.name for subject in subjects]
    after = budget.match(before, chosen, known=known, names=names)
    for subject, experiment in zip(subjects, after, strict=True):
        subject.experiment = schema.freeze(experiment)
    lines = budget.describe(before, after, chosen, known)
    return [f"{subject.name}: {line}" for subject, line in zip(subjects, lines, strict=True)]


def write_sized(subjects: Sequence[Subject], folder: str) -> list[str]:
    """Write every config as it is now, a JSON file each that train.py takes; a line for each.

    Nothing is written where no folder is named.
    """
    if not folder:
        return []
    Path(folder).mkdir(parents=True, exist_ok=True)
    lines, used = [], set()
    for subject in subjects:
        stem = re.sub(r"[^\w.-]+", "_", Path(subject.name).with_suffix("").name) or "config"
        names = itertools.chain([stem], (f"{stem}_{i}" for i in itertools.count(2)))
        name = next(name for name in names if name not in used)
        used.add(name)
        path = Path(folder) / f"{name}.json"
        path.write_text(json.dumps(schema.to_dict(subject.experiment), indent=1) + "\n")
        lines.append(f"{subject.name}: python train.py --config={path}")
    return lines


def measure(
    subjects: Sequence[Subject], groups: Sequence[str], options: Mapping[str, Any]
) -> Report:
    """Measure `groups` of rows, and the curves that the options ask for; eval.py's OPTIONS."""
    last, notes = len(subjects) - 1, []
    by_money = options["match"] == "dollars"  # which takes times: it is matched after those
    if not -1 <= options["column"] <= last:
        raise ValueError(f"--column={options['column']} must be -1 (all) to {last}.")
    if options["match"] and not by_money:
        notes = sized(subjects, options["match"]) + write_sized(subjects, options["sized"])
    if options["column"] >= 0:
        subjects = subjects[options["column"] :][:1]
    bench = Bench(subjects, options)
    if "energy" in groups:
        bench.rest()
    found: dict[str, list[list[Row]]] = {}
    if "peak" in groups:  # it takes a process of its own, and some devices serve one at a time
        found["peak"] = _peaks(subjects, options, alone=list(groups) == ["peak"])
    if TIMED & set(groups):
        bench.time()
        if by_money:
            notes = bench.spend_alike() + write_sized(subjects, options["sized"])
    if "latency" in groups:
        found["latency"] = speed.latency(subjects, options["seconds"])
    one: dict[str, Callable[[int], list[Row]]] = {
        "parameters": lambda i: rows.parameters(subjects[i]),
        "flops": lambda i: rows.flops(subjects[i]),
        "gap": lambda i: rows.gaps(subjects[i]),
        "speed": bench.speeds,
        "memory": lambda i: rows.memory(subjects[i]),
        "energy": bench.joules,
        "money": bench.dollars,
        "network": bench.traffic,
        "quality": bench.qualities,
    }
    for group in groups:
        if group not in found:
            found[group] = [one[group](i) for i in range(len(subjects))]
    swept = [
        curves.Swept(subjects, axis, sizes, options["seconds"])
        for axis, sizes in curves.parse(options["curves"])
    ]
    columns = _columns(subjects, {group: found[group] for group in groups}, swept, options)
    contests = bench.contests() if "speed" in groups else []
    crossovers = [crossover for one in swept for crossover in one.crossovers()]
    return Report(
        columns,
        throughput.device_name(),
        report.versions(),
        report.commit(),
        contests,
        crossovers,
        notes,
    )


def _columns(
    subjects: Sequence[Subject],
    found: Mapping[str, list[list[Row]]],
    swept: Sequence[curves.Swept],
    options: Mapping[str, Any],
) -> list[Column]:
    """A column for each config, with its profile and its rank where the options ask for them."""
    columns = [
        _column(subject, {group: lines[i] for group, lines in found.items()}, swept, i)
        for i, subject in enumerate(subjects)
    ]
    if options["profile"]:
        columns = [
            dataclasses.replace(column, profile=rows.profile(subject, options["profile"]))
            for column, subject in zip(columns, subjects, strict=True)
        ]
    if options["pareto"]:
        ranks = front.ranks(columns, options["pareto"].split(","))
        columns = [
            _with(column, "quality", rank) for column, rank in zip(columns, ranks, strict=True)
        ]
    return columns


def _column(
    subject: Subject, found: Mapping[str, list[Row]], swept: Sequence[curves.Swept], i: int
) -> Column:
    resources: dict[str, list[Row]] = {GROUPS[group]: [] for group in found}
    for group, lines in found.items():
        resources[GROUPS[group]] += lines
    drawn = [curve for one in swept for curve in one.curves(i)]
    if "memory" in found:
        drawn.append(curves.state(subject))
    exponents = [row for one in swept for row in one.exponents(i)]
    if exponents:
        resources.setdefault("compute", []).extend(exponents)
    return Column(subject.name, schema.fingerprint(subject.experiment), resources, drawn)


def _with(column: Column, resource: str, row: Row) -> Column:
    """The column with one row more."""
    lines = [*column.resources.get(resource, ()), row]
    return dataclasses.replace(column, resources={**column.resources, resource: lines})


def _peaks(subjects: Sequence[Subject], options: Mapping[str, Any], alone: bool) -> list[list[Row]]:
    """Measured peaks: here if this process does nothing else, else each in a process of its own."""
    if alone and len(subjects) == 1:
        return [[rows.peak(subjects[0])]]
    return [[rows.peak_elsewhere(subject, options["peak_seconds"])] for subject in subjects]


def _boards(subject: Subject) -> int:
    """Devices that draw power and cost money for this config."""
    return min(subject.mesh.size, devices.count())
