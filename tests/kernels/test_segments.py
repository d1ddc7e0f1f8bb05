"""Document boundaries: the three rules, checked token by token in plain Python."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import segments


def expected(row: list[int]) -> tuple[list[int], list[bool]]:
    """Ordinals and starts of a row by walking over it."""
    ordinals, starts, previous, ordinal = [], [], None, 0
    for number in row:
        start = number != 0 and previous is not None and number != previous
        ordinal += start
        previous = number if number != 0 else previous
        ordinals.append(ordinal)
        starts.append(start)
    return ordinals, starts


marks = jax.jit(lambda p: (segments.ordinals(p), segments.starts(p), segments.is_real(p)))


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=12, max_size=12), min_size=3, max_size=3))
def test_ordinals_and_starts_follow_the_rules(rows):
    packed = jnp.asarray(rows, jnp.int32)
    want = [expected(row) for row in rows]
    ordinals, starts, is_real = marks(packed)
    np.testing.assert_array_equal(ordinals, [ordinals for ordinals, _ in want])
    np.testing.assert_array_equal(starts, [starts for _, starts in want])
    np.testing.assert_array_equal(is_real, np.asarray(rows) != 0)


@pytest.mark.parametrize(
    ("row", "ordinals", "starts"),
    [
        ([0, 0, 5, 5, 2, 2], [0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 0]),
        ([1, 0, 0, 1, 0, 2], [0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 1]),
        ([1, 2, 1, 0, 0, 0], [0, 1, 2, 2, 2, 2], [0, 1, 1, 0, 0, 0]),
        ([3, 1, 2, 3, 1, 2], [0, 1, 2, 3, 4, 5], [0, 1, 1, 1, 1, 1]),
        ([0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]),
    ],
)
def test_rows_by_hand(row, ordinals, starts):
    packed = jnp.asarray([row], jnp.int32)
    np.testing.assert_array_equal(segments.ordinals(packed)[0], ordinals)
    np.testing.assert_array_equal(segments.starts(packed)[0], np.asarray(starts, bool))


@pytest.mark.parametrize(
    ("row", "numbered", "of_last", "goes_on"),
    [
        ([1, 1, 2, 1, 0], [1, 1, 2, 3, 0], [0, 0, 0, 1, 0], False),
        ([0, 4, 0, 4, 0], [0, 1, 0, 1, 0], [0, 1, 0, 1, 0], True),
        ([7, 3, 3, 0, 3], [1, 2, 2, 0, 2], [0, 1, 1, 0, 1], False),
        ([0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0], True),
    ],
)
def test_documents_are_told_apart_by_order(row, numbered, of_last, goes_on):
    packed = jnp.asarray([row], jnp.int32)
    assert segments.numbered(packed).tolist() == [numbered]
    assert segments.of_last(packed).tolist() == [[bool(mark) for mark in of_last]]
    assert segments.goes_on(packed).tolist() == [goes_on]


@pytest.mark.parametrize("row", [[0], [4]])
def test_a_single_token(row):
    packed = jnp.asarray([row], jnp.int32)
    assert segments.ordinals(packed).tolist() == [[0]]
    assert segments.starts(packed).tolist() == [[False]]


def test_the_same_under_jit_and_in_other_integer_types():
    row = np.array([[0, 2, 2, 0, 1, 1, 3]])
    want = segments.ordinals(jnp.asarray(row, jnp.int32))
    np.testing.assert_array_equal(jax.jit(segments.ordinals)(jnp.asarray(row, jnp.int32)), want)
    for dtype in (jnp.int8, jnp.int16):
        found = segments.ordinals(jnp.asarray(row, dtype))
        np.testing.assert_array_equal(found, want)
        assert found.dtype == jnp.int32


def test_check_accepts_none_and_the_right_shape():
    segments.check(None, 2, 3)
    segments.check(jnp.ones((2, 3), jnp.int32), 2, 3)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 4), jnp.int32), ((3,), jnp.int32), ((2, 3), jnp.float32), ((2, 3), jnp.bool_)],
)
def test_check_names_what_it_got_and_what_it_wants(shape, dtype):
    wrong = jnp.ones(shape, dtype)
    with pytest.raises(ValueError) as error:
        segments.check(wrong, 2, 3)
    assert str(error.value) == (
        f"segments has shape {shape} and dtype {wrong.dtype}; "
        "it must be (2, 3) int32, like the inputs' (B, T)."
    )


def test_shapes_are_checked_at_run_time_under_pytest():
    with pytest.raises(jaxtyping.TypeCheckError):
        segments.ordinals(jnp.ones(3, jnp.int32))
    with pytest.raises(jaxtyping.TypeCheckError):
        segments.starts(jnp.ones((2, 3), jnp.float32))
