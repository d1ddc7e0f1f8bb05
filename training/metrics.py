"""What a model is judged by on a split: sums over a batch, and the score that they make.

A source of tokens names its metric (`data.split.Split.metric`); text has bits per byte.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

NAT = 1 / math.log(2)  # bits


class Metric(NamedTuple):
    """`count` gives what a batch adds up to, and by how much that is divided in the end.

    It takes which answers are right and where one is due, (B, T) both; bits per byte has none:
    it needs probabilities (`training/step.py`).
    """

    title: str
    higher: bool  # whether more of it is better
    scale: float = 1.0
    count: Callable[[Any, Any], tuple[Any, Any]] | None = None


def accuracy(
    right: Bool[Array, "B T"], due: Bool[Array, "B T"]
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Share of answers that are right in a row, averaged over rows that have any."""
    answers = due.sum(-1)
    share = (right & due).sum(-1) / jnp.maximum(answers, 1)
    return share.sum(), (answers > 0).sum()


def token_accuracy(
    right: Bool[Array, "B T"], due: Bool[Array, "B T"]
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Share of all answers that are right."""
    return (right & due).sum(), due.sum()


def exact(
    right: Bool[Array, "B T"], due: Bool[Array, "B T"]
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Share of rows all of whose answers are right."""
    asked = due.any(-1)
    return ((right | ~due).all(-1) & asked).sum(), asked.sum()


METRICS = {
    "bits_per_byte": Metric("bits per byte", False, NAT),
    "accuracy": Metric("accuracy", True, 1.0, accuracy),
    "token_accuracy": Metric("accuracy of tokens", True, 1.0, token_accuracy),
    "exact": Metric("rows all right", True, 1.0, exact),
}


def of(data: Any) -> Metric:
    """The metric of what a `configs.schema.Data` names; ValueError where it is unknown."""
    name = getattr(data.source, "metric", "bits_per_byte")
    if name not in METRICS:
        raise ValueError(f"data.source has metric {name!r}; known are {', '.join(METRICS)}.")
    return METRICS[name]
