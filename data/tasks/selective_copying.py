"""Selective copying (arXiv 2312.00752, section 4.1.1): repeat the tokens that stand in noise.

The row ends in A markers; before them A data tokens stand at random places in noise, and the
answers due at the markers are those tokens in their order. The paper's rows have 4,096 tokens of
noise and data and as many markers as there are data tokens, 16.
"""

import dataclasses

from data.tasks import Task


@dataclasses.dataclass
class Config(Task):
    """A row of `data.length` tokens, markers included."""

    answers: int = 16  # A, data tokens of a row
    vocabulary: int = 16  # ids: 0 is noise, the last one the marker, data between
    examples: int = 0  # training rows, the same in every epoch; 0: new ones for ever
    held_out: int = 1_024  # rows of validation, and of test

    @property
    def chance(self) -> float:
        """Guessing among the data tokens."""
        return 1 / (self.vocabulary - 2)

    def check(self, length: int) -> None:
        """Data and markers must fit the row."""
        if 2 * self.answers > length:
            raise ValueError(
                f"data.source: selective_copying with answers={self.answers} needs rows of "
                f"{2 * self.answers} tokens, but data.length={length}. Use answers={length // 2}."
            )
        if self.vocabulary < 4:
            raise ValueError(
                f"data.source: selective_copying with vocabulary={self.vocabulary} has fewer than "
                "two data tokens. Use vocabulary=4."
            )

    def places(self, length: int) -> int:
        """The markers."""
        return self.answers

    def symbols(self) -> tuple[str, ...]:
        """Noise, data, the marker."""
        return (".", *(f"d{i}" for i in range(1, self.vocabulary - 1)), "?")

    def rows(self, draw, length):
        """See the top of this file."""
        import numpy as np

        tail = length - self.answers
        places = np.sort(draw.chosen(tail, self.answers), axis=1)
        data = 1 + draw.below(self.vocabulary - 2, self.answers)
        inputs, targets = (np.zeros((len(data), length), np.int32) for _ in range(2))
        inputs[np.arange(len(data))[:, None], places] = data
        inputs[:, tail:], targets[:, tail:] = self.vocabulary - 1, data
        weights = np.zeros(inputs.shape, np.float32)
        weights[:, tail:] = 1
        return {"inputs": inputs, "targets": targets, "weights": weights}
