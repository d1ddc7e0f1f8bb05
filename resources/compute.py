"""FLOPs of what runs (executed), of the reference (model FLOPs), and by XLA's count."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

from kernels import dispatch
from kernels.count import Flops, Walk
from resources.report import Row, not_available


def executed_flops(program: core.ClosedJaxpr) -> Flops:
    """FLOPs that a traced program executes, on all devices together, loops times their length.

    Results that nothing reads are not counted: the compiler drops them. A `while` of unknown length
    counts once and a `cond` as its dearest branch; both are said in `notes`, as is every primitive
    without a rule. `shard_map` counts its body once per device of its mesh axes.
    """
    return Walk().run(program)


def model_flops(forward: Callable, *args: Any) -> Flops:
    """FLOPs that the mathematics of `forward(*args)` needs, whatever form of it runs.

    Traces `forward` with every operation in its reference form. Contractions count everywhere,
    other arithmetic only in the steps of recurrences (scans within operations), decay included.
    Where kernels/<operation>/cost.py has a formula it stands for the call: softmax attention in
    reference form computes more pairs than the mask leaves.

    By convention a training step needs 3 x forward: each product has two gradients of its size.
    """
    with dispatch.using("ref"), dispatch.labelling() as labels:
        program = jax.make_jaxpr(forward)(*args)
    return Walk(labels).run(program)


def xla_flops(compiled: Any) -> float | None:
    """XLA's own count for a compiled program: every loop's body once; None where it has none."""
    found = (compiled.cost_analysis() or {}).get("flops", -1.0)
    return float(found) if found >= 0 else None


def rows(kind: str, tokens: int, model: float, executed: Flops, compiled: Any) -> list[Row]:
    """FLOPs per token of a call on `tokens` tokens: needed, executed, and by XLA's count."""
    unit = "FLOP/token"
    name = f"{kind} FLOPs, by XLA"
    counted = xla_flops(compiled)
    if counted is None:
        last = not_available(name, unit, "the compiler does not say")
    else:
        counted *= jax.device_count() / tokens
        last = Row(name, counted, unit, "compiled", "each loop's body once, however often it runs")
    return [
        Row(f"{kind} FLOPs, model", model / tokens, unit, "modelled"),
        Row(
            f"{kind} FLOPs, executed",
            executed.total / tokens,
            unit,
            "modelled",
            "; ".join(sorted(executed.notes)),
        ),
        last,
    ]
