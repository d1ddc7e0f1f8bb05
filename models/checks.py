"""Refusals that architectures share: one line that names the value, the rule and what would do."""


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` nearest to `wanted`."""
    divisors = (d for d in range(1, number + 1) if number % d == 0)
    return min(divisors, key=lambda d: abs(d - wanted))


def split_heads(width: int, heads: int, what: str = "heads", of: str = "the width") -> int:
    """width / heads; ValueError with the nearest number of heads that divides the width."""
    if heads < 1 or width % heads:
        near = nearest_divisor(width, heads)
        raise ValueError(f"{what}={heads} does not divide {of} {width}. Use {near}.")
    return width // heads


def groups(heads: int, groups: int) -> None:
    """ValueError, with the numbers that would do, unless `groups` key heads serve `heads` heads."""
    if groups < 1 or heads % groups:
        fits = ", ".join(str(g) for g in range(1, heads + 1) if heads % g == 0)
        raise ValueError(f"kv_heads={groups} does not divide heads={heads}. Use one of {fits}.")


def window(window: int, what: str = "window") -> None:
    """ValueError unless the window is a number of tokens, or 0 for all."""
    if window < 0:
        raise ValueError(f"{what}={window} is negative. Use 0 (all) or at least 1.")


def pairs(dim: int, what: str = "head_dim") -> None:
    """ValueError where rotary positions cannot pair the numbers of a head."""
    if dim % 2:
        raise ValueError(f"{what}={dim} is odd; rotary positions need pairs. Use {dim + 1}.")
