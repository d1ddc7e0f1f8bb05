"""RMS normalisation with its own backward pass: one read of every array each way.

Between the passes stay u, the gates, and one number a row, the inverse root mean square. An
automatic derivative would keep several float32 copies of u instead.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels import vary
from kernels.products import sum_type


def norm(
    x: Float[Array, "... D"],
    weight: Float[Array, "... D"],
    *,
    residual: Float[Array, "... D"] | None = None,
    gate: Float[Array, "... D"] | None = None,
    input_gate: Float[Array, "... D"] | None = None,
    activation: str = "silu",
    eps: float = 1e-6,
) -> tuple[Float[Array, "... D"], Float[Array, "... D"]]:
    """The operation of `kernels.norm`; elementwise but for one sum a row, which XLA fuses."""
    return _norm(activation, eps, *vary.together((x, weight, residual, gate, input_gate)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _norm(activation, eps, x, weight, residual, gate, input_gate):
    return _forward(activation, eps, x, weight, residual, gate, input_gate)[0]


def _forward(activation, eps, x, weight, residual, gate, input_gate):
    wide = sum_type(x)
    u = x
    if input_gate is not None:
        u = u.astype(wide) * _activate(input_gate.astype(wide), activation)[0]
    if residual is not None:
        u = u.astype(wide) + residual.astype(wide)
    u = u.astype(x.dtype)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(u.astype(wide)), axis=-1, keepdims=True) + eps)
    y = u.astype(wide) * inverse * weight.astype(wide)
    if gate is not None:
        y = y * _activate(gate.astype(wide), activation)[0]
    # Without an input gate u is all that the backward pass needs of x and the residual.
    gated = None if input_gate is None else (x, input_gate)
    like_residual = None if residual is None else jnp.zeros((), residual.dtype)
    return (y.astype(x.dtype), u), (u, inverse, weight, gate, gated, like_residual)


def _backward(activation, eps, residuals, cotangents):
    """With n = u / rms: dn = dy weight act(gate), du = (dn - n mean(dn n)) / rms + du'."""
    u, inverse, weight, gate, gated, like_residual = residuals
    wide = inverse.dtype
    dy, du_out = (d.astype(wide) for d in cotangents)
    n = u.astype(wide) * inverse
    d_gate = None
    if gate is not None:
        value, slope = _activate(gate.astype(wide), activation)
        d_gate = (dy * n * weight.astype(wide) * slope).astype(gate.dtype)
        dy = dy * value
    own = tuple(range(u.ndim - weight.ndim))
    d_weight = jnp.sum(dy * n, axis=own).astype(weight.dtype)
    dn = dy * weight.astype(wide)
    du = inverse * (dn - n * jnp.mean(dn * n, axis=-1, keepdims=True)) + du_out
    d_residual = None if like_residual is None else du.astype(like_residual.dtype)
    if gated is None:
        return du.astype(u.dtype), d_weight, d_residual, d_gate, None
    x, input_gate = gated
    value, slope = _activate(input_gate.astype(wide), activation)
    d_input_gate = (du * x.astype(wide) * slope).astype(input_gate.dtype)
    return (du * value).astype(x.dtype), d_weight, d_residual, d_gate, d_input_gate


_norm.defvjp(_forward, _backward)


def _activate(z: Array, activation: str) -> tuple[Array, Array]:
    """The value and the slope of silu or sigmoid."""
    sigmoid = jax.nn.sigmoid(z)
    if activation == "sigmoid":
        return sigmoid, sigmoid * (1 - sigmoid)
    return z * sigmoid, sigmoid * (1 + z * (1 - sigmoid))
