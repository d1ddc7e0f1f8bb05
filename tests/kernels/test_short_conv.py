"""What is particular to the short convolution; tests/test_kernels.py proves the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.short_conv import short_conv
from tests.kernels.crossed import crossed
from tests.kernels.packed import SEGMENTS, tokens
from tests.tolerance import assert_close

compiled = jax.jit(short_conv, static_argnames=("activation", "impl"))
IMPLS = ("ref", "xla")
each_impl = pytest.mark.parametrize("impl", IMPLS)


def draw(batch, length, width, *, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((batch, length, channels), (width, channels), (channels,))
    tail = (batch, width - 1, channels)
    return tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in (*shapes, tail))


def brute_force(x, weight, bias, segments, tail, activation):
    """The sum in NumPy float64, with the inputs of every document in a list."""
    x, weight, bias, tail = (np.asarray(value, np.float64) for value in (x, weight, bias, tail))
    width, y, final = len(weight), np.zeros_like(x), tail.copy()
    for row in range(len(x)):
        seen = list(tail[row])
        for t, starts in tokens(segments[row]):
            if starts:
                seen = [np.zeros_like(bias)] * (width - 1)
            seen.append(x[row, t])
            total = bias + sum(weight[w] * seen[len(seen) - width + w] for w in range(width))
            y[row, t] = total / (1 + np.exp(-total)) if activation == "silu" else total
        final[row] = seen[len(seen) - width + 1 :]
    return y, final


@pytest.mark.parametrize(
    ("impl", "width", "activation"),
    crossed(
        IMPLS,
        [2, 4, 8],
        ["none", "silu"],
        gate=[
            ("ref", 2, "silu"),
            ("ref", 4, "none"),
            ("xla", 2, "none"),
            ("xla", 4, "silu"),
            ("xla", 8, "none"),
            ("xla", 8, "silu"),
        ],
    ),
)
def test_equals_a_loop_over_tokens(impl, width, activation):
    x, weight, bias, tail = draw(len(SEGMENTS), 14, width)
    y, final = compiled(
        x,
        weight,
        bias,
        segments=jnp.asarray(SEGMENTS),
        initial_state=tail,
        activation=activation,
        impl=impl,
    )
    want, want_final = brute_force(x, weight, bias, SEGMENTS, tail, activation)
    assert_close(y, want, "float32", "y")
    np.testing.assert_array_equal(final, want_final.astype(np.float32))


@each_impl
@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_rows_shorter_than_the_filter(impl, length):
    """Every packing of a short row: each token padding, in the first or in the second document."""
    rows = np.array(np.meshgrid(*[[0, 1, 2]] * length)).reshape(length, -1).T
    gap = [
        any(r[i] == 0 and r[i - 1] and r[i - 1] in r[i:] for i in range(1, length)) for r in rows
    ]
    rows = rows[~np.array(gap, bool)].astype(np.int32)
    x, weight, bias, tail = draw(len(rows), length, 4)
    y, final = compiled(x, weight, bias, segments=jnp.asarray(rows), initial_state=tail, impl=impl)
    want, want_final = brute_force(x, weight, bias, rows, tail, "none")
    assert_close(y, want, "float32", "y")
    np.testing.assert_array_equal(final, want_final.astype(np.float32))


@each_impl
def test_the_last_tap_multiplies_the_current_token(impl):
    x, weight, _, _ = draw(2, 6, 4)
    only_last = jnp.zeros_like(weight).at[3].set(2.0)
    y, tail = compiled(x, only_last, impl=impl)
    np.testing.assert_array_equal(y, 2 * x)
    np.testing.assert_array_equal(tail, x[:, 3:])
    y, _ = compiled(x, jnp.zeros_like(weight).at[0].set(1.0), impl=impl)
    np.testing.assert_array_equal(y[:, 3:], x[:, :3])
    np.testing.assert_array_equal(y[:, :3], 0)


@pytest.mark.parametrize(
    ("impl", "cut"),
    crossed(IMPLS, [1, 2, 16, 36], gate=[("ref", 2), ("xla", 1), ("xla", 16), ("xla", 36)]),
)
def test_two_parts_equal_the_whole_forward_and_backward(impl, cut):
    x, weight, bias, tail = draw(2, 37, 4)
    slope, _, _, tail_slope = draw(2, 37, 4, seed=1)

    def whole(x, weight, bias, tail):
        return compiled(x, weight, bias, initial_state=tail, activation="silu", impl=impl)

    def parts(x, weight, bias, tail):
        first, tail = whole(x[:, :cut], weight, bias, tail)
        second, tail = whole(x[:, cut:], weight, bias, tail)
        return jnp.concatenate([first, second], axis=1), tail

    def value_and_gradients(function):
        def run(*arguments):
            outputs, pullback = jax.vjp(function, *arguments)
            return outputs, pullback((slope, tail_slope))

        return jax.jit(run)

    results = []
    for function in (whole, parts):
        outputs, gradients = value_and_gradients(function)(x, weight, bias, tail)
        results.append((*outputs, *gradients))
    names = ("y", "tail", "dx", "dweight", "dbias", "dtail")
    for found, want, what in zip(*results, names, strict=True):
        assert_close(found, want, "float32", what)


@each_impl
def test_token_by_token_equals_the_whole(impl):
    x, weight, bias, tail = draw(2, 9, 4)
    want, want_tail = compiled(x, weight, bias, initial_state=tail, impl=impl)
    step = jax.jit(lambda x, tail: compiled(x, weight, bias, initial_state=tail, impl=impl))
    for t in range(9):
        y, tail = step(x[:, t : t + 1], tail)
        assert_close(y[:, 0], want[:, t], "float32", f"token {t}")
    np.testing.assert_array_equal(tail, want_tail)


@each_impl
def test_packed_documents_equal_separate_ones_forward_and_backward(impl):
    lengths = (5, 1, 2, 1, 20, 5)
    edges = np.cumsum((0, *lengths))
    x, weight, bias, _ = draw(1, int(edges[-1]), 4)
    segments = jnp.asarray(np.repeat(np.arange(1, 7), lengths)[None], jnp.int32)

    def total(x, weight, bias, pieces):
        """A loss that sees every token and the last tail of the row."""
        values = []
        for start, end in pieces:
            packed = segments[:, start:end] if len(pieces) == 1 else None
            y, tail = compiled(
                x[:, start:end], weight, bias, segments=packed, activation="silu", impl=impl
            )
            values.append(jnp.sum(jnp.sin(y)))
        return sum(values) + jnp.sum(jnp.cos(tail))

    documents = tuple(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))
    gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)), static_argnums=3)
    packed = gradient(x, weight, bias, ((0, int(edges[-1])),))
    separate = gradient(x, weight, bias, documents)
    for found, want, what in zip(packed, separate, ("dx", "dweight", "dbias"), strict=True):
        assert_close(found, want, "float32", what)


@pytest.mark.parametrize(
    ("impl", "length"),
    crossed(IMPLS, [1, 2, 6], gate=[("ref", 2), ("xla", 1), ("xla", 6)]),
)
def test_no_state_means_zeros_and_no_bias_means_zero(impl, length):
    x, weight, bias, tail = draw(2, length, 4)
    for segments in (None, jnp.asarray(SEGMENTS[:2, 1 : 1 + length])):
        found = compiled(x, weight, segments=segments, impl=impl)
        want = compiled(
            x,
            weight,
            jnp.zeros_like(bias),
            segments=segments,
            initial_state=jnp.zeros_like(tail),
            impl=impl,
        )
        assert_close(found[0], want[0], "float32", "y")
        np.testing.assert_array_equal(found[1], want[1])


@each_impl
def test_nan_at_padding_reaches_nothing(impl):
    x, weight, bias, tail = draw(len(SEGMENTS), 14, 4)
    padding = jnp.asarray(SEGMENTS == 0)[..., None]

    def total(x, weight, bias, tail):
        y, tail = compiled(
            x,
            weight,
            bias,
            segments=jnp.asarray(SEGMENTS),
            initial_state=tail,
            activation="silu",
            impl=impl,
        )
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(tail))

    gradient = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3)))
    clean = gradient(x, weight, bias, tail)
    dirty = gradient(jnp.where(padding, jnp.nan, x), weight, bias, tail)
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)


@each_impl
@pytest.mark.parametrize("length", [1, 5])
def test_dtypes(impl, length):
    x, weight, bias, tail = draw(2, length, 4)
    y, kept = compiled(x.astype(jnp.bfloat16), weight, bias, initial_state=tail, impl=impl)
    assert y.dtype == jnp.bfloat16 and kept.dtype == jnp.bfloat16
    rounded = compiled(
        x.astype(jnp.bfloat16), weight, bias, initial_state=tail.astype(jnp.bfloat16), impl=impl
    )
    jax.tree.map(np.testing.assert_array_equal, (y, kept), rounded)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(value, np.float64)) for value in (x, weight)]
        y, kept = compiled(*wide, impl=impl)
        assert y.dtype == jnp.float64 and kept.dtype == jnp.float64


X = jnp.zeros((2, 3, 4))
WEIGHT = jnp.zeros((4, 4))
BIAS = jnp.zeros(4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"x": X[0]},
            "x has shape (3, 4), rank 2; it must have rank 3: (batch, time, width).",
        ),
        (
            {"x": X[:, :0]},
            "x has shape (2, 0, 4); every size, time included, must be at least 1.",
        ),
        (
            {"weight": WEIGHT[:, :3]},
            "weight has shape (4, 3); it must be (W, D) with x's D = 4.",
        ),
        (
            {"weight": WEIGHT[0]},
            "weight has shape (4,); it must be (W, D) with x's D = 4.",
        ),
        (
            {"weight": WEIGHT[:1]},
            "weight has 1 taps; 2 to 8 are supported; the nearest is 2.",
        ),
        (
            {"weight": jnp.zeros((11, 4))},
            "weight has 11 taps; 2 to 8 are supported; the nearest is 8.",
        ),
        (
            {"bias": BIAS[:3]},
            "bias has shape (3,); it must be (D,) = (4,).",
        ),
        (
            {"x": X.astype(jnp.int32)},
            "x has dtype int32; it must be floating, as float32.",
        ),
        (
            {"weight": WEIGHT.astype(jnp.int32)},
            "weight has dtype int32; it must be floating, as float32.",
        ),
        (
            {"bias": BIAS.astype(jnp.int32)},
            "bias has dtype int32; it must be floating, as float32.",
        ),
        (
            {"initial_state": jnp.zeros((2, 4, 4))},
            "initial_state has shape (2, 4, 4); it must be (B, W-1, D) = (2, 3, 4).",
        ),
        (
            {"initial_state": jnp.zeros((2, 3, 4), jnp.int32)},
            "initial_state has dtype int32; it must be floating, as float32.",
        ),
        (
            {"segments": jnp.ones((2, 4), jnp.int32)},
            "segments has shape (2, 4) and dtype int32; "
            "it must be (2, 3) int32, like the inputs' (B, T).",
        ),
        (
            {"activation": "relu"},
            "activation is 'relu'; it must be none or silu.",
        ),
        (
            {"impl": "fast"},
            "short_conv has no implementation 'fast'; it has ref, xla (or None: chosen).",
        ),
    ],
)
def test_errors_say_what_and_what_instead(arguments, message):
    with pytest.raises(ValueError) as error:
        short_conv(**{"x": X, "weight": WEIGHT, "bias": BIAS} | arguments)
    assert str(error.value) == message
