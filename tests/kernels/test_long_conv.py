"""What is particular to the long convolution; tests/test_kernels.py proves the rest."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kernels.long_conv import cost, fourier, long_conv, xla
from tests.kernels.crossed import crossed
from tests.kernels.packed import SEGMENTS, tokens
from tests.tolerance import assert_close

compiled = jax.jit(long_conv, static_argnames="impl")
IMPLS = ("ref", "xla")
each_impl = pytest.mark.parametrize("impl", IMPLS)
each_form = pytest.mark.parametrize("form", fourier.FORMS)


def draw(batch, length, taps, *, channels=3, seed=0):
    """x, filters, skip and the tail before the row."""
    rng = np.random.default_rng(seed)
    shapes = ((batch, length, channels), (taps, channels), (channels,), (batch, taps - 1, channels))
    return tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)


def brute_force(x, filters, skip, segments, tail):
    """The sum in NumPy float64, with the inputs of every document in a list."""
    x, filters, skip, tail = (np.asarray(value, np.float64) for value in (x, filters, skip, tail))
    taps, y, final = len(filters), np.zeros_like(x), tail.copy()
    for row in range(len(x)):
        seen = list(tail[row])
        for t, starts in tokens(segments[row]):
            if starts:
                seen = [np.zeros_like(skip)] * (taps - 1)
            seen.append(x[row, t])
            y[row, t] = skip * x[row, t] + sum(filters[n] * seen[-1 - n] for n in range(taps))
        final[row] = seen[len(seen) - taps + 1 :]
    return y, final


def by_documents(x, filters, skip, segments):
    """Every document alone, by NumPy's own convolution in float64."""
    x, filters, skip = (np.asarray(value, np.float64) for value in (x, filters, skip))
    y = np.zeros_like(x)
    for row, number in {(b, n) for b in range(len(x)) for n in segments[b] if n}:
        at = np.flatnonzero(segments[row] == number)
        for d in range(x.shape[2]):
            whole = np.convolve(x[row, at, d], filters[:, d])[: len(at)]
            y[row, at, d] = whole + skip[d] * x[row, at, d]
    return y


def cut(rng, batch, length, longest):
    """Documents of random lengths, numbered 1.., with a little padding between them."""
    segments = np.zeros((batch, length), np.int32)
    for row in segments:
        at, number = int(rng.integers(0, 20)), 1
        while at < length:
            tokens = int(rng.integers(1, longest))
            row[at : at + tokens] = number
            at, number = at + tokens + int(rng.integers(0, 3)), number + 1
    return segments


@each_impl
@pytest.mark.parametrize("taps", [2, 5, 14, 40])
def test_equals_a_loop_over_tokens(impl, taps):
    x, filters, skip, tail = draw(len(SEGMENTS), 14, taps)
    given = dict(segments=jnp.asarray(SEGMENTS), initial_state=tail)
    y, final = compiled(x, filters, skip, **given, impl=impl)
    want, want_final = brute_force(x, filters, skip, SEGMENTS, tail)
    assert_close(y, want, "float32", "y")
    np.testing.assert_array_equal(final, want_final.astype(np.float32))
    assert not np.asarray(y)[SEGMENTS == 0].any()


@pytest.mark.parametrize(
    ("form", "size"),
    crossed(
        fourier.FORMS,
        [(700, 700), (700, 17), (700, 33), (1500, 90)],
        gate=[
            ("fft", (700, 700)),
            ("matmul", (700, 17)),
            ("fft", (700, 33)),
            ("matmul", (1500, 90)),
        ],
    ),
)
def test_long_rows_of_documents(monkeypatch, form, size):
    length, taps = size
    monkeypatch.setattr(xla, "_form", lambda: form)
    rng = np.random.default_rng(length + taps)
    run = jax.jit(lambda *given, segments: xla.long_conv(*given, segments=segments))
    for longest in (30, 2 * length):
        segments = cut(rng, 2, length, longest)
        x, filters, skip, _ = draw(2, length, taps)
        y, _ = run(x, filters, skip, segments=segments)
        assert_close(y, by_documents(x, filters, skip, segments), "float32", "y")


@each_form
def test_a_form_has_the_gradients_of_the_other(monkeypatch, form):
    """In float64, against the one-matrix form of the sum."""
    monkeypatch.setattr(xla, "_form", lambda: form)
    length, taps = 300, 285
    segments = cut(np.random.default_rng(0), 2, length, 250)
    same = (segments[:, :, None] == segments[:, None]) & (segments != 0)[:, :, None]
    lags = np.arange(length)[:, None] - np.arange(length)
    mask = same & (lags >= 0) & (lags < taps)

    def dense(x, filters, skip):
        toeplitz = filters[np.clip(lags, 0, taps - 1)]
        y = jnp.einsum("bts,tsd,bsd->btd", mask.astype(x.dtype), toeplitz, x)
        return y + skip * x * (segments != 0)[..., None]

    def chunked(x, filters, skip):
        return xla.long_conv(x, filters, skip, segments=jnp.asarray(segments))[0]

    total = lambda run: lambda *given: jnp.sum(jnp.sin(run(*given)))
    with jax.enable_x64(True):
        arrays = [jnp.asarray(np.asarray(a, np.float64)) for a in draw(2, length, taps)[:3]]
        found = jax.jit(jax.grad(total(chunked), (0, 1, 2)))(*arrays)
        want = jax.jit(jax.grad(total(dense), (0, 1, 2)))(*arrays)
    for a, b, what in zip(found, want, ("dx", "dfilters", "dskip"), strict=True):
        assert_close(a, b, "float64", what)


@pytest.mark.parametrize("size", [2, 32, 1024, 2048, 8192])
def test_the_two_transforms_give_the_same_numbers(size):
    """One matrix up to 1024 points, two beyond; blocks of two documents."""
    rng = np.random.default_rng(size)
    x = rng.normal(size=(2, 2, 3, size // 2, 2))
    taps = rng.normal(size=(2, size, 2))
    documents = jnp.asarray(rng.integers(0, 2, (2, 2, 3)))
    dy = rng.normal(size=x.shape)
    results = []
    for form in fourier.FORMS:

        def run(x, taps, dy, form=form):
            product = lambda x, taps: fourier.toeplitz(x, taps, documents, form)
            y, pullback = jax.vjp(product, x, taps)
            return y, *pullback(dy)

        with jax.enable_x64(True):
            results.append([np.asarray(a) for a in jax.jit(run)(x, taps, dy)])
        single = jax.jit(run)(*(jnp.asarray(a, jnp.float32) for a in (x, taps, dy)))
        for found, want in zip(single, results[-1], strict=True):
            assert_close(found, want, "float32", form)
    for found, want in zip(*results, strict=True):
        assert_close(found, want, "float64", "matmul against fft")


@each_form
def test_no_later_input_and_no_other_document_changes_a_bit(monkeypatch, form):
    monkeypatch.setattr(xla, "_form", lambda: form)
    length, at = 300, 150
    x, filters, skip, _ = draw(2, length, length)
    segments = jnp.asarray(np.repeat([1, 2, 3], 100)[None].repeat(2, 0), jnp.int32)
    run = jax.jit(lambda x, segments: xla.long_conv(x, filters, skip, segments=segments)[0])
    later = x.at[:, at].add(1e6)
    clean, found = (np.asarray(run(value, None)) for value in (x, later))
    np.testing.assert_array_equal(found[:, :at], clean[:, :at])
    assert np.all(found[:, at:] != clean[:, at:])
    clean, found = (np.asarray(run(value, segments)) for value in (x, later))
    others = np.r_[0:at, 200:300]
    np.testing.assert_array_equal(found[:, others], clean[:, others])
    slope = jax.jit(jax.grad(lambda x: jnp.sum(run(x, segments)[:, at])))(x)
    reached = np.flatnonzero(np.abs(np.asarray(slope)).sum((0, 2)))
    np.testing.assert_array_equal(reached, np.arange(100, at + 1))


@pytest.mark.parametrize(
    ("impl", "cut_at"),
    crossed(IMPLS, [1, 16, 60], gate=[("ref", 16), ("xla", 1), ("xla", 16), ("xla", 60)]),
)
def test_two_parts_equal_the_whole_forward_and_backward(impl, cut_at):
    x, filters, skip, tail = draw(2, 61, 50)
    slope, _, _, tail_slope = draw(2, 61, 50, seed=1)

    def whole(x, filters, skip, tail):
        return compiled(x, filters, skip, initial_state=tail, impl=impl)

    def parts(x, filters, skip, tail):
        first, tail = whole(x[:, :cut_at], filters, skip, tail)
        second, tail = whole(x[:, cut_at:], filters, skip, tail)
        return jnp.concatenate([first, second], axis=1), tail

    def value_and_gradients(function):
        def run(*arguments):
            outputs, pullback = jax.vjp(function, *arguments)
            return *outputs, *pullback((slope, tail_slope))

        return jax.jit(run)(x, filters, skip, tail)

    names = ("y", "tail", "dx", "dfilters", "dskip", "dtail")
    for found, want, what in zip(*map(value_and_gradients, (parts, whole)), names, strict=True):
        assert_close(found, want, "float32", what)


@each_impl
def test_token_by_token_equals_the_whole(impl):
    x, filters, skip, tail = draw(2, 40, 30)
    want, want_tail = compiled(x, filters, skip, initial_state=tail, impl=impl)
    step = jax.jit(lambda x, tail: long_conv(x, filters, skip, initial_state=tail, impl=impl))
    for t in range(40):
        y, tail = step(x[:, t : t + 1], tail)
        assert_close(y[:, 0], want[:, t], "float32", f"token {t}")
    np.testing.assert_array_equal(tail, want_tail)


@pytest.mark.parametrize(
    ("impl", "taps", "length"),
    crossed(
        IMPLS,
        [1, 20],
        [1, 30],
        gate=[("ref", 1, 1), ("ref", 20, 30), ("xla", 1, 30), ("xla", 20, 1), ("xla", 20, 30)],
    ),
)
def test_no_state_means_zeros_and_no_skip_means_zero(impl, taps, length):
    x, filters, skip, tail = draw(2, length, taps)
    for segments in (None, jnp.asarray(cut(np.random.default_rng(1), 2, length, 9))):
        found = compiled(x, filters, segments=segments, impl=impl)
        zeros = dict(initial_state=jnp.zeros_like(tail), segments=segments)
        want = compiled(x, filters, jnp.zeros_like(skip), **zeros, impl=impl)
        assert_close(found[0], want[0], "float32", "y")
        np.testing.assert_array_equal(found[1], want[1])


@each_impl
def test_nan_at_padding_reaches_nothing(impl):
    x, filters, skip, tail = draw(len(SEGMENTS), 14, 20)
    padding = jnp.asarray(SEGMENTS == 0)[..., None]

    def total(x, filters, skip, tail):
        given = dict(segments=jnp.asarray(SEGMENTS), initial_state=tail)
        y, tail = compiled(x, filters, skip, **given, impl=impl)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(tail))

    gradient = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3)))
    clean = gradient(x, filters, skip, tail)
    dirty = gradient(jnp.where(padding, jnp.nan, x), filters, skip, tail)
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)


@jax.jit
@functools.partial(jax.grad, argnums=(0, 1))
def channel_gradient(x, filters):
    return jnp.sum(jnp.sin(long_conv(x, filters, jnp.ones(filters.shape[1]))[0]))


@pytest.mark.parametrize("spec", [P("data"), P(None, None, "data")], ids=["rows", "channels"])
def test_rows_and_channels_stay_on_their_devices(spec):
    """XLA would gather a transform's input; and a `vmap` equals a loop."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x, filters, _, _ = draw(4, 100, 100, channels=8)
    gradient = channel_gradient
    filter_spec = P(*spec[1:])
    placed = [
        jax.device_put(a, NamedSharding(mesh, s)) for a, s in ((x, spec), (filters, filter_spec))
    ]
    program = gradient.lower(*placed).compile()
    assert "all-gather" not in program.as_text() and "all-to-all" not in program.as_text()
    for found, want in zip(program(*placed), gradient(x, filters), strict=True):
        assert_close(found, want, "float32", "gradient")


def test_vmap_equals_a_loop():
    x, filters, _, _ = draw(6, 50, 50)
    x = x.reshape(3, 2, 50, 3)
    mapped = jax.jit(jax.vmap(lambda x: long_conv(x, filters)[0]))(x)
    for one, y in zip(x, mapped, strict=True):
        assert_close(y, compiled(one, filters)[0], "float32", "y")


@each_impl
@pytest.mark.parametrize("length", [1, 20])
def test_dtypes(impl, length):
    x, filters, skip, tail = draw(2, length, 18)
    y, kept = compiled(x.astype(jnp.bfloat16), filters, skip, initial_state=tail, impl=impl)
    assert y.dtype == jnp.bfloat16 and kept.dtype == jnp.bfloat16
    rounded = tail.astype(jnp.bfloat16)
    again = compiled(x.astype(jnp.bfloat16), filters, skip, initial_state=rounded, impl=impl)
    jax.tree.map(np.testing.assert_array_equal, (y, kept), again)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(value, np.float64)) for value in (x, filters)]
        y, kept = compiled(*wide, impl=impl)
        assert y.dtype == jnp.float64 and kept.dtype == jnp.float64


def test_cost_is_the_cheaper_of_the_sum_and_of_three_transforms():
    x, filters, skip, tail = draw(2, 6, 4)
    assert cost.long_conv(x, filters) == 2 * 2 * 3 * (1 + 2 + 3 + 4 + 4 + 4)
    assert cost.long_conv(x, filters, skip) == 2 * 2 * 3 * 18 + 2 * 2 * 6 * 3
    assert cost.long_conv(x, filters, initial_state=tail) == 2 * 2 * 3 * 6 * 4
    x, filters, _, _ = draw(2, 4096, 4096)
    assert cost.long_conv(x, filters) == 3 * (5 * 2.5 * 8192 * 13 + 2 * 3 * 8192)


X, FILTERS = jnp.zeros((2, 3, 4)), jnp.zeros((5, 4))
FAULTS = [
    ({"x": X[0]}, "x has shape (3, 4), rank 2; it must have rank 3: (batch, time, width)."),
    ({"x": X[:, :0]}, "x has shape (2, 0, 4); every size, time included, must be at least 1."),
    (
        {"filters": FILTERS[:, :3]},
        "filters has shape (5, 3); it must be (L, D) with L at least 1 and x's D = 4.",
    ),
    (
        {"filters": FILTERS[:0]},
        "filters has shape (0, 4); it must be (L, D) with L at least 1 and x's D = 4.",
    ),
    (
        {"filters": FILTERS[0]},
        "filters has shape (4,); it must be (L, D) with L at least 1 and x's D = 4.",
    ),
    ({"skip": jnp.zeros(3)}, "skip has shape (3,); it must be (D,) = (4,)."),
    ({"x": X.astype(int)}, "x has dtype int32; it must be floating, as float32."),
    ({"filters": FILTERS.astype(int)}, "filters has dtype int32; it must be floating, as float32."),
    ({"skip": jnp.zeros(4, int)}, "skip has dtype int32; it must be floating, as float32."),
    (
        {"initial_state": jnp.zeros((2, 5, 4))},
        "initial_state has shape (2, 5, 4); it must be (B, L-1, D) = (2, 4, 4).",
    ),
    (
        {"initial_state": jnp.zeros((2, 4, 4), int)},
        "initial_state has dtype int32; it must be floating, as float32.",
    ),
    (
        {"segments": jnp.ones((2, 4), jnp.int32)},
        "segments has shape (2, 4) and dtype int32; "
        "it must be (2, 3) int32, like the inputs' (B, T).",
    ),
    ({"impl": "fast"}, "long_conv has no implementation 'fast'; it has ref, xla"),
]


@pytest.mark.parametrize(("fault", "message"), FAULTS)
def test_faults(fault, message):
    good = {"x": X, "filters": FILTERS}
    long_conv(**good)
    with pytest.raises(ValueError) as error:
        long_conv(**good | fault)
    assert message in str(error.value) and "\n" not in str(error.value)
