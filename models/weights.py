"""Weights: how they start, the names of their dimensions, and the map of an activation by one."""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

Initializer = Callable[[jax.Array, Sequence[int]], jax.Array]


def normal(std: float) -> Initializer:
    """Normal distribution of standard deviation `std`, cut at two sigma (rescaled for the cut)."""
    return jax.nn.initializers.truncated_normal(std / 0.87962566)


def fan_in(*dims_in: int, gain: float = 1.0) -> Initializer:
    """`normal` of variance gain^2 / prod(dims_in): keeps the scale of what is multiplied."""
    return normal(gain / math.sqrt(math.prod(dims_in)))


def constant(value: float) -> Initializer:
    """Every entry equal to `value`."""
    return jax.nn.initializers.constant(value)


def log_uniform(low: float, high: float) -> Initializer:
    """log of a uniform draw from [low, high]: -exp of it is A of Mamba-2 (arXiv 2405.21060)."""
    return lambda key, shape: jnp.log(jax.random.uniform(key, shape, minval=low, maxval=high))


def inverse_softplus(low: float, high: float) -> Initializer:
    """b with softplus(b) log-uniform in [low, high]: a time step's bias (arXiv 2312.00752, 3.6)."""

    def init(key, shape):
        low_log, high_log = math.log(low), math.log(high)
        step = jnp.exp(jax.random.uniform(key, shape, minval=low_log, maxval=high_log))
        return step + jnp.log(-jnp.expm1(-step))

    return init


def weight(
    rngs: nnx.Rngs,
    init: Initializer,
    shape: Sequence[int],
    dims: Sequence[str],
    share: float = 1.0,
) -> nnx.Param:
    """A float32 weight whose dimensions carry the names `dims` (see parallel/sharding.py).

    `share` is how much of it works on one token: of a mixture's experts, those that a token has.
    """
    if len(shape) != len(dims):
        raise ValueError(f"weight of shape {tuple(shape)} has {len(dims)} names {tuple(dims)}.")
    return nnx.Param(init(rngs.params(), tuple(shape)), dims=tuple(dims), share=share)


def inward(rngs: nnx.Rngs, width: int, shape: Sequence[int], dims: Sequence[str]) -> nnx.Param:
    """A map (width, *shape) from the residual stream, of variance 1 / width."""
    return weight(rngs, fan_in(width), (width, *shape), ("embed", *dims))


def outward(rngs: nnx.Rngs, shape: Sequence[int], width: int, dims: Sequence[str]) -> nnx.Param:
    """A map (*shape, width) back to the residual stream, of variance 1 / prod(shape)."""
    return weight(rngs, fan_in(*shape), (*shape, width), (*dims, "embed"))


def filled(rngs: nnx.Rngs, value: float, shape: Sequence[int], dims: Sequence[str]) -> nnx.Param:
    """A weight that starts at one value: 1 for gains, 0 for biases."""
    return weight(rngs, constant(value), shape, dims)


def project(spec: str, x: Float[Array, "..."], w: nnx.Param) -> Float[Array, "..."]:
    """einsum(spec, x, w) in x's dtype, as "btd,dhk->bthk"; the map of an activation by a weight."""
    return _project(spec, x, w[...].astype(x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project(spec, x, w):
    return jnp.einsum(spec, x, w)


def _project_forward(spec, x, w):
    x = jax.lax.optimization_barrier(x)
    return jnp.einsum(spec, x, w), (x, w)


def _project_backward(spec, residuals, dy):
    """The barriers keep XLA on CPUs from working out x and dy once more, in transposed order."""
    x, w = residuals
    dy = jax.lax.optimization_barrier(dy)
    inputs, y = spec.split("->")
    a, b = inputs.split(",")
    return jnp.einsum(f"{y},{b}->{a}", dy, w), jnp.einsum(f"{a},{y}->{b}", x, dy)


_project.defvjp(_project_forward, _project_backward)


def dims(model: nnx.Module) -> dict:
    """Names of the dimensions of every weight, as the nested dict that `nnx.to_pure_dict` gives."""

    def names(param):
        lead = len(param.shape) - len(param.get_metadata()["dims"])
        return ("layers",) * lead + param.get_metadata()["dims"]

    state = nnx.split(model)[1]
    named = jax.tree.map(names, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return nnx.to_pure_dict(named)


def active(model: nnx.Module) -> int:
    """Weights that work on one token: all but the experts that a token does not have."""
    weights = jax.tree.leaves(nnx.split(model)[1], is_leaf=lambda w: isinstance(w, nnx.Variable))
    return round(sum(math.prod(w.shape) * w.get_metadata()["share"] for w in weights))
