"""FLOPs of what runs (executed), of the reference (model FLOPs), and by XLA's count."""

from typing import Any

import jax

from kernels.count import Flops, executed_flops, model_flops
from resources.report import Row, not_available

__all__ = ["Flops", "executed_flops", "model_flops", "rows", "xla_flops"]


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
