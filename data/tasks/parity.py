"""Parity of a word of bits (arXiv 2411.12537, section 5.1): is the number of ones odd?

Words of `shortest` to `data.length` bits, each length equally likely, and padding after them. The
answer is due at the last bit, or with every=True at every bit for the word up to there.
"""

import dataclasses

from data.tasks import Task


@dataclasses.dataclass
class Config(Task):
    """Words of bits."""

    shortest: int = 3  # bits of the shortest word; data.length: all words are as long
    every: bool = False  # an answer at every bit
    examples: int = 0  # training rows, the same in every epoch; 0: new ones for ever
    held_out: int = 1_024  # rows of validation, and of test

    @property
    def chance(self) -> float:
        """Of two answers."""
        return 0.5

    def check(self, length: int) -> None:
        """The shortest word must fit the row."""
        if not 1 <= self.shortest <= length:
            raise ValueError(
                f"data.source: parity with shortest={self.shortest} must be in 1..{length}, "
                "data.length."
            )

    def places(self, length: int) -> int:
        """One a row, or one a bit."""
        return length if self.every else 1

    def symbols(self) -> tuple[str, ...]:
        """The bits, which are the answers as well: 1 is odd."""
        return ("0", "1")

    def rows(self, draw, length):
        """See the top of this file."""
        import numpy as np

        bits = draw.below(2, length).astype(np.int32)
        counts = self.shortest + draw.below(length - self.shortest + 1, 1)
        at = np.arange(length)
        real = at < counts
        due = real if self.every else at == counts - 1
        odd = (np.cumsum(bits, axis=1) % 2).astype(np.int32)
        return {
            "inputs": bits * real,
            "targets": odd * due,
            "weights": due.astype(np.float32),
            "real": real,
        }
