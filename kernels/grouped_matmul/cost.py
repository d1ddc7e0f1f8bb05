"""FLOPs that the grouped product needs; the reference multiplies every row by every matrix."""

from jaxtyping import Array, Float


def grouped_matmul(
    x: Float[Array, "M K"], weights: Float[Array, "E K N"], group_sizes: object
) -> int:
    """2 M K N: each row meets one matrix. Rows of no group count too: how many is a value."""
    return 2 * x.shape[0] * weights.shape[1] * weights.shape[2]
