"""What is particular to the complex diagonal recurrence; tests/test_kernels.py proves the rest."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels.linear_scan import complex_linear_scan, linear_scan, pallas_tpu
from kernels.linear_scan.rotation import cos_and_sin, one_part, two_parts
from tests.kernels import packed
from tests.kernels.crossed import crossed
from tests.kernels.launches import costs
from tests.tolerance import assert_close

compiled = jax.jit(complex_linear_scan, static_argnames="impl")
real_scan = jax.jit(linear_scan, static_argnames="impl")
each_impl = pytest.mark.parametrize("impl", ("ref", "xla", "pallas_tpu"))
each_kind = pytest.mark.parametrize("constant", (True, False), ids=("constant", "per-step"))
IMPLS, KINDS = ("ref", "xla", "pallas_tpu"), ("constant", "per-step")
NAMES = ("dx_real", "dx_imag", "dlog_decay", "dphase", "dstate")
pytestmark = pytest.mark.usefixtures("interpreter")
SEGMENTS = packed.SEGMENTS[:3]


def draw(batch, length, width, constant, seed=0):
    """(x_real, x_imag, log_decay, phase, state) in float32."""
    rng = np.random.default_rng(seed)
    shape = (batch, length, width)
    steps = (width,) if constant else shape
    values = (
        *rng.normal(size=(2, *shape)),
        -rng.gamma(0.5, 0.1, steps),
        rng.uniform(-np.pi, 2 * np.pi, steps),
        rng.normal(size=(batch, 2, width)),
    )
    return tuple(jnp.asarray(value, jnp.float32) for value in values)


def brute_force(x_real, x_imag, log_decay, phase, state, segments):
    """The recurrence in NumPy complex128, a token of a row at a time: (h, final state)."""
    given = (x_real, x_imag, log_decay, phase, state)
    x_real, x_imag, log_decay, phase, state = (np.asarray(a, np.float64) for a in given)
    x = x_real + 1j * x_imag
    factor = np.broadcast_to(np.exp(log_decay + 1j * phase), x.shape)
    h, final = np.zeros_like(x), state[:, 0] + 1j * state[:, 1]
    for row in range(x.shape[0]):
        current = final[row]
        for t, starts in packed.tokens(segments[row]):
            if starts:
                current = np.zeros_like(current)
            h[row, t] = current = factor[row, t] * current + x[row, t]
        final[row] = current
    return (h.real, h.imag), np.stack([final.real, final.imag], axis=1)


@functools.partial(jax.jit, static_argnames="impl")
def value_and_gradients(arguments, segments=None, impl="xla"):
    """(outputs, gradients) for random cotangents."""
    function = functools.partial(scan, segments=segments, impl=impl)
    outputs, pullback = jax.vjp(function, *arguments)
    rng = np.random.default_rng(5)
    slopes = jax.tree.map(lambda o: jnp.asarray(rng.normal(size=o.shape), o.dtype), outputs)
    return jax.tree.leaves(outputs), pullback(slopes)


def scan(x_real, x_imag, log_decay, phase, state, **options):
    return compiled(x_real, x_imag, log_decay, phase, initial_state=state, **options)


@each_impl
@each_kind
def test_equals_a_loop_over_complex_numbers(impl, constant):
    arguments = draw(3, 14, 5, constant)
    h, final = scan(*arguments, segments=jnp.asarray(SEGMENTS), impl=impl)
    want, want_final = brute_force(*arguments, SEGMENTS)
    assert_close(h[0], want[0], "float32", "real h")
    assert_close(h[1], want[1], "float32", "imaginary h")
    assert_close(final, want_final, "float32", "final state")
    np.testing.assert_array_equal(final[2], arguments[-1][2])


@each_impl
def test_constant_factors_equal_the_same_at_every_step(impl):
    x_real, x_imag, log_decay, phase, state = draw(3, 14, 5, constant=True)
    steps = [np.broadcast_to(a, x_real.shape) for a in (log_decay, phase)]
    outputs, slopes = value_and_gradients(
        (x_real, x_imag, log_decay, phase, state), SEGMENTS, impl=impl
    )
    repeated, parts = value_and_gradients((x_real, x_imag, *steps, state), SEGMENTS, impl=impl)
    for found, want in zip(outputs, repeated, strict=True):
        assert_close(found, want, "float32", "output")
    for name, found, part in zip(NAMES, slopes, parts, strict=True):
        want = np.asarray(part).sum((0, 1)) if found.ndim == 1 else part
        assert_close(found, want, "float32", name)


@each_impl
@each_kind
def test_without_turning_it_is_two_real_recurrences(impl, constant):
    x_real, x_imag, log_decay, _, state = draw(2, 9, 5, constant)
    h, final = scan(x_real, x_imag, log_decay, jnp.zeros_like(log_decay), state, impl=impl)
    for n, x in enumerate((x_real, x_imag)):
        steps = jnp.broadcast_to(log_decay, x.shape)
        want, want_final = real_scan(x, steps, initial_state=state[:, n], impl="ref")
        assert_close(h[n], want, "float32", "h")
        assert_close(final[:, n], want_final, "float32", "final state")


@pytest.mark.parametrize(
    ("run", "kind"),
    crossed(
        [("xla", 1500), ("xla", 6000), ("pallas_tpu", 6000)],
        KINDS,
        gate=[
            (("xla", 1500), "constant"),
            (("xla", 6000), "per-step"),
            (("pallas_tpu", 6000), "constant"),
        ],
    ),
)
def test_thousands_of_steps_do_not_drift(run, kind):
    """Channels that never forget, against float64: values and slopes, of the phase above all."""
    impl, length = run
    x_real, x_imag, log_decay, phase, state = draw(1, length, 24, kind == "constant", seed=7)
    log_decay = log_decay * jnp.tile(jnp.asarray([0.0, 1e-4, 1e-2]), 8)
    narrow = (x_real, x_imag, log_decay, phase, state)
    outputs, slopes = value_and_gradients(narrow, impl=impl)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a, np.float64)) for a in narrow]
        want, want_slopes = value_and_gradients(wide, impl="ref")
    for found, exact in zip(outputs, want, strict=True):
        assert_close(found, exact, "float32", "output")
    for name, found, exact in zip(NAMES, slopes, want_slopes, strict=True):
        assert_close(found, exact, "float32", name)


@pytest.mark.parametrize(
    ("impl", "kind", "cut"),
    crossed(
        IMPLS,
        KINDS,
        [1, 8],
        gate=[
            ("ref", "constant", 8),
            ("xla", "constant", 1),
            ("xla", "per-step", 8),
            ("pallas_tpu", "constant", 8),
            ("pallas_tpu", "per-step", 1),
        ],
    ),
)
def test_two_parts_and_single_tokens_equal_the_whole(impl, kind, cut):
    constant = kind == "constant"
    x_real, x_imag, log_decay, phase, state = draw(2, 9, 5, constant)
    want, want_final = scan(x_real, x_imag, log_decay, phase, state, impl=impl)
    edges = [0, *range(cut, 9, cut), 9]
    pieces = []
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        part = (slice(None), slice(start, end))
        steps = (a if constant else a[part] for a in (log_decay, phase))
        h, state = scan(x_real[part], x_imag[part], *steps, state, impl=impl)
        pieces.append(h)
    for n in range(2):
        joined = np.concatenate([np.asarray(piece[n]) for piece in pieces], axis=1)
        assert_close(joined, want[n], "float32", "h")
    assert_close(state, want_final, "float32", "final state")


@pytest.mark.parametrize(
    ("impl", "kind", "length"),
    crossed(
        IMPLS,
        KINDS,
        [1, 6],
        gate=[
            ("ref", "per-step", 6),
            ("xla", "constant", 6),
            ("xla", "per-step", 1),
            ("pallas_tpu", "constant", 1),
            ("pallas_tpu", "per-step", 6),
        ],
    ),
)
def test_a_decay_of_minus_infinity_forgets_and_has_slope_zero(impl, kind, length):
    x_real, x_imag, log_decay, phase, state = draw(2, length, 5, kind == "constant")
    never = jnp.full_like(log_decay, -jnp.inf)
    outputs, slopes = value_and_gradients((x_real, x_imag, never, phase, state), impl=impl)
    np.testing.assert_array_equal(outputs[0], x_real)
    np.testing.assert_array_equal(outputs[1], x_imag)
    for slope in slopes[2:]:
        np.testing.assert_array_equal(slope, 0)


@each_impl
def test_nan_at_padding_reaches_nothing(impl):
    arguments = draw(3, 14, 5, constant=False)
    padding = jnp.asarray(SEGMENTS == 0)[..., None]
    dirty = [jnp.where(padding, jnp.nan, a) for a in arguments[:4]]
    clean = value_and_gradients(arguments, SEGMENTS, impl=impl)
    found = value_and_gradients((*dirty, arguments[4]), SEGMENTS, impl=impl)
    jax.tree.map(np.testing.assert_array_equal, found, clean)
    assert not np.any(np.asarray(found[1][2])[SEGMENTS == 0])


@each_impl
@each_kind
@pytest.mark.parametrize("length", [1, 5])
def test_dtypes(impl, constant, length):
    x_real, x_imag, log_decay, phase, _ = draw(2, length, 5, constant)
    half = (x_real.astype(jnp.bfloat16), x_imag.astype(jnp.bfloat16))
    function = functools.partial(complex_linear_scan, impl=impl)
    h, final = jax.eval_shape(function, *half, log_decay, phase)
    assert [part.dtype for part in h] == [jnp.bfloat16] * 2 and final.dtype == jnp.float32
    with jax.enable_x64(True):
        wide = [np.asarray(a, np.float64) for a in (x_real, x_imag, log_decay, phase)]
        h, final = jax.eval_shape(function, *wide)
        assert [part.dtype for part in h] == [jnp.float64] * 2 and final.dtype == jnp.float64


# Without jit every operation is rounded for itself, as on devices without a fused multiply-add.
each_rounding = pytest.mark.parametrize("wrap", (jax.jit, lambda f: f), ids=("fused", "plain"))


@each_rounding
@pytest.mark.parametrize("largest", [1e-3, 3.0, 10.0, 1e3])
def test_cosines_and_sines_are_exact_to_a_unit_in_the_last_place(largest, wrap):
    phase = np.random.default_rng(0).uniform(-largest, largest, 100_000).astype(np.float32)
    cos, sin = wrap(cos_and_sin)(jnp.asarray(phase))
    np.testing.assert_allclose(cos, np.cos(phase.astype(np.float64)), rtol=0, atol=1.2e-7)
    np.testing.assert_allclose(sin, np.sin(phase.astype(np.float64)), rtol=0, atol=1.2e-7)


@each_rounding
@pytest.mark.parametrize("largest", [1e-3, 3.0, 10.0, 256.0])
@pytest.mark.parametrize("decay", [0.0, 1e-4, 0.49, 0.51, 20.0])
def test_two_parts_hold_more_than_one(largest, decay, wrap):
    rng = np.random.default_rng(0)
    phase = rng.uniform(-largest, largest, 10_000).astype(np.float32)
    log_decay = (-decay * rng.uniform(0.99, 1, 10_000)).astype(np.float32)
    given = (jnp.asarray(log_decay), jnp.asarray(phase))
    factor = wrap(two_parts)(*given)
    coarse, fine = (np.float64(a) + 1j * np.float64(b) for a, b in (factor[:2], factor[2:]))
    want = np.exp(np.float64(log_decay) + 1j * np.float64(phase))
    # An error e in a factor of size f turns the state by e / (1 - f) while it is remembered.
    limit = 2e-9 + 3e-7 * min(decay, 1)
    assert np.abs(coarse + fine - want).max() < limit
    np.testing.assert_array_equal(coarse * 1024, np.round(coarse * 1024))
    one = wrap(one_part)(*given)
    assert np.abs(np.float64(one.real) + 1j * np.float64(one.imag) - want).max() < 2e-7


def test_works_inside_shard_map():
    """Factors that are the same on all devices get the sum of the devices' gradients."""
    x_real, x_imag, log_decay, phase, _ = draw(4, 9, 5, constant=True)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def total(arguments, wrap):
        def one(*arguments):
            h, final = complex_linear_scan(*arguments, impl="xla")
            return *h, final

        return sum(jnp.sum(jnp.sin(out)) for out in wrap(one)(*arguments))

    rows = P("data")
    specs = (rows, rows, P(), P())
    over = lambda f: jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=(rows,) * 3)
    arguments = (x_real, x_imag, log_decay, phase)
    found = jax.jit(lambda a: jax.grad(total)(a, over))(arguments)
    want = jax.jit(lambda a: jax.grad(total)(a, lambda f: f))(arguments)
    for name, mine, expected in zip(NAMES[:4], found, want, strict=True):
        assert_close(mine, expected, "float32", name)


@each_kind
def test_costs_of_tpu_launches_are_the_formulas(constant):
    """Bytes by hand: constant factors are a table of eight rows, copied once a part and row."""
    batch, length, width = 2, 512, 1024
    shape = (batch, length, width)
    gate = jax.ShapeDtypeStruct((width,) if constant else shape, jnp.float32)
    token = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    arguments = dict(x_real=token, x_imag=token, log_decay=gate, phase=gate)
    arguments["initial_state"] = jax.ShapeDtypeStruct((batch, 2, width), jnp.float32)
    forward, backward = costs(complex_linear_scan, arguments)
    tokens, state = batch * length * width, 8 * batch * width
    entering, table = length // pallas_tpu.LONGEST * state, 4 * batch * 8 * width
    gates, slopes = (table, 2 * table) if constant else (8 * tokens, 8 * tokens)
    assert forward.bytes_accessed == 8 * tokens + gates + 2 * state + entering
    assert backward.bytes_accessed == 12 * tokens + gates + slopes + 2 * state + entering
    # Real FLOPs of complex ones: doubling 3 x (8 + 6), joining 8; and the two-part step a tile.
    ours = 42 + 8 + 16 / 8 if constant else 42 + 8 + 2 + 28
    assert forward.flops == ours * tokens
    assert forward.transcendentals == (0 if constant else tokens)


X, D = jnp.zeros((2, 3, 4)), jnp.zeros(4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"x_real": X[0]},
            "x_real has shape (3, 4), rank 2; it must have rank 3: (batch, time, width).",
        ),
        (
            {"x_real": X[:0]},
            "x_real has shape (0, 3, 4); every size, time included, must be at least 1.",
        ),
        (
            {"x_real": X.astype(jnp.complex64)},
            "x_real has dtype complex64; it must be floating, as float32.",
        ),
        (
            {"x_imag": X[:, :2]},
            "x_imag has shape (2, 2, 4); it must be x_real's shape, (2, 3, 4).",
        ),
        (
            {"x_imag": X.astype(jnp.int32)},
            "x_imag has dtype int32; it must be floating, as float32.",
        ),
        (
            {"log_decay": D[:3]},
            "log_decay has shape (3,); it must be x_real's shape, (2, 3, 4), or, "
            "constant over time, (4,).",
        ),
        (
            {"log_decay": D.astype(jnp.int32)},
            "log_decay has dtype int32; it must be floating, as float32.",
        ),
        (
            {"phase": X},
            "phase has shape (2, 3, 4); it must be log_decay's shape, (4,).",
        ),
        (
            {"phase": D.astype(jnp.int32)},
            "phase has dtype int32; it must be floating, as float32.",
        ),
        (
            {"initial_state": X[:, 0]},
            "initial_state has shape (2, 4); it must be (B, 2, D) = (2, 2, 4).",
        ),
        (
            {"initial_state": X[:, :2].astype(jnp.int32)},
            "initial_state has dtype int32; it must be floating, as float32.",
        ),
        (
            {"segments": jnp.ones((2, 3))},
            "segments has shape (2, 3) and dtype float32; "
            "it must be (2, 3) int32, like the inputs' (B, T).",
        ),
        (
            {"impl": "fast"},
            "complex_linear_scan has no implementation 'fast'; it has ref, xla, pallas_tpu "
            "(or None: chosen).",
        ),
    ],
)
def test_errors_say_what_and_what_instead(arguments, message):
    with pytest.raises(ValueError) as error:
        complex_linear_scan(**{"x_real": X, "x_imag": X, "log_decay": D, "phase": D} | arguments)
    assert str(error.value) == message
