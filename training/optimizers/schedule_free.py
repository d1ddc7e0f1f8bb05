"""Schedule-Free AdamW, arXiv 2405.15682, algorithm 1: an average takes the schedule's part.

    y = (1 - b1) z + b1 x                    gradients are taken at y, the weights that train
    z -= rate (g / (sqrt(v^) + eps) + decay y)
    x = (1 - c) x + c z                      the average, which is judged and sampled from

c = r^2 / sum of r^2 so far, r the highest rate up to now. Use it with `optimizer.schedule=constant`
and a warmup. State: two numbers a weight, v and z; x follows from y and z.
"""

import dataclasses

import optax


@dataclasses.dataclass
class Config:
    """Settings of Schedule-Free AdamW."""

    b1: float = 0.9  # how near the weights that train are to the average, above 0
    b2: float = 0.95  # how much of the mean of squares a step keeps
    eps: float = 1e-8  # added to the root of the squares

    def build(self, rate, decay, dims):
        """The transformation; see training/optimizers/__init__.py."""
        if not self.b1:
            raise ValueError("optimizer.rule.b1=0.0 must be above 0: the average follows from it.")
        squares = optax.scale_by_rms(self.b2, self.eps, eps_in_sqrt=False, bias_correction=True)
        step = optax.chain(squares, decay, optax.scale_by_learning_rate(rate))
        return optax.contrib.schedule_free(step, rate, self.b1)

    def evaluated(self, state, params):
        """x of the state and of y."""
        return optax.contrib.schedule_free_eval_params(state, params)
