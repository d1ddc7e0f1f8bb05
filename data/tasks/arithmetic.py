"""Arithmetic modulo m (arXiv 2411.12537, section 5.1): the value of a formula of numbers.

Without brackets a word is n_1 o_1 n_2 o_2 .. n_k with operators + - *, and * binds first. With them
it is drawn from the grammar E -> n | (E o E). The row ends in "=", where the value is due. Lengths
are odd (with brackets 1 modulo 4) and lie between `shortest` and data.length - 1, each equally
likely; padding follows.
"""

import dataclasses

from data.tasks import Task


@dataclasses.dataclass
class Config(Task):
    """Formulas over 0..modulus-1."""

    modulus: int = 5
    brackets: bool = False
    shortest: int = 3  # tokens of the shortest formula, "=" left out
    examples: int = 0  # training rows, the same in every epoch; 0: new ones for ever
    held_out: int = 1_024  # rows of validation, and of test

    @property
    def chance(self) -> float:
        """Of `modulus` answers; products make 0 likelier than the others."""
        return 1 / self.modulus

    def sizes(self, length: int) -> list[int]:
        """Numbers that a formula may have in a row of `length` tokens."""
        tokens = (lambda n: 4 * n - 3) if self.brackets else (lambda n: 2 * n - 1)
        return [n for n in range(1, length) if self.shortest <= tokens(n) <= length - 1]

    def check(self, length: int) -> None:
        """Some formula must fit the row."""
        if not self.sizes(length):
            raise ValueError(
                f"data.source: arithmetic has no formula of {self.shortest} to {length - 1} tokens."
                " Use another shortest, or a larger data.length."
            )
        if self.modulus < 2:
            raise ValueError(
                f"data.source: arithmetic with modulus={self.modulus} must be at least 2."
            )

    def places(self, length: int) -> int:
        """One a row."""
        return 1

    def symbols(self) -> tuple[str, ...]:
        """Numbers, operators, brackets, the sign of the answer, padding."""
        return (*map(str, range(self.modulus)), "+", "-", "*", "(", ")", "=", "_")

    def rows(self, draw, length):
        """See the top of this file."""
        import numpy as np

        sizes = self.sizes(length)
        most, m = sizes[-1], self.modulus
        counts = np.asarray(sizes)[draw.below(len(sizes), 1)[:, 0]]
        numbers, signs, cuts = draw.below(m, most), draw.below(3, most), draw.uniform(most)
        inputs = np.full((len(counts), length), m + 6, np.int32)
        targets, weights = np.zeros_like(inputs), np.zeros(inputs.shape, np.float32)
        for row, count in enumerate(counts):
            given = [iter(a[row].tolist()) for a in (numbers, signs, cuts)]
            word, value = self.nested(count, *given) if self.brackets else self.flat(count, *given)
            end = len(word)
            inputs[row, : end + 1] = [*word, m + 5]
            targets[row, end], weights[row, end] = value, 1
        return {"inputs": inputs, "targets": targets, "weights": weights, "real": inputs != m + 6}

    def flat(self, count, numbers, signs, _):
        """(tokens, value) of n_1 o_1 .. n_k."""
        word, total, sign, product = [], 0, 1, 1
        for i in range(count):
            if i:
                o = next(signs)
                word.append(self.modulus + o)
                if o < 2:
                    total, sign, product = total + sign * product, (1, -1)[o], 1
            n = next(numbers)
            word.append(n)
            product *= n
        return word, (total + sign * product) % self.modulus

    def nested(self, count, numbers, signs, cuts):
        """(tokens, value) of a formula with `count` numbers, cut in two at a random place."""
        if count == 1:
            n = next(numbers)
            return [n], n
        first = 1 + int(next(cuts) * (count - 1))
        left, a = self.nested(first, numbers, signs, cuts)
        o = next(signs)
        right, b = self.nested(count - first, numbers, signs, cuts)
        value = (a + b, a - b, a * b)[o] % self.modulus
        m = self.modulus
        return [m + 3, *left, m + o, *right, m + 4], value
