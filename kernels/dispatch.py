"""Choose an operation's implementation: by name, or by platform; never a silent fallback."""

import contextlib
import functools
import importlib
import importlib.util
import logging
import math
import types
from collections.abc import Callable

import jax

from kernels import evidence
from kernels.setting import GENERATIONS, interpreter, target
from programs import labels
from programs.labels import Label

IMPLEMENTATIONS = ("ref", "xla", "pallas_tpu", "pallas_gpu")
log = logging.getLogger(__name__)
# Part of JAX's trace caches: a function jitted under one value is traced anew under another.
_named = jax.make_user_context(None)


@contextlib.contextmanager
def using(impl: str):
    """Within the block every call that names no implementation traces `impl`, or raises."""
    with _named(impl):
        yield


@functools.cache
def implementations(operation: str, function: str = "") -> tuple[str, ...]:
    """The modules of `kernels/<operation>/` that implement `function` (the folder's, if "")."""
    found = importlib.util.find_spec
    present = (n for n in IMPLEMENTATIONS if found(f"kernels.{operation}.{n}") is not None)
    return tuple(n for n in present if hasattr(_module(operation, n), function or operation))


def choose(operation: str, function: str, impl: str | None) -> Callable:
    """The callable `kernels.<operation>.<impl>.<function>`.

    A named implementation runs or raises ValueError. `impl=None` takes the TPU kernel where
    kernels/evidence.json says that it compiles for the generation at hand and is the faster form,
    and where the kernel covers the call; everywhere else, and for a single token as in decoding,
    the chunked XLA form.
    """
    record = labels.current()
    if impl is None:
        impl = (record and record.form) or _named.value
    if impl is None:
        run = _default(operation, function)
    else:
        known = implementations(operation, function)
        if impl not in known:
            raise ValueError(
                f"{function} has no implementation {impl!r}; it has {', '.join(known)} "
                f"(or None: chosen)."
            )
        if impl == "pallas_tpu" and interpreter() is None and target() not in GENERATIONS.values():
            raise ValueError(
                f"{function} as pallas_tpu needs a TPU and this is traced for {target()}; use xla, "
                f"or call it within kernels.setting.interpreting()."
            )
        run = getattr(_module(operation, impl), function)
    run = jax.named_scope(function)(run)
    return run if record is None else _labelled(operation, function, run, record.calls)


def _default(operation: str, function: str) -> Callable:
    plain, where = getattr(_module(operation, "xla"), function), target()
    if not evidence.favours(operation, function, where):
        _announce(function, "xla", where)
        return plain
    module = _module(operation, "pallas_tpu")
    kernel = getattr(module, function)

    @functools.wraps(plain)
    def run(*args, **kwargs):
        single = getattr(args[0], "shape", ())[1:2] == (1,)  # no loop over time to fuse
        reason = "a single token" if single else module.uncovered(function, *args, **kwargs)
        _announce(function, "xla" if reason else "pallas_tpu", where, reason)
        return (plain if reason else kernel)(*args, **kwargs)

    return run


def _module(operation: str, impl: str) -> types.ModuleType:
    return importlib.import_module(f"kernels.{operation}.{impl}")


def _labelled(operation: str, function: str, run: Callable, calls: dict[str, Label]) -> Callable:
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

        traced.__name__ = key = f"{name}#{len(calls)}"
        cost = _cost(operation, function)
        calls[key] = Label(name, cost and float(cost(*args, **kwargs)), 0)
        outputs = jax.jit(traced)([leaves[i] for i in at])
        elements = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(outputs))
        calls[key] = calls[key]._replace(elements=elements)
        return outputs

    return call


@functools.cache
def _cost(operation: str, function: str) -> Callable | None:
    """The function of that name in kernels/<operation>/cost.py; it takes the call's arguments."""
    if importlib.util.find_spec(f"kernels.{operation}.cost") is None:
        return None
    return getattr(importlib.import_module(f"kernels.{operation}.cost"), function, None)


@functools.cache
def _announce(function: str, impl: str, where: str, reason: str = "") -> None:
    log.info("kernels: %s runs as %s on %s%s", function, impl, where, reason and f" ({reason})")
