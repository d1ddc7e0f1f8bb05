"""Cross-entropy by its definition: all the logits at once, differentiated by JAX."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.products import sum_type


def cross_entropy(
    x: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    softcap: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """total = sum(weights * nll) and nll = logsumexp(z) - z[target], z = x head."""
    wide = sum_type(x, head)
    logits_BTV = jnp.einsum("btd,dv->btv", x.astype(wide), head.astype(wide))
    if softcap:
        logits_BTV = softcap * jnp.tanh(logits_BTV / softcap)
    chosen_BT1 = jnp.take_along_axis(logits_BTV, targets[..., None], axis=-1)
    nll = jax.nn.logsumexp(logits_BTV, axis=-1) - chosen_BT1[..., 0]
    return jnp.sum(weights.astype(wide) * nll), jax.lax.stop_gradient(nll)
