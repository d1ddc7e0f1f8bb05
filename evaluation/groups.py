"""Groups of rows that can be asked for, each with the resource that it belongs to."""

GROUPS = {  # in the order of the table
    "parameters": "compute",
    "flops": "compute",
    "gap": "compute",
    "speed": "compute",
    "latency": "compute",
    "memory": "memory",
    "peak": "memory",
    "energy": "energy",
    "money": "money",
    "network": "network",
    "quality": "quality",
}


def choose(only: str) -> list[str]:
    """The groups that were asked for, in the order of the table; all of them for an empty text."""
    asked = [name for name in only.split(",") if name]
    unknown = [name for name in asked if name not in GROUPS]
    if unknown:
        raise ValueError(f"--only={only}: no group {unknown[0]!r}. Use {', '.join(GROUPS)}.")
    return [name for name in GROUPS if name in asked or not asked]
