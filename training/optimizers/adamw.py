"""AdamW, arXiv 1711.05101, algorithm 2.

m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2,   w -= rate (m^ / (sqrt(v^) + eps) + decay w)

with m^, v^ freed of their start at zero. State: two numbers a weight.
"""

import dataclasses


@dataclasses.dataclass
class Config:
    """Settings of AdamW."""

    b1: float = 0.9  # how much of the mean of gradients a step keeps
    b2: float = 0.95  # the same of the mean of their squares
    eps: float = 1e-8  # added to the root of the squares

    def build(self, rate, decay, dims):
        """The transformation; see training/optimizers/__init__.py."""
        import optax  # late: this rule is the schema's default, which is read before JAX

        adam = optax.scale_by_adam(self.b1, self.b2, self.eps)
        return optax.chain(adam, decay, optax.scale_by_learning_rate(rate))
