"""RMS normalisation as its equation reads, differentiated by JAX."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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
    """u = x act(input_gate) + residual;  y = u / sqrt(mean(u^2) + eps) * weight * act(gate)."""
    wide = sum_type(x)
    act = {"silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}[activation]
    u = x.astype(wide)
    if input_gate is not None:
        u = u * act(input_gate.astype(wide))
    if residual is not None:
        u = u + residual.astype(wide)
    u = u.astype(x.dtype)
    mean_square = jnp.mean(jnp.square(u.astype(wide)), axis=-1, keepdims=True)
    y = u.astype(wide) / jnp.sqrt(mean_square + eps) * weight.astype(wide)
    if gate is not None:
        y = y * act(gate.astype(wide))
    return y.astype(x.dtype), u
