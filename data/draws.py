"""Random draws for many rows at once; those of a row are a function of its own key alone.

So a row is the same in every batch, on every host, and in every release of NumPy.
"""

import numpy as np
from jaxtyping import Float, Int, UInt64

from data import splitmix


class Draws:
    """Independent draws for B rows, made of SplitMix64; each call goes on where the last ended."""

    def __init__(self, text: str, rows: Int[np.ndarray, " B"]):
        """Rows of the numbers given, in the sequence that `text` names."""
        numbers = rows.astype(np.uint64) * splitmix.GOLDEN
        self.keys: UInt64[np.ndarray, " B"] = splitmix.mixed(splitmix.key(text) + numbers)
        self.used = 0

    def bits(self, count: int) -> UInt64[np.ndarray, "B N"]:
        """Uniform numbers of 64 bits."""
        steps = splitmix.steps(self.used + count)[self.used :]
        self.used += count
        return splitmix.mixed(self.keys[:, None] + steps)

    def uniform(self, count: int) -> Float[np.ndarray, "B N"]:
        """Uniform in [0, 1), multiples of 2^-53."""
        return (self.bits(count) >> np.uint64(11)) * 2.0**-53

    def below(self, bound: int, count: int) -> Int[np.ndarray, "B N"]:
        """Uniform in 0..bound-1 (to 2^-53 of a share)."""
        return (self.uniform(count) * bound).astype(np.int64)

    def chosen(self, bound: int, count: int) -> Int[np.ndarray, "B N"]:
        """`count` distinct numbers of 0..bound-1, every ordered choice equally likely."""
        return self.weighted(np.zeros(bound), count)

    def weighted(self, log_weights: Float[np.ndarray, " M"], count: int) -> Int[np.ndarray, "B N"]:
        """`count` numbers of 0..M-1 drawn in turn without replacement, by weights exp(log_weights).

        The largest of log w + Gumbel noise, in falling order, are such draws (arXiv 1903.06059).
        """
        noise = -np.log(-np.log(self.uniform(len(log_weights)) + 2.0**-54))
        scores = log_weights + noise
        first = np.argpartition(-scores, count - 1, axis=1)[:, :count]
        order = np.argsort(np.take_along_axis(-scores, first, axis=1), axis=1, kind="stable")
        return np.take_along_axis(first, order, axis=1)
