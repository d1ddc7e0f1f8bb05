"""A split as numbered batches: batch i is a pure function of the config, the split and i.

Global row g = i * B + row is row `g mod n` of epoch `g div n`, for n rows an epoch; each epoch has
an order of its own. Host h of H builds rows hB/H .. (h + 1)B/H of every batch, so the global
batches do not depend on the number of hosts, and an iterator's only state is a batch number.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from data import packing
from data.tokenizers import Tokenizer

_PREFETCHED_BATCHES = 4


class Batches(Iterator[packing.Batch], Protocol):
    """Grain's iterator: `next`, and the position as {"next_index": batch number}."""

    def get_state(self) -> dict[str, int]:
        """The position: the number of the batch that `next` returns."""
        ...

    def set_state(self, state: dict[str, int]) -> None:
        """Go to a position, forward or back, at no cost."""
        ...

    def close(self) -> None:
        """Stop prefetching."""
        ...


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of a corpus for one host. `len(split)` batches hold every prediction once.

    `tokens` counts the predictions of an epoch, `bytes` the bytes that they stand for, `rows` the
    rows that hold them; `fingerprint` is the SHA-256 of the whole corpus, all three splits;
    `metric` names what a model is judged by on it.
    """

    name: str
    config: Any  # the configs.schema.Data that it was opened with
    host: int
    hosts: int
    tokenizer: Tokenizer = dataclasses.field(repr=False)
    fingerprint: str
    documents: int
    bytes: int
    tokens: int
    rows: int
    take: Callable[[np.ndarray, np.ndarray], packing.Batch] = dataclasses.field(repr=False)
    metric: str = "bits_per_byte"

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return self.tokenizer.vocabulary

    @property
    def fill(self) -> float:
        """Share of the positions of an epoch that are no padding."""
        return self.tokens / (self.rows * self.config.length)

    def __len__(self) -> int:
        return -(-self.rows // self.config.batch)

    def batch(self, i: int) -> packing.Batch:
        """This host's rows of global batch i, see `packing.Layout`.

        Training has a batch for every i >= 0; the other splits have `len(split)`, and the last
        is filled with rows of padding. Raises IndexError beyond.
        """
        if i < 0 or (self.name != "train" and i >= len(self)):
            raise IndexError(f"{self.name} has no batch {i}: it must be in 0..{len(self) - 1}")
        share = self.config.batch // self.hosts
        position = i * self.config.batch + self.host * share + np.arange(share)
        if self.name != "train":
            return self.take(np.where(position < self.rows, position, -1), np.zeros_like(position))
        return self.take(position % self.rows, position // self.rows)

    def batches(self, start: int = 0) -> Batches:
        """Batches start, start + 1, ..., made ahead of time in one thread; training never ends."""
        import grain

        count = sys.maxsize if self.name == "train" else len(self)
        source = grain.MapDataset.range(count).map(self.batch)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCHED_BATCHES)
        iterator = iter(source.to_iter_dataset(options))
        if start:
            iterator.set_state({"next_index": start})
        return iterator
