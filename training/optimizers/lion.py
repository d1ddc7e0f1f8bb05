"""Lion, arXiv 2302.06675, algorithm 2.

    w -= rate (sign(b1 m + (1 - b1) g) + decay w),   then m = b2 m + (1 - b2) g

Every number moves by the rate: take a third to a tenth of AdamW's, and as much more decay. State:
one number a weight.
"""

import dataclasses

import optax


@dataclasses.dataclass
class Config:
    """Settings of Lion."""

    b1: float = 0.9  # weight of the mean of gradients, against the new one, in a step
    b2: float = 0.99  # the same in the mean itself

    def build(self, rate, decay, dims):
        """The transformation; see training/optimizers/__init__.py."""
        sign = optax.scale_by_lion(self.b1, self.b2)
        return optax.chain(sign, decay, optax.scale_by_learning_rate(rate))
