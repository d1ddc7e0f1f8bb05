"""Copying a string (arXiv 2402.01032, section 3.1): `$ s | s .`, and what stands after the bar.

Strings of `shortest` letters up to as many as fit, (data.length - 1) / 2, each length equally
likely; the answers are the copy and the stop after it. With order="reverse" the letters come back
from the last to the first, with "sorted" in the order of the alphabet.

The paper packs several strings of 5 to 20 letters in a row of 220; here a row is one string.
"""

import dataclasses
from typing import Literal

from data.tasks import Task


@dataclasses.dataclass
class Config(Task):
    """Strings over `letters` letters."""

    metric = "exact"
    letters: int = 26
    shortest: int = 5
    order: Literal["same", "reverse", "sorted"] = "same"
    examples: int = 0  # training rows, the same in every epoch; 0: new ones for ever
    held_out: int = 1_024  # rows of validation, and of test

    @property
    def chance(self) -> float:
        """Of a token; whole strings are never right by chance."""
        return 1 / self.letters

    def check(self, length: int) -> None:
        """The shortest string and its copy must fit the row."""
        most = (length - 1) // 2
        if not 1 <= self.shortest <= most:
            raise ValueError(
                f"data.source: copying with shortest={self.shortest} must be in 1..{most}, the "
                f"letters that fit twice into data.length={length}."
            )

    def places(self, length: int) -> int:
        """The copy of the longest string, and its stop."""
        return (length - 1) // 2 + 1

    def symbols(self) -> tuple[str, ...]:
        """Letters, then `$`, `|` and the stop."""
        return (*(f"a{i}" for i in range(self.letters)), "$", "|", ".")

    def rows(self, draw, length):
        """See the top of this file."""
        import numpy as np

        most = (length - 1) // 2
        counts = self.shortest + draw.below(most - self.shortest + 1, 1)[:, 0]
        strings = draw.below(self.letters, most)
        start, bar, stop = range(self.letters, self.letters + 3)
        flat = np.full((len(counts), length + 1), stop, np.int32)
        due, real = (np.zeros((len(counts), length), bool) for _ in range(2))
        for row, (count, string) in enumerate(zip(counts, strings, strict=True)):
            string = string[:count]
            copy = {"same": string, "reverse": string[::-1], "sorted": np.sort(string)}[self.order]
            flat[row, : 2 * count + 2] = [start, *string, bar, *copy]
            due[row, count + 1 : 2 * count + 2] = True
            real[row, : 2 * count + 2] = True
        inputs, targets = flat[:, :-1] * real, flat[:, 1:] * due
        return {
            "inputs": inputs,
            "targets": targets,
            "weights": due.astype(np.float32),
            "real": real,
        }
