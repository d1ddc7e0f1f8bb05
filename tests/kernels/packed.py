"""Packed rows for tests that loop over tokens by hand."""

from collections.abc import Iterator, Sequence

import numpy as np

ROWS = [
    [0, 0, 4, 4, 4, 9, 0, 0, 2, 2, 2, 2, 2, 0],
    [1, 1, 1, 1, 1, 1, 2, 1, 1, 1, 3, 3, 3, 3],
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    [0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    [7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7],
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 3],
    [3, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5],
]
SEGMENTS = np.asarray(ROWS, np.int32)


def tokens(row: Sequence[int]) -> Iterator[tuple[int, bool]]:
    """(place, whether a document starts that is not the row's first) of every real token."""
    document = None
    for t, number in enumerate(row):
        if number:
            yield t, document is not None and number != document
            document = number
