"""SOAP, arXiv 2409.11321, algorithms 3 and 4: Adam in the eigenbasis of Shampoo's factors.

For a matrix between the residual stream and features, gradient G:

    L = b L + (1 - b) G G^T,   R = b R + (1 - b) G^T G,   b = b2
    every `every` updates: Q_L = the Q of qr(L Q_L), Q_R likewise
    G' = Q_L^T G Q_R,   M = b1 M + (1 - b1) G,   V = b2 V + (1 - b2) G'^2
    w -= rate (Q_L (Q_L^T M Q_R / (sqrt(V^) + eps)) Q_R^T + decay w)

All other weights are Adam's, which is the same with Q = 1. As in the released code
(github.com/nikhilvyas/SOAP), the first gradient only sets up the bases (by eigh) and moves no
matrix, and a basis is put in the order of its eigenvalues before each qr, V with it. State: two
numbers a weight and, for a matrix, two squares of each side of at most `longest`.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
import optax

from training import names


@dataclasses.dataclass
class Config:
    """Settings of SOAP."""

    # Until jaxlib 0.12, eigh beside collectives between CPU devices waits for ever.
    one_cpu: ClassVar[bool] = jaxlib.__version__.startswith("0.10.")

    b1: float = 0.95  # how much of the mean of gradients a step keeps
    b2: float = 0.95  # the same of the mean of squares, and of the factors
    eps: float = 1e-8  # added to the root of the squares
    every: int = 10  # updates that a basis serves
    longest: int = 8192  # a longer side of a matrix is not rotated

    def build(self, rate, decay, dims):
        """The transformation; see training/optimizers/__init__.py."""
        for name in ("every", "longest"):
            if getattr(self, name) < 1:
                raise ValueError(f"optimizer.rule.{name}={getattr(self, name)} must be at least 1.")
        soap = optax.GradientTransformation(
            lambda params: _start(self, params, dims),
            lambda updates, state, params=None: _update(self, updates, state, dims),
        )
        return optax.chain(soap, decay, optax.scale_by_learning_rate(rate))


class Side(NamedTuple):
    """One side of a weight's matrices: the factor (N, n, n) and its basis (N, n, n)."""

    factor: jax.Array
    basis: jax.Array


class State(NamedTuple):
    """Updates so far; Adam's moments; a weight's sides, rows then columns, () for one unrotated."""

    count: jax.Array
    mu: Any
    nu: Any
    sides: Any


def _start(config: Config, params, dims) -> State:
    def sides(w, names_of):
        axes = names.inner_matrix(names_of)
        if axes is None:
            return ()
        count, *lengths = jax.eval_shape(lambda: names.fold(w, axes)).shape
        square = lambda n: Side(
            jnp.zeros((count, n, n)), jnp.broadcast_to(jnp.eye(n), (count, n, n))
        )
        return tuple(square(n) if n <= config.longest else () for n in lengths)

    zeros = lambda: jax.tree.map(jnp.zeros_like, params)
    return State(jnp.zeros((), jnp.int32), zeros(), zeros(), jax.tree.map(sides, params, dims))


def _update(config: Config, updates, state: State, dims):
    count = state.count

    def one(g, mu, nu, sides, names_of):
        axes = names.inner_matrix(names_of)
        if axes is None:
            mu, nu = _moments(config, g, g, mu, nu)
            return _adam(config, mu, nu, count + 1), mu, nu, ()
        shape = g.shape
        g, mu, nu = (names.fold(x, axes) for x in (g, mu, nu))
        new_mu, new_nu = _moments(config, g, _rotated(g, sides), mu, nu)
        move = _adam(config, _rotated(new_mu, sides), new_nu, jnp.maximum(count, 1))
        started = count > 0
        move = jnp.where(started, _rotated(move, sides, back=True), 0.0)
        mu, nu = jnp.where(started, new_mu, mu), jnp.where(started, new_nu, nu)
        nu, sides = _refreshed(config, g, nu, sides, count)
        return *(names.unfold(x, axes, shape) for x in (move, mu, nu)), sides

    leaves, tree = jax.tree.flatten(updates)
    others = (tree.flatten_up_to(t) for t in (state.mu, state.nu, state.sides, dims))
    moves, *parts = zip(*map(one, leaves, *others), strict=True)
    return tree.unflatten(moves), State(count + 1, *map(tree.unflatten, parts))


def _moments(config: Config, g, rotated, mu, nu):
    mu = config.b1 * mu + (1 - config.b1) * g
    return mu, config.b2 * nu + (1 - config.b2) * rotated**2


def _adam(config: Config, mu, nu, count):
    """m^ / (sqrt(v^) + eps) after `count` gradients."""
    count = count.astype(jnp.float32)
    nu = nu / (1 - config.b2**count)
    return mu / (1 - config.b1**count) / (jnp.sqrt(nu) + config.eps)


def _rotated(x, sides, back: bool = False):
    """Q_L^T x Q_R of matrices (N, R, C), or Q_L x Q_R^T."""
    left, right = sides
    if left:
        x = jnp.einsum("nrk,nkc->nrc" if back else "nkr,nkc->nrc", left.basis, x)
    if right:
        x = jnp.einsum("nrk,nck->nrc" if back else "nrk,nkc->nrc", x, right.basis)
    return x


def _refreshed(config: Config, g, nu, sides, count):
    """The sides after gradient g, and V in the order of their bases."""

    def grown(side, square):
        return side and side._replace(factor=config.b2 * side.factor + (1 - config.b2) * square)

    left, right = sides
    left = grown(left, jnp.einsum("nrc,nsc->nrs", g, g))
    right = grown(right, jnp.einsum("nrc,nrd->ncd", g, g))

    def first(nu, sides):
        bases = (side and side._replace(basis=jnp.linalg.eigh(side.factor)[1]) for side in sides)
        return nu, tuple(bases)

    def turned(nu, sides):
        done = []
        for axis, side in enumerate(sides, start=1):
            if side:
                order, side = _turned(side)
                nu = jnp.take_along_axis(nu, jnp.expand_dims(order, 3 - axis), axis)
            done.append(side)
        return nu, tuple(done)

    due = jnp.where(count == 0, 1, jnp.where(count % config.every == 0, 2, 0))
    return jax.lax.switch(due, [lambda *same: same, first, turned], nu, (left, right))


def _turned(side: Side) -> tuple[jax.Array, Side]:
    """One step of orthogonal iteration of a sorted basis; the order (N, n) comes first."""
    factor, basis = side
    values = jnp.einsum("nik,nij,njk->nk", basis, factor, basis)
    order = jnp.argsort(-values, axis=1)
    basis = jnp.take_along_axis(basis, order[:, None], 2)
    return order, Side(factor, jnp.linalg.qr(factor @ basis)[0])
