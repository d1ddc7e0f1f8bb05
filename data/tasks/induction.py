"""Induction heads (arXiv 2312.00752, section 4.1.2): what followed the special token before?

Random tokens, among them one special token at a random place; it comes again as the row's last
token, where the token after its first occurrence is due. Trained at 256 tokens and asked at up to
2^20 there: set data.length.
"""

import dataclasses

from data.tasks import Task


@dataclasses.dataclass
class Config(Task):
    """A row of `data.length` tokens."""

    vocabulary: int = 16  # ids: the last one is the special token
    examples: int = 0  # training rows, the same in every epoch; 0: new ones for ever
    held_out: int = 1_024  # rows of validation, and of test

    @property
    def chance(self) -> float:
        """Guessing among the tokens that are not special."""
        return 1 / (self.vocabulary - 1)

    def check(self, length: int) -> None:
        """The special token, what follows it and its return must fit the row."""
        if length < 3:
            raise ValueError(
                f"data.source: induction needs rows of 3 tokens, but data.length={length}."
            )
        if self.vocabulary < 3:
            raise ValueError(
                f"data.source: induction with vocabulary={self.vocabulary} leaves nothing to "
                "recall. Use vocabulary=3."
            )

    def places(self, length: int) -> int:
        """One a row."""
        return 1

    def symbols(self) -> tuple[str, ...]:
        """Tokens, the special one."""
        return (*(f"t{i}" for i in range(self.vocabulary - 1)), "!")

    def rows(self, draw, length):
        """See the top of this file."""
        import numpy as np

        inputs = draw.below(self.vocabulary - 1, length).astype(np.int32)
        place = draw.below(length - 2, 1)[:, 0]
        each = np.arange(len(inputs))
        inputs[each, place] = inputs[:, -1] = self.vocabulary - 1
        targets, weights = np.zeros_like(inputs), np.zeros(inputs.shape, np.float32)
        targets[:, -1], weights[:, -1] = inputs[each, place + 1], 1
        return {"inputs": inputs, "targets": targets, "weights": weights}
