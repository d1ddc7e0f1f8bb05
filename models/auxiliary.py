"""Auxiliary losses and metrics: what a layer has beside its output for training and its log.

A layer calls `loss` or `metric`; the model opens `collecting` around each block, inside the traced
function that runs it, and returns what was found as that function's output. Where nobody collects,
nothing happens.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax.numpy as jnp
from jaxtyping import Array, Float

Found = dict[str, dict[str, list[Float[Array, "..."]]]]  # stacked layers lead
_open: contextvars.ContextVar[Found | None] = contextvars.ContextVar("auxiliary", default=None)


@contextlib.contextmanager
def collecting() -> Iterator[Found]:
    """A dict {"losses": {name: values}, "metrics": {name: values}}, filled by layers inside."""
    found: Found = {"losses": {}, "metrics": {}}
    token = _open.set(found)
    try:
        yield found
    finally:
        _open.reset(token)


def loss(name: str, value: Float[Array, ""]) -> None:
    """Add `value`, already weighted, to what training minimises."""
    _add("losses", name, value)


def metric(name: str, value: Float[Array, ""]) -> None:
    """Report `value`, a scalar, as the mean over layers."""
    _add("metrics", name, value)


def _add(kind, name, value):
    found = _open.get()
    if found is not None:
        found[kind].setdefault(name, []).append(value)


def over_layers(found: list[Found]) -> dict[str, dict[str, Float[Array, ""]]]:
    """One number a name: the sum of a loss over all layers, the mean of a metric.

    A value may carry a leading dimension of stacked layers.
    """
    totals: dict[str, dict[str, list]] = {"losses": {}, "metrics": {}}
    for one in found:
        for kind, names in one.items():
            for name, values in names.items():
                totals[kind].setdefault(name, []).extend(jnp.ravel(value) for value in values)
    fold = {"losses": jnp.sum, "metrics": jnp.mean}
    return {
        kind: {name: fold[kind](jnp.concatenate(values)) for name, values in names.items()}
        for kind, names in totals.items()
    }


def repeat(found: Found) -> None:
    """Add what another collector found, once its values have left the function they arose in."""
    for kind, names in found.items():
        for name, values in names.items():
            for value in values:
                _add(kind, name, value)
