"""Multi-token prediction: training also predicts tokens further ahead, each by one more block.

DeepSeek-V3 (arXiv 2412.19437, section 2.2, eqs. 21 to 25); the idea: Gloeckle et al. (arXiv
2404.19737). The modules share the embedding and the head, and are not used when the model writes.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from models import layers
from models.weights import fan_in, project, weight


def build(config: Any, block: Any, rngs: nnx.Rngs) -> "Further | None":
    """The modules of `config.predict` tokens ahead, each with a `block`; None for 1."""
    if config.predict < 1:
        raise ValueError(f"model.predict={config.predict} must be at least 1 token ahead.")
    if config.predict > 1 and config.objective != "next":
        raise ValueError(
            f"model.predict={config.predict} is for objective='next'; an encoder needs predict=1."
        )
    return None if config.predict == 1 else Further(config, block, rngs)


class Further(nnx.Module):
    """h^k_t = block_k([norm(h^{k-1}_t), norm(embed of token t + k)] M_k), k = 1 .. predict - 1."""

    def __init__(self, config: Any, block: Any, rngs: nnx.Rngs):
        width, count = config.width, range(config.predict - 1)
        norm = lambda: layers.RMSNorm(width, rngs, config.norm_eps)
        self.stream_norms = nnx.List([norm() for _ in count])
        self.token_norms = nnx.List([norm() for _ in count])
        self.maps = nnx.List(
            [
                weight(rngs, fan_in(2 * width), (2, width, width), ("parts", "value", "embed"))
                for _ in count
            ]
        )
        self.blocks = nnx.List([block.build(width, rngs) for _ in count])
        self.weight = config.predict_weight

    def loss(self, model, x, targets, weights, segments):
        """weight * mean over k of the summed nll of token t + k + 1, given tokens up to t + k.

        `targets` are tokens t + 1. A token counts where all tokens between are of its document.
        """
        ahead = lambda a: jnp.concatenate([a[:, 1:], jnp.zeros_like(a[:, :1])], axis=1)
        same = jnp.ones(targets.shape, bool)
        number = jnp.ones_like(targets) if segments is None else segments
        total, following = 0.0, number
        for stream_norm, token_norm, combine, block in zip(
            self.stream_norms, self.token_norms, self.maps, self.blocks, strict=True
        ):
            tokens = model.embedded(targets)  # token t + k
            pair = jnp.stack([stream_norm(x), token_norm(tokens)], axis=2)
            x = project("btpd,pde->bte", pair, combine)
            x, _ = block(x, segments=segments)
            targets, following, weights = ahead(targets), ahead(following), ahead(weights)
            same &= (following == number) & (following != 0)
            nll, _ = model.nll(model.norm(x), targets, weights * same)
            total += nll
        return self.weight * total / len(self.blocks)
