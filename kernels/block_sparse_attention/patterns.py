"""Fixed patterns of sparse attention as lists of blocks, for `block_sparse_attention`.

Every function returns an int32 NumPy array (N, M) for a row of N = `blocks` blocks whose query
blocks are as large as its key blocks: the blocks that query block n sees in rising order, then -1.
Give it as `indices=found[None, None]`. Counts are blocks, so with block=1 they are tokens. `causal`
leaves out the blocks after n; within block n the operation's own mask does.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

LIST = Int[np.ndarray, "N M"]


def from_mask(mask: Bool[np.ndarray, "N J"]) -> LIST:
    """The list of a mask: row n names every j where mask[n, j]."""
    mask = np.asarray(mask, bool)
    counts = mask.sum(axis=1)
    found = np.full((len(mask), max(1, counts.max(initial=0))), -1, np.int32)
    rows, columns = np.nonzero(mask)
    starts = np.cumsum(counts) - counts
    found[rows, np.arange(len(rows)) - np.repeat(starts, counts)] = columns
    return found


def sliding(blocks: int, *, before: int, after: int = 0) -> LIST:
    """Blocks n - before to n + after: a local window (arXiv:2004.05150, figure 2b)."""
    _check(blocks, before=before, after=after)
    distance = _distance(blocks)
    return from_mask((distance <= before) & (distance >= -after))


def strided(blocks: int, *, stride: int) -> LIST:
    """Causal: the last `stride` blocks before n, n, and every block j with (n - j) mod stride = 0.

    The union of both heads of the strided Sparse Transformer (arXiv:1904.10509, section 4.3).
    """
    _check(blocks, stride=(stride, 1))
    distance = _distance(blocks)
    near, far = distance <= stride, distance % stride == 0
    return from_mask((distance >= 0) & (near | far))


def fixed(blocks: int, *, stride: int, summary: int = 1) -> LIST:
    """Causal: the blocks of n's own span of `stride`, and the last `summary` ones of each span.

    The union of both heads of the fixed Sparse Transformer (arXiv:1904.10509, section 4.3).
    """
    _check(blocks, stride=(stride, 1), summary=summary)
    n, j = _pairs(blocks)
    same, last = n // stride == j // stride, j % stride >= stride - summary
    return from_mask((j <= n) & (same | last))


def longformer(
    blocks: int, *, before: int, after: int = 0, globals: Sequence[int] = (0,), causal: bool = True
) -> LIST:
    """The local window and global blocks, which see all and are seen by all (arXiv:2004.05150)."""
    return from_mask(_local_and_global(blocks, before, after, globals, causal))


def bigbird(
    blocks: int,
    *,
    before: int = 1,
    after: int = 1,
    globals: Sequence[int] = (0,),
    random: int = 3,
    seed: int = 0,
    causal: bool = False,
) -> LIST:
    """`longformer` and, for each n, `random` further blocks, or all others if these are fewer.

    BigBird (arXiv:2007.14062, section 2). Equal seeds give equal lists on every machine.
    """
    _check(blocks, random=random)
    mask = _local_and_global(blocks, before, after, globals, causal)
    rng = np.random.Generator(np.random.PCG64(seed))
    n, j = _pairs(blocks)
    open_to_n = ~mask & ((j <= n) if causal else True)
    for row, free in zip(mask, open_to_n, strict=True):
        others = np.flatnonzero(free)
        row[rng.permutation(others)[:random]] = True
    return from_mask(mask)


def _local_and_global(blocks, before, after, globals, causal) -> Bool[np.ndarray, "N J"]:
    _check(blocks, before=before, after=after)
    for one in globals:
        if not 0 <= one < blocks:
            nearest = min(max(one, 0), blocks - 1)
            raise ValueError(
                f"globals names block {one}; blocks are 0 to {blocks - 1}, the nearest {nearest}."
            )
    distance = _distance(blocks)
    mask = (distance <= before) & (distance >= -after)
    chosen = list(globals)
    mask[chosen, :], mask[:, chosen] = True, True
    return mask & (distance >= 0) if causal else mask


def _pairs(blocks: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(blocks)[:, None], np.arange(blocks)[None, :]


def _distance(blocks: int) -> np.ndarray:
    n, j = _pairs(blocks)
    return n - j


def _check(blocks: int, **counts) -> None:
    """Raise unless there is a block and every count reaches its least value, 0 if only a number."""
    counts = {"blocks": (blocks, 1)} | {
        name: given if isinstance(given, tuple) else (given, 0) for name, given in counts.items()
    }
    for name, (given, least) in counts.items():
        if given < least:
            raise ValueError(f"{name} is {given}; it must be at least {least}.")
