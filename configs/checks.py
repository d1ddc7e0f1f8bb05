"""What a config tree must satisfy before anything heavy is loaded: types, ranges, fitting pairs.

Sizes of the model itself are checked where it is built, in models/.
"""

import dataclasses
import math
from typing import Any, NamedTuple

from configs import overrides
from configs.schema import Experiment, on_disk
from data import sources


class Range(NamedTuple):
    """Numbers from `low` to `high`; an open end is not allowed itself."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        """Whether `value` lies inside."""
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        low = f"{'greater than' if self.open_low else 'at least'} {self.low}"
        if self.high == math.inf:
            return low
        return f"{low} and {'less than' if self.open_high else 'at most'} {self.high}"


SHARE = Range(0, 1)
SEED = Range(0, 2**32 - 1)  # JAX drops the bits above silently
MEAN = Range(0, 1, open_high=True)  # how much of its old value a running mean keeps
RULES = {  # of optimizer.rule, where it has them; what else a rule has is checked where it is built
    "momentum": MEAN,
    "b1": MEAN,
    "b2": MEAN,
    "eps": Range(0, open_low=True),
}
RANGES = {
    "steps": Range(1),
    "seed": SEED,
    "log_every": Range(1),
    "data.length": Range(2),
    "data.batch": Range(1),
    "data.seed": SEED,
    "optimizer.learning_rate": Range(0, open_low=True),
    "optimizer.warmup_steps": Range(0),
    "optimizer.decay_fraction": SHARE,
    "optimizer.final_fraction": Range(0, 1, open_low=True),
    "optimizer.ema": MEAN,
    "optimizer.weight_decay": Range(0),
    "optimizer.clip_norm": Range(0),
    "optimizer.accumulation": Range(1),
    "mesh.data": Range(-1),
    "mesh.fsdp": Range(-1),
    "mesh.tensor": Range(-1),
    "checkpoint.every_steps": Range(0),
    "checkpoint.keep": Range(1),
    "checkpoint.keep_best": Range(0),
    "evaluation.every_steps": Range(0),
    "evaluation.batches": Range(1),
    "evaluation.length": Range(0),
    "evaluation.sample_tokens": Range(0),
    "evaluation.temperature": Range(0),
    "guards.max_bad_steps": Range(1),
    "guards.hang_timeout_s": Range(0),
}
TOKENIZERS = ("bytes", "bpe:FILE")


def check(experiment: Experiment) -> None:
    """Raise ValueError, one line naming key, value and what is allowed, at the first fault."""
    check_types(experiment)
    rule = experiment.optimizer.rule
    if not hasattr(rule, "build"):
        raise ValueError(
            f"optimizer.rule={rule!r} must be a Config such as training.optimizers.adamw.Config()."
        )
    own = {f"optimizer.rule.{name}": RULES[name] for name in RULES if hasattr(rule, name)}
    for key, allowed in (RANGES | own).items():
        value = overrides.find(experiment, key)[2]
        if not allowed.holds(value):
            raise ValueError(f"{key}={value} must be {allowed}.")
    if not overrides.is_section(experiment.model):
        raise ValueError(f"model={experiment.model!r} must be a Config such as models.lm.Config().")
    for key in ("source", "tokenizer", "folder"):
        on_disk(str(getattr(experiment.data, key)), f"data.{key}")
    if isinstance(experiment.data.source, str):
        _check_form("data.source", experiment.data.source, sources.forms())
    _check_form("data.tokenizer", experiment.data.tokenizer, TOKENIZERS)
    if experiment.evaluation.length == 1:
        raise ValueError("evaluation.length=1 must be 0, as in training, or at least 2.")
    _check_task(experiment)
    _check_mesh(experiment)
    _check_schedule(experiment)
    rows, parts = experiment.data.batch, experiment.optimizer.accumulation
    if rows % parts:
        near = max(part for part in range(1, min(rows, parts) + 1) if rows % part == 0)
        more = -(-rows // parts) * parts
        raise ValueError(
            f"optimizer.accumulation={parts} does not divide data.batch={rows}. "
            f"Use {near}, or data.batch={more}."
        )
    if experiment.optimizer.ema and hasattr(rule, "evaluated"):
        name = type(rule).__module__.rpartition(".")[2]
        raise ValueError(
            f"optimizer.ema={experiment.optimizer.ema} averages weights that {name} averages by "
            "itself. Use optimizer.ema=0, or another optimizer.rule."
        )
    if experiment.carry_state and experiment.data.layout != "stream":
        raise ValueError(
            f"carry_state=True needs data.layout='stream', not {experiment.data.layout!r}: only "
            "there do rows go on from batch to batch."
        )


def check_types(tree: Any, prefix: str = "") -> None:
    """Raise ValueError where a value does not fit its field's annotation."""
    for part, value in overrides.children(tree).items():
        key = overrides.join(prefix, part)
        if dataclasses.is_dataclass(tree):
            kind = overrides.annotation(tree, part)
            if not overrides.fits(kind, value):
                raise ValueError(overrides.refusal(key, kind, repr(value), str(value)))
        check_types(value, key)


def _check_form(key: str, value: str, forms: tuple[str, ...]) -> None:
    """`value` must be one of `forms`, with its own word in place of the capitals after a colon."""
    named = {form.partition(":")[0]: form for form in forms}
    start, colon, rest = value.partition(":")
    if start not in named or bool(colon) != (":" in named[start]) or bool(colon) != bool(rest):
        near = named[overrides.nearest(start, named, 0)]
        allowed = ", ".join(forms)
        raise ValueError(f"{key}={value!r} must be one of {allowed} (did you mean {near!r}?).")


def _check_task(experiment: Experiment) -> None:
    """What reads text, or guesses it, does not go with rows and answers that a task makes."""
    if not hasattr(experiment.data.source, "rows"):
        return
    plain = {"data.tokenizer": "bytes", "data.layout": "windows"}
    plain |= {"model.objective": "next", "model.predict": 1}
    for key, value in plain.items():
        given = overrides.find(experiment, key)[2]
        if given != value:
            raise ValueError(
                f"{key}={given!r} does not go with the task {experiment.data.source}, which makes "
                f"its own rows and answers. Use {value!r}."
            )


def _check_mesh(experiment: Experiment) -> None:
    sizes = overrides.children(experiment.mesh)
    for axis, size in sizes.items():
        if size == 0:
            raise ValueError(
                f"mesh.{axis}=0 must be at least 1, or -1 to take the devices left over."
            )
    free = [f"mesh.{axis}=-1" for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(
            f"{' and '.join(free)}: only one mesh axis may be -1; give the others a size."
        )


def _check_schedule(experiment: Experiment) -> None:
    optimizer, steps = experiment.optimizer, experiment.steps
    warmup = optimizer.warmup_steps
    if warmup > steps:
        raise ValueError(
            f"optimizer.warmup_steps={warmup} is more than steps={steps}. Use 0 to {steps}."
        )
    decay = max(1, round(optimizer.decay_fraction * steps))
    if optimizer.schedule == "wsd" and warmup + decay > steps:
        raise ValueError(
            f"optimizer.warmup_steps={warmup} and the final decay of {decay} steps "
            f"(optimizer.decay_fraction={optimizer.decay_fraction}) are more than steps={steps}. "
            f"Use at most {steps - decay} warmup steps."
        )
