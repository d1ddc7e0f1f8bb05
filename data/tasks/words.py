"""Word problems of finite groups (arXiv 2404.08819, section 5; 2411.12537, section 5.2).

A row is a word g_1 .. g_T of elements; at every t the product g_1 g_2 .. g_t is due, where in
permutations the left factor acts first. S3, S5 and A5 are permutations of 3 and 5 points, Z60 adds
modulo 60, A4xZ5 is solvable and no more commutative than A4. `letters` restricts what words are
written with (2411.12537): swaps of two points, or whatever moves at most three.

Ids are elements in lexicographic order of their permutations (of pairs, for A4xZ5), 0 the identity.
"""

import dataclasses
import functools
import itertools
from typing import Literal

from data.tasks import Task

Group = Literal["S3", "S5", "A5", "A4xZ5", "Z60"]


@dataclasses.dataclass
class Config(Task):
    """Words of `data.length` letters."""

    group: Group = "S5"
    letters: Literal["all", "swaps", "three"] = "all"  # swaps and three: of groups of permutations
    examples: int = 0  # training rows, the same in every epoch; 0: new ones for ever
    held_out: int = 1_024  # rows of validation, and of test

    @property
    def chance(self) -> float:
        """Of as many answers as there are elements, which products take equally often."""
        return 1 / len(elements(self.group))

    def check(self, length: int) -> None:
        """A group without permutations, or an even one, has no swaps."""
        if self.letters != "all" and self.group not in ("S3", "S5"):
            raise ValueError(
                f"data.source: words with letters={self.letters!r} needs group 'S3' or 'S5', not "
                f"{self.group!r}. Use letters='all'."
            )

    def symbols(self) -> tuple[str, ...]:
        """The elements: images of the points, or numbers."""
        return tuple("".join(map(str, e)) for e in elements(self.group))

    def rows(self, draw, length):
        """See the top of this file."""
        import numpy as np

        allowed = np.asarray(letters(self.group, self.letters), np.int32)
        inputs = allowed[draw.below(len(allowed), length)]
        table, targets = np.asarray(products(self.group), np.int32), np.empty_like(inputs)
        product = np.zeros(len(inputs), np.int32)
        for t in range(length):
            targets[:, t] = product = table[product, inputs[:, t]]
        return {"inputs": inputs, "targets": targets, "weights": np.ones(inputs.shape, np.float32)}


@functools.cache
def elements(group: str) -> tuple[tuple[int, ...], ...]:
    """The elements; the identity is the first."""
    if group == "Z60":
        return tuple((n,) for n in range(60))
    if group == "A4xZ5":
        return tuple((*p, n) for p in itertools.permutations(range(4)) if even(p) for n in range(5))
    points = itertools.permutations(range(int(group[1])))
    return tuple(p for p in points if group[0] == "S" or even(p))


def even(p: tuple[int, ...]) -> bool:
    """Whether an even number of swaps makes the permutation."""
    return sum(a > b for a, b in itertools.combinations(p, 2)) % 2 == 0


@functools.cache
def products(group: str) -> tuple[tuple[int, ...], ...]:
    """The id of the product of two ids."""
    every = elements(group)
    known = {e: i for i, e in enumerate(every)}

    def times(a, b):
        if group == "Z60":
            return ((a[0] + b[0]) % 60,)
        last = ((a[4] + b[4]) % 5,) if group == "A4xZ5" else ()
        points = len(a) - len(last)
        return (*(b[a[i]] for i in range(points)), *last)

    return tuple(tuple(known[times(a, b)] for b in every) for a in every)


def letters(group: str, kind: str) -> list[int]:
    """Ids of the elements that words are written with; swaps and three hold the identity too."""
    most = {"all": 99, "swaps": 2, "three": 3}[kind]
    return [
        i for i, e in enumerate(elements(group)) if sum(x != n for n, x in enumerate(e)) <= most
    ]
