"""Numbers of untrained experiments that claims are about: counts, bytes and times over length."""

import dataclasses
from collections.abc import Callable

import jax

from configs.claims import Measured
from configs.schema import Experiment
from evaluation import budget, rows, speed
from evaluation.subject import DECODED, Subject
from resources import memory, scaling

SECONDS = 2.0  # to spend on a timing


def score(measured: Measured) -> float:
    """The number."""
    given = measured.experiment
    experiments = given if isinstance(given, tuple) else (given,) * len(measured.at)
    pairs = zip(experiments, measured.at, strict=True)
    values = [QUANTITIES[measured.quantity](one, size) for one, size in pairs]
    if measured.form == "exponent":
        return scaling.exponent(measured.at, values).exponent
    if measured.form == "slope":
        return (values[-1] - values[0]) / (measured.at[-1] - measured.at[0])
    return values[-1] / values[0] if measured.form == "growth" else values[0]


def _subject(experiment: Experiment, length: int) -> Subject:
    """It, with rows of that length, on one device."""
    data = dataclasses.replace(experiment.data, length=length)
    changed = dataclasses.replace(experiment, data=data)
    return Subject("", changed, devices=jax.devices()[:1])


def _flops(experiment: Experiment, length: int) -> float:
    return rows.model_flops(_subject(experiment, length)) / experiment.data.batch


def _memory(experiment: Experiment, length: int) -> float:
    planned = memory.program_bytes(_subject(experiment, length).train.program)
    assert planned is not None, "the compiler does not say what it planned"
    return planned.peak


def _decode(experiment: Experiment, length: int) -> float:
    (found,) = speed.timed([_subject(experiment, length)], "decode", SECONDS)
    assert found is not None  # a claim names models that write
    return found.timing.median / DECODED


QUANTITIES: dict[str, Callable[[Experiment, int], float]] = {
    "flops": _flops,
    "state": budget.state,
    "memory": _memory,
    "decode": _decode,
}
