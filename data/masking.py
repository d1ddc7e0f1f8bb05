"""Which tokens are hidden from an encoder, which learns by filling them in (arXiv 1810.04805, 3.1).

The places are a function of the row's own tokens, the seed and the epoch: the same row hides the
same tokens beside whatever other rows and on whatever host, and others in the next epoch (as in
RoBERTa, arXiv 1907.11692, section 4.1). Held-out splits have one epoch, so a validation is the same
every time.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int

from data import packing, splitmix
from data.pipeline import Split


def masked(split: Split, share: float) -> Split:
    """The split with `hidden` (B, T), bool, in its batches: `share` of the tokens."""

    def take(rows: np.ndarray, epochs: np.ndarray) -> packing.Batch:
        batch = split.take(rows, epochs)
        return batch | {
            "hidden": hidden(
                batch["inputs"], batch["segments"], share, seed=split.config.seed, epochs=epochs
            )
        }

    return dataclasses.replace(split, take=take)


def hidden(
    inputs: Int[np.ndarray, "B T"],
    segments: Int[np.ndarray, "B T"],
    share: float,
    *,
    seed: int,
    epochs: Int[np.ndarray, " B"],
) -> Bool[np.ndarray, "B T"]:
    """Where tokens are hidden, each with probability `share`; padding never is."""
    real = segments != 0
    draws = splitmix.steps(inputs.shape[1])
    each = splitmix.mixed(inputs.astype(np.uint64) ^ splitmix.mixed(draws))
    row = np.where(real, each, np.uint64(0)).sum(axis=1, dtype=np.uint64)
    run = splitmix.mixed(epochs.astype(np.uint64) ^ splitmix.key(f"hidden/{seed}"))
    number = splitmix.mixed((splitmix.mixed(row ^ run))[:, None] + draws)
    return real & (number < np.uint64(share * 2.0**64))
