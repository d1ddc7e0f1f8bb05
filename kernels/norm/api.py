"""RMS normalisation with an optional residual and gates: the public operation and its checks."""

from jaxtyping import Array, Float

from kernels import checks, dispatch

ACTIVATIONS = ("silu", "sigmoid")


def norm(
    x: Float[Array, "... D"],
    weight: Float[Array, "... D"],
    *,
    residual: Float[Array, "... D"] | None = None,
    gate: Float[Array, "... D"] | None = None,
    input_gate: Float[Array, "... D"] | None = None,
    activation: str = "silu",
    eps: float = 1e-6,
    impl: str | None = None,
) -> tuple[Float[Array, "... D"], Float[Array, "... D"]]:
    """u = x act(input_gate) + residual;  y = u / sqrt(mean(u^2) + eps) * weight * act(gate).

    Returns (y, u), both in x's dtype; a factor or term left out is 1 or 0. The mean runs over the
    last dimension (arXiv:1910.07467, eq. 4). The weight has the last one or more dimensions of x,
    so that heads or groups can have their own. `residual` is a block's stream, of which u is the
    next value; `gate` is the output gate of Gated DeltaNet (arXiv:2412.06464) and GLA
    (arXiv:2312.06635, section 4.4), `input_gate` that of Mamba-2 (arXiv:2405.21060, section 7).
    The activation of both is silu or sigmoid.

    Computed in float32 (float64 for float64 inputs) from u as it is returned, rounded to x's dtype,
    so that the fused sum and the sum apart agree in every bit. Differentiable (reverse mode) in all
    arrays, through y and u. Raises ValueError on shapes and dtypes that do not fit, on an unknown
    activation and on an eps that is not positive.
    """
    check_inputs(x, weight)
    for name, array in (("residual", residual), ("gate", gate), ("input_gate", input_gate)):
        check_like(name, array, x)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be {' or '.join(ACTIVATIONS)}.")
    if not eps > 0:
        raise ValueError(f"eps is {eps}; it must be positive, as 1e-6.")
    run = dispatch.choose("norm", "norm", impl)
    return run(
        x,
        weight,
        residual=residual,
        gate=gate,
        input_gate=input_gate,
        activation=activation,
        eps=float(eps),
    )


def check_inputs(x: Array, weight: Array) -> None:
    """Raise unless x is floating of rank 1 or more and weight has its last dimensions."""
    if x.ndim == 0 or 0 in x.shape:
        raise ValueError(f"x has shape {x.shape}; it must be (..., D), every size at least 1.")
    if weight.ndim == 0 or weight.shape != x.shape[-weight.ndim :]:
        raise ValueError(
            f"weight has shape {weight.shape}; it must be the last one or more sizes of x, "
            f"as {x.shape[-1:]}."
        )
    checks.floating("x", x)
    checks.floating("weight", weight)


def check_like(name: str, array: Array | None, x: Array) -> None:
    """Raise unless the array is None or floating and of x's shape."""
    if array is None:
        return
    if array.shape != x.shape:
        raise ValueError(f"{name} has shape {array.shape}; it must be x's, {x.shape}.")
    checks.floating(name, array)
