"""The walk over time that references share, on sums that can be counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import reference


def add(total_B, token):
    (x_B,) = token
    return total_B + x_B, total_B + x_B


def running(x, segments=None, initial=0.0):
    x = jnp.asarray([x], jnp.float32)
    segments = None if segments is None else jnp.asarray([segments], jnp.int32)
    y, final = reference.over_time(add, jnp.full(1, initial), (x,), segments)
    return y[0].tolist(), final.item()


def test_without_documents_the_state_goes_on():
    assert running([1, 2, 3], initial=10.0) == ([11, 13, 16], 16)


def test_documents_start_from_zero_and_padding_changes_nothing():
    found = running([9, 1, 2, 9, 4, 8, 9], [0, 1, 1, 0, 2, 2, 0], initial=10.0)
    assert found == ([0, 11, 13, 0, 4, 12, 0], 12)


def test_a_number_that_comes_back_behind_another_is_a_new_document():
    assert running([1, 2, 4], [1, 2, 1]) == ([1, 2, 4], 4)


def test_a_row_of_padding_leaves_the_state_alone():
    assert running([7, 7], [0, 0], initial=5.0) == ([0, 0], 5)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_what_stands_at_padding_reaches_no_gradient(bad):
    segments = jnp.asarray([[1, 0, 1]], jnp.int32)

    def loss(x):
        step = lambda h, token: (jnp.exp(token[0]) * h, jnp.exp(token[0]) * h)
        y, final = reference.over_time(step, jnp.ones(1), (x,), segments)
        return jnp.sum(y) + jnp.sum(final)

    slopes = np.asarray(jax.grad(loss)(jnp.asarray([[0.0, bad, 0.0]])))
    np.testing.assert_array_equal(slopes, [[3.0, 0.0, 2.0]])
