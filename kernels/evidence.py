"""The committed record of every TPU kernel, by generation; `python -m kernels.survey` writes it."""

import functools
import json
import statistics
from pathlib import Path

FILE = Path(__file__).with_name("evidence.json")


@functools.cache
def load() -> dict:
    """The committed file: function -> generation -> rows, one a size."""
    return json.loads(FILE.read_text()) if FILE.exists() else {"functions": {}}


def favours(operation: str, function: str, generation: str) -> bool:
    """Whether every recorded size compiled for the generation, and is on the whole the faster form.

    On the whole: by the geometric mean of XLA's bounds over the kernel's. False where nothing is
    recorded: dispatch then stays with XLA.
    """
    found = load()["functions"].get(title(operation, function), {}).get(generation, [])
    if not found or not all(row["compiled"] for row in found):
        return False
    return statistics.geometric_mean(r["xla_seconds"] / r["seconds"] for r in found) > 1


def title(operation: str, function: str) -> str:
    """How the file calls a function: gated_linear, delta_rule.dplr."""
    return operation if function == operation else f"{operation}.{function}"
