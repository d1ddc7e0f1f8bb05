"""Products: the dtype of their sums, and the precision that keeps their operands' digits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import products

HIGHEST = jax.lax.Precision.HIGHEST


@pytest.mark.parametrize(
    ("left", "right", "sums", "precision"),
    [
        ("bfloat16", "bfloat16", "float32", None),
        ("bfloat16", "float32", "float32", HIGHEST),
        ("float32", "float32", "float32", HIGHEST),
        ("float64", "float64", "float64", HIGHEST),
    ],
)
def test_sums_are_wide_and_digits_are_kept(left, right, sums, precision):
    with jax.enable_x64(True):
        a, b = jnp.ones((3, 4), left), jnp.ones((4, 5), right)
        assert products.sum_type(a, b) == sums
        assert products.precision(a, b) == precision
        assert products.product("ij,jk->ik", a, b).dtype == sums
        program = jax.make_jaxpr(lambda a, b: products.exact_product("ij,jk->ik", a, b))(a, b)
    text = str(program)
    assert ("Precision.HIGHEST" in text) == (precision is not None)
    assert f"preferred_element_type={sums}" in text


def test_a_sum_keeps_what_its_terms_dtype_could_not():
    """256 + 1 is no bfloat16."""
    a = jnp.asarray([[256.0, 1.0]], jnp.bfloat16)
    ones = jnp.ones((2, 1), jnp.bfloat16)
    assert products.product("ij,jk->ik", a, ones) == 257
    assert products.exact_product("ij,jk->ik", a, ones) == 257


def test_operands_are_rounded_as_asked():
    x = np.float32(1 + 2**-12)
    a = jnp.full((1, 1), x)
    assert products.exact_product("ij,jk->ik", a, a, jnp.dtype("bfloat16")) == 1
    assert products.exact_product("ij,jk->ik", a, a) == x * x
