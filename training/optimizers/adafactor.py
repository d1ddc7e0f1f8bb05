"""Adafactor, arXiv 1804.04235, algorithms 4 and 5: a map's squares are kept as rows and columns.

For a map as a matrix of rows i and columns j, with d = 1 - t^-0.8 at update t:

    r_i = d r_i + (1 - d) mean_j(g_ij^2 + eps),   c_j = d c_j + (1 - d) mean_i(g_ij^2 + eps)
    u_ij = g_ij / sqrt(r_i c_j / mean_i(r_i)),    w -= rate (u / max(1, rms(u)) + decay w)

Other weights keep all their squares. What is a matrix follows from names, each layer's and each
expert's by itself (optax's takes the two longest axes). Steps are absolute, as in arXiv 2106.04560,
unless `floor` makes them a share of a weight's own size. State: rows + columns numbers a map.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from training import names


@dataclasses.dataclass
class Config:
    """Settings of Adafactor."""

    power: float = 0.8  # of the count of updates: how fast the memory of squares grows
    eps: float = 1e-30  # added to the squares
    clip: float = 1.0  # highest RMS of an update
    floor: float = 0.0  # above 0: steps are shares of a weight's RMS, or of this (eps_2, 1e-3)

    def build(self, rate, decay, dims):
        """The transformation; see training/optimizers/__init__.py."""
        for name in ("power", "clip"):
            if getattr(self, name) <= 0:
                raise ValueError(f"optimizer.rule.{name}={getattr(self, name)} must be above 0.")
        if self.floor < 0:
            raise ValueError(f"optimizer.rule.floor={self.floor} must be at least 0.")

        def update(updates, state: Any, params=None) -> Any:
            return _update(self, updates, state, params, dims)

        factored = optax.GradientTransformation(lambda params: _start(params, dims), update)
        return optax.chain(factored, decay, optax.scale_by_learning_rate(rate))


class State(NamedTuple):
    """Updates so far, and each weight's mean squares: one array, or its rows and its columns."""

    count: jax.Array
    squares: Any


def _start(params, dims) -> State:
    zeros = lambda w, axes: jnp.zeros([1 if i in axes else n for i, n in enumerate(w.shape)])

    def one(w, names_of):
        found = names.matrix(names_of)
        if found is None:
            return (zeros(w, ()),)
        return zeros(w, found.columns), zeros(w, found.rows)

    return State(jnp.zeros((), jnp.int32), jax.tree.map(one, params, dims))


def _update(config: Config, updates, state: State, params, dims):
    count = state.count + 1
    keep = 1 - count.astype(jnp.float32) ** -config.power

    def one(g, squares, w, names_of):
        found = names.matrix(names_of)
        over = (found.columns, found.rows) if found else ((),)
        power = g**2 + config.eps
        squares = tuple(
            keep * old + (1 - keep) * jnp.mean(power, axes, keepdims=True)
            for old, axes in zip(squares, over, strict=True)
        )
        if found is None:
            move = g * jax.lax.rsqrt(squares[0])
        else:
            rows, columns = squares
            rows = rows / jnp.mean(rows, found.rows, keepdims=True)
            move = g * jax.lax.rsqrt(rows) * jax.lax.rsqrt(columns)
        alone = tuple(i for i, name in enumerate(names_of) if name != "layers")  # a layer each
        move = move / jnp.maximum(1.0, _rms(move, alone) / config.clip)
        if config.floor:
            move = move * jnp.maximum(config.floor, _rms(w, alone))
        return move, squares

    leaves, tree = jax.tree.flatten(updates)
    others = (tree.flatten_up_to(one) for one in (state.squares, params, dims))
    moves, squares = zip(*map(one, leaves, *others), strict=True)
    return tree.unflatten(moves), State(count, tree.unflatten(squares))


def _rms(x, axes):
    return jnp.sqrt(jnp.mean(x**2, axes, keepdims=True))
