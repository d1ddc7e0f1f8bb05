"""SplitMix64: pseudo-random numbers that are our own, so that no release of NumPy changes a run."""

import hashlib

import numpy as np
from jaxtyping import UInt64

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def key(text: str) -> np.uint64:
    """The number that a text stands for: the head of its SHA-256."""
    return np.frombuffer(hashlib.sha256(text.encode()).digest()[:8], "<u8")[0]


def mixed(numbers: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """Each number's hash; those of k, k + GOLDEN, k + 2 GOLDEN, .. pass for independent draws."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        numbers = (numbers ^ (numbers >> np.uint64(shift))) * np.uint64(factor)
    return numbers


def steps(count: int) -> UInt64[np.ndarray, " N"]:
    """GOLDEN, 2 GOLDEN, .., count GOLDEN: what to add to a key for its draws."""
    return np.arange(1, count + 1, dtype=np.uint64) * GOLDEN
