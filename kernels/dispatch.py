"""Choose an operation's implementation: by name, or by platform; never a silent fallback."""

import contextlib
import functools
import importlib
import importlib.util
import logging
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax

IMPLEMENTATIONS = ("ref", "xla", "pallas_tpu", "pallas_gpu")
log = logging.getLogger(__name__)
# Part of JAX's trace caches: a function jitted under one value is traced anew under another.
_named = jax.make_user_context(None)
_labels = jax.make_user_context(None)


@contextlib.contextmanager
def using(impl: str):
    """Within the block every call that names no implementation traces `impl`, or raises."""
    with _named(impl):
        yield


class Label(NamedTuple):
    """What one traced call of an operation says of itself."""

    name: str  # kernels.<operation>.<function>
    flops: float | None  # of kernels/<operation>/cost.py; None without one
    elements: int  # of all outputs; more of them in the program mean that the call was mapped


class _Labels:
    """The calls of one `labelling`, told apart from others by identity."""

    def __init__(self):
        self.calls: dict[str, Label] = {}


@contextlib.contextmanager
def labelling() -> Iterator[dict[str, Label]]:
    """Within the block each call traces as a jitted function named by a key of the yielded dict.

    For counting: a jaxpr then says which of its equations belong to which operation.
    """
    labels = _Labels()
    with _labels(labels):
        yield labels.calls


@functools.cache
def implementations(operation: str) -> tuple[str, ...]:
    """The implementations that `kernels/<operation>/` holds, as module names."""
    found = importlib.util.find_spec
    return tuple(n for n in IMPLEMENTATIONS if found(f"kernels.{operation}.{n}") is not None)


def choose(operation: str, function: str, impl: str | None) -> Callable:
    """The callable `kernels.<operation>.<impl>.<function>`.

    `impl=None` takes the chunked XLA form, the default on every platform until committed evidence
    says otherwise. A named implementation runs or raises ValueError.
    """
    known = implementations(operation)
    impl = _named.value if impl is None else impl
    if impl is None:
        impl = "xla"
        _announce(operation, impl, jax.default_backend())
    if impl not in known:
        listed = ", ".join(known)
        raise ValueError(
            f"{operation} has no implementation {impl!r}; it has {listed} (or None: chosen)."
        )
    run = getattr(importlib.import_module(f"kernels.{operation}.{impl}"), function)
    labels = _labels.value
    return run if labels is None else _labelled(operation, function, run, labels.calls)


def _labelled(operation: str, function: str, run: Callable, labels: dict[str, Label]) -> Callable:
    """`run` in a jit of its own; arguments that are no arrays stay Python values."""
    name = f"kernels.{operation}.{function}"

    @functools.wraps(run)
    def call(*args, **kwargs):
        leaves, tree = jax.tree.flatten((args, kwargs))
        at = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "shape")]

        def traced(arrays):
            mixed = dict(enumerate(leaves)) | dict(zip(at, arrays, strict=True))
            positional, named = jax.tree.unflatten(tree, mixed.values())
            return run(*positional, **named)

        traced.__name__ = key = f"{name}#{len(labels)}"
        cost = _cost(operation, function)
        labels[key] = Label(name, cost and float(cost(*args, **kwargs)), 0)
        outputs = jax.jit(traced)([leaves[i] for i in at])
        elements = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(outputs))
        labels[key] = labels[key]._replace(elements=elements)
        return outputs

    return call


@functools.cache
def _cost(operation: str, function: str) -> Callable | None:
    """The function of that name in kernels/<operation>/cost.py; it takes the call's arguments."""
    module = f"kernels.{operation}.cost"
    if importlib.util.find_spec(module) is None:
        return None
    return getattr(importlib.import_module(module), function, None)


@functools.cache
def _announce(operation: str, impl: str, platform: str) -> None:
    log.info("kernels.%s runs as %s on %s", operation, impl, platform)
