"""A report as ten configs give it: every kind of row, gaps with reasons, one config without curves.

Its numbers are made up.
"""

import dataclasses

import numpy as np

from report.report import Column, Contest, Crossover, Report
from resources.row import Curve, Row, not_available

LENGTHS = (256, 512, 1024, 2048, 4096)
CONTEXTS = tuple(2**power for power in range(8, 21, 2))
ENCODER = "an encoder writes no text"
NO_METER = "this processor shows no energy counter (RAPL) to this system"
COMPUTE_ROOF, MEMORY_ROOF = 1.2e11, 1.8e10  # FLOP/s, B/s


@dataclasses.dataclass(frozen=True)
class Kind:
    """What an example config is like."""

    name: str
    speed: float  # tokens a second in training at length 256
    power: float  # seconds of a step grow as length^power
    state: float  # bytes of a state that does not grow
    cache: float  # bytes a token of context
    window: int = 2**30  # tokens after which the cache is full
    bits: float | None = None


KINDS = (
    Kind("transformer", 2040, 1.42, 0, 6168, bits=1.213),
    Kind("transformer_window", 2210, 1.03, 0, 6168, window=1024, bits=1.262),
    Kind("gla", 1977, 1.01, 49_160, 0, bits=1.241),
    Kind("gated_deltanet", 1560, 1.0, 66_560, 0, bits=1.219),
    Kind("mamba2", 1820, 1.02, 81_920, 0, bits=1.228),
    Kind("griffin", 2000, 1.04, 42_000, 12, window=1024, bits=1.251),
    Kind("rwkv7", 1130, 0.99, 71_800, 0, bits=1.232),
    Kind("hyena", 1490, 1.12, 512, 1024, bits=1.301),
    Kind("moe_top2", 1240, 1.4, 0, 6168),
    Kind("bidirectional", 2100, 1.4, 0, 0),
)


def example() -> Report:
    """The report; the same at each call."""
    rng = np.random.default_rng(0)
    columns = [_column(i, kind, rng) for i, kind in enumerate(KINDS)]
    versions = {"python": "3.11.7", "jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8"}
    return Report(columns, "cpu", versions, "5ca1ab1e" * 5, _contests(), _crossovers())


def _contests() -> list[Contest]:
    contests = []
    for kind in KINDS[1:9]:
        ratio = kind.speed / KINDS[0].speed
        low, high = 0.97 * ratio, 1.04 * ratio
        verdict = f"{ratio:.3g}x faster ({low:.3g} to {high:.3g})"
        if ratio < 1:
            verdict = f"{1 / ratio:.3g}x slower ({1 / high:.3g} to {1 / low:.3g})"
        if low <= 1 <= high:
            verdict = f"no difference seen ({low:.3g} to {high:.3g})"
        names = kind.name, KINDS[0].name
        contests.append(Contest("train", *names, ratio, (low, high), verdict))
    few = "too few calls to say"
    return [*contests, Contest("train", "bidirectional", KINDS[0].name, 1.03, None, few)]


def _crossovers() -> list[Crossover]:
    found = []
    for config, at in (("gla", 300.0), ("mamba2", 370.0), ("moe_top2", None)):
        verdict = (
            "moe_top2 is better nowhere" if at is None else f"{config} is better from {at:.0f} on"
        )
        interval = None if at is None else (0.9 * at, 1.1 * at)
        why = "" if at is None else "both are bound by memory"
        names = config, "transformer"
        found.append(Crossover("train", "length", *names, at, interval, verdict, why))
    return found


def _column(i: int, kind: Kind, rng: np.random.Generator) -> Column:
    encoder = kind.name == "bidirectional"
    curves = [] if encoder else _curves(kind, rng)
    resources = {
        "compute": [*_sizes(kind), *_speed(kind, encoder, rng), *_exponents(kind, curves)],
        "memory": _memory(kind, encoder),
        "energy": _energy(i, kind, encoder),
        "money": [not_available("train cost", "$/Mtok", "no price is known for 'cpu'")],
        "network": [Row("train network, all", 0, "B", "compiled", "one device")],
        "quality": [_quality(kind)],
    }
    return Column(kind.name, f"{i:016x}", resources, curves)


def _sizes(kind: Kind) -> list[Row]:
    return [
        Row("parameters, total", 1_239_000 + int(kind.speed), "", "compiled"),
        Row("train FLOPs, model", 8.607e6, "FLOP/token", "modelled"),
        Row("train FLOPs, by XLA", 1.7e6, "FLOP/token", "compiled", "each loop's body once"),
        Row("train intensity", kind.speed / 160, "FLOP/B", "modelled"),
        Row("train achieved", 8.607e6 * kind.speed, "FLOP/s", "measured"),
        Row("roof, compute", COMPUTE_ROOF, "FLOP/s", "measured"),
        Row("roof, memory", MEMORY_ROOF, "B/s", "measured"),
    ]


def _spread(value: float, rng: np.random.Generator) -> tuple[float, float]:
    return value * (1 - rng.uniform(0.01, 0.06)), value * (1 + rng.uniform(0.01, 0.06))


def _speed(kind: Kind, encoder: bool, rng: np.random.Generator) -> list[Row]:
    rates = {"train": kind.speed, "prefill": 4.8 * kind.speed, "decode": 9e6 / kind.speed}
    rows = []
    for name, rate in rates.items():
        if encoder and name != "train":
            rows.append(not_available(f"{name} throughput", "tok/s", ENCODER))
            continue
        interval = _spread(rate, rng)
        rows.append(Row(f"{name} throughput", rate, "tok/s", "measured", "", interval))
        rows.append(Row(f"{name} call, p95", 1100 / rate, "s", "measured", "9 calls"))
    return rows


def _curves(kind: Kind, rng: np.random.Generator) -> list[Curve]:
    curves = []
    for name, scale, power in (
        ("train call", 1 / kind.speed, kind.power),
        ("prefill call", 0.2 / kind.speed, kind.power),
        ("decode token", 1e-4, 0.7 if kind.cache and kind.window > 4096 else 0.0),
    ):
        rows = []
        for at in LENGTHS:
            seconds = scale * 4 * 256 * (at / 256) ** power * rng.uniform(0.97, 1.03)
            rows.append(Row(name, seconds, "s", "measured", "", _spread(seconds, rng)))
        if kind.name == "hyena" and name == "train call":
            rows[3] = not_available(name, "s", "out of memory")
        curves.append(Curve(name, "length", LENGTHS, rows))
    peaks = [
        Row("train memory", 1e8 + kind.speed * at ** min(kind.power, 1.2), "B", "modelled")
        for at in LENGTHS
    ]
    states = [Row("state", _state(kind, at), "B", "compiled") for at in CONTEXTS]
    memory = Curve("train memory", "length", LENGTHS, peaks)
    return [*curves, memory, Curve("state", "context", CONTEXTS, states)]


def _state(kind: Kind, context: int) -> int:
    return int(kind.state + kind.cache * min(context, kind.window))


def _exponents(kind: Kind, curves: list[Curve]) -> list[Row]:
    rows = []
    for curve in curves:
        if curve.over == "context":
            continue
        name = f"{curve.name}, exponent over length"
        values = [row.value for row in curve.rows]
        if None in values:
            rows.append(not_available(name, "", "out of memory"))
            continue
        seconds = np.array(values, np.float64)
        power = float(np.polyfit(np.log(curve.at), np.log(seconds), 1)[0])
        rows.append(Row(name, power, "", "modelled", "R2 0.99", (power - 0.04, power + 0.04)))
    return rows


def _memory(kind: Kind, encoder: bool) -> list[Row]:
    rows = [Row("train memory, peak", 1.4e8 + 1e4 * kind.speed, "B", "modelled", "a formula")]
    for label, context in (("1k", 2**10), ("64k", 2**16)):
        name = f"state at {label} tokens"
        if encoder:
            rows.append(not_available(name, "B", "an encoder keeps no state"))
        else:
            rows.append(Row(name, _state(kind, context), "B", "compiled"))
    return rows


def _energy(i: int, kind: Kind, encoder: bool) -> list[Row]:
    """Four configs were metered, for four a power was stated, and two have neither."""
    rows = []
    for name, joules in (("train", 30 / kind.speed), ("prefill", 6 / kind.speed)):
        label, unit = f"{name} energy", "J/token"
        if i > 7 or (encoder and name != "train"):
            rows.append(not_available(label, unit, NO_METER))
            rows.append(not_available(f"{label}, spread", unit, NO_METER))
        elif i < 4:
            rows.append(Row(label, joules, unit, "measured", "RAPL: 1 processor package(s)"))
            rows.append(Row(f"{label}, spread", 0.06 * joules, unit, "measured", "5 windows"))
        else:
            rows.append(Row(label, joules, unit, "modelled", "65 W for the whole time"))
            rows.append(not_available(f"{label}, spread", unit, "a modelled energy has no spread"))
    return rows


def _quality(kind: Kind) -> Row:
    if kind.bits is None:
        return not_available("validation", "bit/byte", "no --workdir with a checkpoint")
    return Row("validation", kind.bits, "bit/byte", "measured", "step 400, 8 of 8 batches")
