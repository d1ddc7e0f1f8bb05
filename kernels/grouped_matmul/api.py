"""The grouped matrix product: the public operation, its rules and its checks."""

from jaxtyping import Array, Float, Int

from kernels import checks, dispatch


def grouped_matmul(
    x: Float[Array, "M K"],
    weights: Float[Array, "E K N"],
    group_sizes: Int[Array, " E"],
    *,
    impl: str | None = None,
) -> Float[Array, "M N"]:
    """y_m = x_m weights[e(m)]: group 0 has the first group_sizes[0] rows, group 1 the next, ...

    Rows beyond sum(group_sizes) belong to no group: their y and their gradient are exactly zero,
    whatever they hold. A group may be empty. Sums are float32 (float64 for float64 inputs), y has
    x's dtype. Differentiable (reverse mode) in x and weights. Serves mixtures of experts whose
    tokens are sorted instead of dropped (MegaBlocks, arXiv:2211.15841, section 4).

    Raises ValueError on shapes and dtypes that do not fit. The sizes are values, which cannot be
    checked under jit: where one is negative or their sum exceeds M, all of y is NaN.
    """
    check_inputs(x, weights)
    check_sizes(group_sizes, weights)
    return dispatch.choose("grouped_matmul", "grouped_matmul", impl)(x, weights, group_sizes)


def check_inputs(x: Array, weights: Array) -> None:
    """Raise unless x is floating (M, K) and weights floating (E, K, N), without a zero size."""
    checks.whole("x", x, "(rows, width)")
    checks.whole("weights", weights, "(groups, width, outputs)")
    if weights.shape[1] != x.shape[1]:
        raise ValueError(
            f"weights has shape {weights.shape}; its second size must be x's width, {x.shape[1]}."
        )


def check_sizes(group_sizes: Array, weights: Array) -> None:
    """Raise unless group_sizes holds one integer a group."""
    groups = weights.shape[0]
    if group_sizes.shape != (groups,):
        raise ValueError(
            f"group_sizes has shape {group_sizes.shape}; "
            f"it must be (E,) = ({groups},), one size for each of weights."
        )
    checks.integer("group_sizes", group_sizes)
