"""The short causal depthwise convolution: the public operation, its rules and its checks."""

from jaxtyping import Array, Float, Int

from kernels import checks, dispatch
from kernels import segments as packed

ACTIVATIONS = ("none", "silu")
WIDTHS = (2, 8)


def short_conv(
    x: Float[Array, "B T D"],
    weight: Float[Array, "W D"],
    bias: Float[Array, " D"] | None = None,
    *,
    segments: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B W-1 D"] | None = None,
    activation: str = "none",
    impl: str | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B W-1 D"]]:
    """y_t = act(bias + sum_w weight[w] * x_{t-W+1+w}), w = 0 .. W-1.  Returns (y, tail).

    weight[W-1] multiplies the current token; W is 2 to 8; act is the identity or silu. Used before
    the recurrence in Mamba (arXiv:2312.00752, figure 3), Griffin and DeltaNet.

    The state is the tail (B, W-1, D) in x's dtype: the last W-1 inputs of the row's last document,
    oldest first, zeros where the document is shorter. `initial_state` is the tail before the row,
    rounded to x's dtype; it belongs to the document of the first real token. Inputs of another
    document count as zero, and padding leaves the tail as it was. Padding stands at the ends of a
    row or between two documents: the tokens of one document must be next to each other.

    Sums are float32 (float64 for float64 inputs), y has x's dtype. Differentiable (reverse mode) in
    x, weight, bias and initial_state, through y and the tail. Raises ValueError on shapes that do
    not fit, on a width outside 2 to 8 and on an unknown activation.
    """
    check_inputs(x, weight, bias)
    state = (x.shape[0], weight.shape[0] - 1, x.shape[2])
    checks.shaped("initial_state", initial_state, "(B, W-1, D)", state)
    packed.check(segments, x.shape[0], x.shape[1])
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be {' or '.join(ACTIVATIONS)}.")
    run = dispatch.choose("short_conv", "short_conv", impl)
    return run(
        x, weight, bias, segments=segments, initial_state=initial_state, activation=activation
    )


def check_inputs(x: Array, weight: Array, bias: Array | None) -> None:
    """Raise unless x is (B, T, D), weight (W, D) with W from 2 to 8, bias None or (D,)."""
    checks.whole("x", x, "(batch, time, width)")
    channels = x.shape[2]
    if weight.ndim != 2 or weight.shape[1] != channels:
        raise ValueError(
            f"weight has shape {weight.shape}; it must be (W, D) with x's D = {channels}."
        )
    low, high = WIDTHS
    if not low <= weight.shape[0] <= high:
        nearest = min(max(weight.shape[0], low), high)
        raise ValueError(
            f"weight has {weight.shape[0]} taps; {low} to {high} are supported; "
            f"the nearest is {nearest}."
        )
    checks.floating("weight", weight)
    checks.shaped("bias", bias, "(D,)", (channels,))
