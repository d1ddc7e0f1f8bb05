"""Lists of block numbers made canonical, and cut into groups of similar length.

A list known when the program is traced (a NumPy array) is worked on here and now, exactly; one
that is computed by the program is worked on by the program, and its lengths are bounds.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

LISTS = Int[Array | np.ndarray, "B H N M"]


def reach(
    length: int, query_block: int, block: int, causal: bool, window: int
) -> tuple[np.ndarray, np.ndarray]:
    """(first, end), each (N,): query block n of a row sees keys in blocks first to end - 1 only."""
    count = math.ceil(length / query_block)
    first_q = np.arange(count, dtype=np.int32) * query_block
    last_q = np.minimum(first_q + query_block, length) - 1
    first_k = np.maximum(first_q - window + 1, 0) if window else np.zeros_like(first_q)
    last_k = last_q if causal else np.full_like(last_q, length - 1)
    return first_k // block, last_k // block + 1


def distinct(indices: LISTS, first, end, none: int) -> LISTS:
    """The lists in rising order; entries outside [first, end) and repetitions become `none`.

    `none` is larger than every block's number. It may stand between entries where one was repeated.
    """
    xp = np if isinstance(indices, np.ndarray) else jnp
    first, end = (xp.asarray(edge, xp.int32)[..., None] for edge in (first, end))
    inside = (indices >= first) & (indices < end)
    ordered = xp.sort(xp.where(inside, indices, none).astype(xp.int32), axis=-1)
    again = ordered[..., 1:] == ordered[..., :-1]
    rest = xp.where(again, xp.int32(none), ordered[..., 1:])
    return xp.concatenate([ordered[..., :1], rest], axis=-1)


def groups(lists: LISTS, first, end, none: int) -> tuple[LISTS, list[tuple[np.ndarray, int]]]:
    """(lists with `none` last, [(rows, width)]): `width` entries hold all that these rows name.

    Every row of the N is in one group. Widths of two groups differ by a factor of two or more, and
    a group that would save less than an eighth of all work is not split off.
    """
    longest = lists.shape[-1]
    if isinstance(lists, np.ndarray):
        counts = (lists != none).sum(-1).max((0, 1))
    else:
        counts = np.broadcast_to(np.minimum(end - first, longest), lists.shape[2:3])
    found = _split(np.maximum(counts, 1))
    if len(found) == 1 and found[0][1] == longest:
        return lists, found
    xp = np if isinstance(lists, np.ndarray) else jnp
    return xp.sort(lists, axis=-1), found


def _split(counts: np.ndarray) -> list[tuple[np.ndarray, int]]:
    order = np.argsort(-counts, kind="stable")
    found: list[tuple[np.ndarray, int]] = []
    while len(order):
        width = int(counts[order[0]])
        size = int((counts[order] > width // 2).sum()) if width > 1 else len(order)
        found.append((order[:size], width))
        order = order[size:]
    total = sum(len(rows) * width for rows, width in found)
    for i in range(len(found) - 1, 0, -1):
        (wide, width), (rows, narrow) = found[i - 1 : i + 1]
        if len(rows) * (width - narrow) < total / 8:
            found[i - 1 : i + 1] = [(np.concatenate([wide, rows]), width)]
    return [(np.sort(rows), width) for rows, width in found]
