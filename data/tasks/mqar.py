"""Multi-query associative recall (arXiv 2312.04927, section 3): keys and values, then keys alone.

K pairs of a key and its value open the row, 2K tokens. Then come slots of two tokens each; K of
them, drawn in turn without replacement by weights (g + 1)^(power - 1) for slot g, ask for the keys
in the order of their pairs, so early keys tend to be asked early. A query's answer, its value, is
due at the query itself. Keys and values are distinct within a row and share no id.

As in the released code; there the answers are those of the row moved by one, which is the same.
"""

import dataclasses
from typing import Literal

from data.tasks import Task


@dataclasses.dataclass
class Config(Task):
    """K pairs over a vocabulary; a row needs 4K tokens."""

    pairs: int = 4  # K
    vocabulary: int = 8192  # ids: 0 fills, keys are below the half, values from it on
    power: float = 0.01  # how soon keys are asked: 1 is uniform
    filler: Literal["zero", "random"] = "zero"  # of what is neither pair nor query
    examples: int = 100_000  # training rows, the same in every epoch; 0: new ones for ever
    held_out: int = 3_000  # rows of validation, and of test

    @property
    def chance(self) -> float:
        """Guessing among the values of the row, which is what a model learns first."""
        return 1 / self.pairs

    def check(self, length: int) -> None:
        """Pairs must fit the row, and their ids the vocabulary."""
        if 4 * self.pairs > length:
            raise ValueError(
                f"data.source: mqar with pairs={self.pairs} needs rows of {4 * self.pairs} tokens, "
                f"but data.length={length}. Use pairs={length // 4}."
            )
        if self.pairs > self.vocabulary // 2 - 1:
            raise ValueError(
                f"data.source: mqar with pairs={self.pairs} needs as many keys, but "
                f"vocabulary={self.vocabulary} has {self.vocabulary // 2 - 1}. Use "
                f"vocabulary={2 * self.pairs + 2}."
            )

    def places(self, length: int) -> int:
        """One a pair."""
        return self.pairs

    def symbols(self) -> tuple[str, ...]:
        """Filler, keys, values."""
        half = self.vocabulary // 2
        keys = (f"k{i}" for i in range(1, half))
        return ("_", *keys, *(f"v{i}" for i in range(half, self.vocabulary)))

    def rows(self, draw, length):
        """See the top of this file."""
        import numpy as np

        half, pairs = self.vocabulary // 2, self.pairs
        keys = 1 + draw.chosen(half - 1, pairs)
        values = half + draw.chosen(self.vocabulary - half, pairs)
        slots = (length - 2 * pairs) // 2
        weights = (self.power - 1) * np.log(np.arange(1, slots + 1))
        asked = 2 * pairs + 2 * draw.weighted(weights, pairs)
        each = np.arange(len(keys))[:, None]
        inputs = np.zeros((len(keys), length), np.int32)
        inputs[:, 0 : 2 * pairs : 2], inputs[:, 1 : 2 * pairs : 2] = keys, values
        if self.filler == "random":
            inputs[:, 2 * pairs :] = draw.below(self.vocabulary, length - 2 * pairs)
        inputs[each, asked] = keys
        targets = np.zeros_like(inputs)
        targets[each, asked] = values
        return {"inputs": inputs, "targets": targets, "weights": (targets > 0).astype(np.float32)}
