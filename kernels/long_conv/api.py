"""The long causal convolution: the public operation, its rules and its checks."""

from jaxtyping import Array, Float, Int

from kernels import checks, dispatch
from kernels import segments as packed


def long_conv(
    x: Float[Array, "B T D"],
    filters: Float[Array, "L D"],
    skip: Float[Array, " D"] | None = None,
    *,
    segments: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B L-1 D"] | None = None,
    impl: str | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B L-1 D"]]:
    """y_t = skip * x_t + sum_l filters[l] * x_{t-l}, l = 0 .. L-1.  Returns (y, tail).

    filters[0] multiplies the current token; L may be shorter or longer than T. Used by S4 in its
    convolution mode (arXiv:2111.00396, eq. 4), H3 (arXiv:2212.14052) and Hyena (arXiv:2302.10866,
    section 3), whose filters are computed once for all rows.

    The state is the tail (B, L-1, D) in x's dtype: the last L-1 inputs of the row's last document,
    oldest first, zeros where the document is shorter. `initial_state` is the tail before the row,
    rounded to x's dtype; it belongs to the document of the first real token. Inputs of another
    document count as zero, exactly; padding leaves the tail as it was. Padding stands at the ends
    of a row or between two documents: the tokens of one document must be next to each other.

    Exactly causal: no later input reaches an output, not even by rounding, as it would in one
    transform of the whole row. Sums are float32 (float64 for float64 inputs), y has x's dtype.
    Differentiable (reverse mode) in x, filters, skip and initial_state, through y and the tail.
    Raises ValueError on shapes and dtypes that do not fit.
    """
    check_inputs(x, filters, skip)
    state = (x.shape[0], filters.shape[0] - 1, x.shape[2])
    checks.shaped("initial_state", initial_state, "(B, L-1, D)", state)
    packed.check(segments, x.shape[0], x.shape[1])
    run = dispatch.choose("long_conv", "long_conv", impl)
    return run(x, filters, skip, segments=segments, initial_state=initial_state)


def check_inputs(x: Array, filters: Array, skip: Array | None) -> None:
    """Raise unless x is (B, T, D), filters (L, D) and skip None or (D,), all floating."""
    checks.whole("x", x, "(batch, time, width)")
    channels = x.shape[2]
    if filters.ndim != 2 or filters.shape[1] != channels or filters.shape[0] < 1:
        raise ValueError(
            f"filters has shape {filters.shape}; it must be (L, D) with L at least 1 "
            f"and x's D = {channels}."
        )
    checks.floating("filters", filters)
    checks.shaped("skip", skip, "(D,)", (channels,))
