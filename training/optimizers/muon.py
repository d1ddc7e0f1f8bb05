"""Muon for the matrices between the residual stream and features; AdamW for all other weights.

Jordan et al. 2024 (github.com/KellerJordan/Muon), for matrices of R rows and C columns:

    w -= rate (0.2 sqrt(max(R, C)) O + decay w)

O is the momentum's matrix with its singular values moved to about 1 by five Newton-Schulz steps.
The factor gives an update the RMS of AdamW's (arXiv 2502.16982, eq. 4), so one rate serves both.
Embedding and head are AdamW's. State: one number a weight of a matrix, two elsewhere.
"""

import dataclasses
import math
from typing import Any

import jax
import optax

from training import names

RMS = 0.2  # of an update, before the rate


@dataclasses.dataclass
class Config:
    """Settings of Muon, and of AdamW for the rest."""

    momentum: float = 0.95  # of matrices: how much of the mean of gradients a step keeps
    b1: float = 0.9  # the same for AdamW's weights
    b2: float = 0.95  # of the mean of squares of AdamW's weights
    eps: float = 1e-8  # added to the norm of a matrix, and to the root of the squares

    def build(self, rate, decay, dims):
        """The transformation; see training/optimizers/__init__.py."""
        axes = names.each(_axes, dims)
        matrices = optax.contrib.scale_by_muon(
            beta=self.momentum, eps=self.eps, weight_dimension_numbers=lambda _: axes
        )
        adam = optax.scale_by_adam(self.b1, self.b2, self.eps, nesterov=True)
        scaled = optax.scale_by_learning_rate(rate)
        rules: dict[Any, Any] = {
            "muon": optax.chain(matrices, _matched(axes), decay, scaled),
            "adam": optax.chain(adam, decay, scaled),
        }
        kind = lambda numbers: "muon" if numbers else "adam"
        return optax.partition(rules, jax.tree.map(kind, axes, is_leaf=_is_axes))


def _axes(dims: tuple[str, ...]):
    """A matrix's axes as optax takes them; an empty node for what AdamW moves."""
    found = names.inner_matrix(dims)
    if found is None:
        return optax.MaskedNode()
    return optax.contrib.MuonDimensionNumbers(found.rows, found.columns)


def _is_axes(node) -> bool:
    return isinstance(node, (optax.MaskedNode, optax.contrib.MuonDimensionNumbers))


def _matched(axes) -> optax.GradientTransformation:
    def one(numbers, update):
        if not numbers:
            return update
        rows, columns = (math.prod(update.shape[i] for i in group) for group in numbers)
        return RMS * math.sqrt(max(rows, columns)) * update

    return optax.stateless(lambda updates, _: jax.tree.map(one, axes, updates, is_leaf=_is_axes))
