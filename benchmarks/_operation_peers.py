"""Peers of operations in torch: the same inputs, outputs and gradients."""

from collections.abc import Callable

import numpy as np
from _transformers import torch
from transformers.models.qwen3_next import modeling_qwen3_next


def attention(q, k, v):
    """torch's fused CPU attention on (B, T, H, K)."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True)
    return (out.transpose(1, 2),)


def delta_rule(q, k, v, beta, log_decay):
    """The chunked gated delta rule of Qwen3-Next in transformers."""
    return modeling_qwen3_next.torch_chunk_gated_delta_rule(
        q, k, v, g=log_decay, beta=beta, output_final_state=True
    )


FUNCTIONS = {"attention": attention, "delta_rule": delta_rule}


def runner(name: str, inputs: dict[str, np.ndarray], slopes: list[np.ndarray] | None) -> Callable:
    """A function without arguments: the outputs, and with `slopes` also the gradients."""
    tensors = {n: torch.tensor(x, requires_grad=slopes is not None) for n, x in inputs.items()}
    function = FUNCTIONS[name]
    if slopes is None:

        def forward():
            with torch.no_grad():
                return [x.numpy() for x in function(**tensors)]

        return forward
    given = [torch.tensor(s) for s in slopes]

    def both():
        outputs = function(**tensors)
        sources = [tensors[name] for name in sorted(tensors)]  # the order of JAX's dictionaries
        found = torch.autograd.grad(outputs, sources, given[: len(outputs)])
        return [x.detach().numpy() for x in (*outputs, *found)]

    return both
