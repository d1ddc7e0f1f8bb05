"""Products whose sums are float32 at least, and at which precision a TPU takes them."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

HIGHEST = jax.lax.Precision.HIGHEST


def sum_type(*arrays: Any) -> jnp.dtype:
    """The dtype of sums and states: float32, or float64 where an array has it."""
    return jnp.result_type(*(array.dtype for array in arrays), jnp.float32)


def precision(*operands: Array) -> jax.lax.Precision | None:
    """What keeps every digit of the operands: HIGHEST where one has four bytes or more.

    A TPU takes six bfloat16 passes then; operands of two bytes need no more than one.
    """
    return HIGHEST if max(operand.dtype.itemsize for operand in operands) >= 4 else None


def product(letters: str, left: Array, right: Array) -> Array:
    """einsum of two operands with wide sums, at the precision that the platform takes."""
    return jnp.einsum(letters, left, right, preferred_element_type=sum_type(left, right))


def exact_product(letters: str, left: Array, right: Array, dtype=None) -> Array:
    """`product` of operands rounded to `dtype`, if given, that loses no digit of them."""
    if dtype is not None:
        left, right = left.astype(dtype), right.astype(dtype)
    return jnp.einsum(
        letters,
        left,
        right,
        precision=precision(left, right),
        preferred_element_type=sum_type(left, right),
    )
