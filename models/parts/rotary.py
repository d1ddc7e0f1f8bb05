"""Rotary positions over a part of a head, and their ways to longer contexts than were trained.

RoFormer (arXiv 2104.09864), position interpolation (2306.15595), NTK-aware bases and YaRN
(2309.00071). The plain form is `layers.rotary`; this is the one with settings. The ramp of YaRN's
paper is linear in how often a pair turns; here, as in its released code and so in every model that
was trained with it, it is linear in the pair's number.
"""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from models import checks, layers

SCALINGS = ("linear", "ntk", "yarn")
# Full turns within the trained context: YaRN interpolates below the first, keeps from the second.
YARN_TURNS = (1.0, 32.0)


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Turns pairs of the first `fraction` of a head's numbers by position * frequency.

    `factor` is how many times longer than `context`, the trained length, the positions may be.
    """

    base: float = 10_000.0
    fraction: float = 1.0
    scaling: Literal["linear", "ntk", "yarn"] = "linear"
    factor: float = 1.0
    context: int = 2048  # only YaRN asks for it

    def check(self, head_dim: int) -> None:
        """ValueError where the settings fit no head of `head_dim` numbers."""
        if self.base <= 1:
            raise ValueError(f"rope_base={self.base} must be above 1; 10000.0 is usual.")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"rope_fraction={self.fraction} is outside (0, 1]. Use 1.0 (all).")
        if self.scaling not in SCALINGS:
            raise ValueError(f"rope_scaling={self.scaling!r} is unknown. Use one of {SCALINGS}.")
        if self.factor < 1:
            raise ValueError(f"rope_factor={self.factor} is below 1. Use 1.0 (no extension).")
        if self.context < 1:
            raise ValueError(f"rope_context={self.context} must be at least 1; 2048 is usual.")
        if self.fraction == 1:
            checks.pairs(head_dim)
        if self.turned(head_dim) < 2:
            raise ValueError(
                f"rope_fraction={self.fraction} of head_dim={head_dim} turns no pair. "
                f"Use at least {2 / head_dim:.4g}."
            )
        if self.scaling == "ntk" and self.factor > 1 and self.turned(head_dim) < 4:
            raise ValueError(
                f"rope_scaling='ntk' needs 4 turned numbers a head, not "
                f"{self.turned(head_dim)}. Use 'linear'."
            )

    def turned(self, head_dim: int) -> int:
        """How many numbers of a head are turned: an even count."""
        return int(self.fraction * head_dim) // 2 * 2

    def frequencies(self, head_dim: int) -> tuple[np.ndarray, float]:
        """(radians a token of each pair, the factor of the turned numbers), in float64.

        Linear divides all by s = factor; NTK puts base s^(d / (d - 2)), which leaves the fastest
        alone and divides the slowest by s. YaRN (section 3.2, eqs. 13 to 15) mixes the kept and the
        divided, from pairs that turn often within the trained context to those that turn seldom,
        and multiplies both q and k by 0.1 ln(s) + 1.
        """
        dim, s = self.turned(head_dim), self.factor
        base = self.base
        if self.scaling == "ntk" and s > 1:
            base *= s ** (dim / (dim - 2))
        kept = base ** (-np.arange(dim // 2) / (dim // 2))
        if self.scaling == "ntk" or s == 1:
            return kept, 1.0
        if self.scaling == "linear":
            return kept / s, 1.0
        seldom, often = (
            dim / 2 * math.log(self.context / (2 * math.pi * turns), base) for turns in YARN_TURNS
        )
        first, last = max(math.floor(often), 0), min(math.ceil(seldom), dim - 1)
        share = (np.arange(dim // 2) - first) / max(last - first, 1e-3)
        divided = np.clip(share, 0, 1)
        return kept * (1 - divided) + kept / s * divided, 0.1 * math.log(s) + 1

    def __call__(
        self, x: Float[Array, "B T H K"], positions: Int[Array, "#B T"]
    ) -> Float[Array, "B T H K"]:
        """Turn the pairs (i, i + d/2) of the d turned numbers; the others stay."""
        rates, magnitude = self.frequencies(x.shape[-1])
        return layers.turned(x, positions, jnp.asarray(rates, jnp.float32), magnitude)
