"""What is particular to the real diagonal recurrence; tests/test_kernels.py proves the rest."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels import setting
from kernels.linear_scan import linear_scan, pallas_tpu
from tests.kernels import packed
from tests.kernels.crossed import crossed
from tests.kernels.launches import costs
from tests.tolerance import assert_close

compiled = jax.jit(linear_scan, static_argnames="impl")
IMPLS = ("ref", "xla", "pallas_tpu")
each_impl = pytest.mark.parametrize("impl", IMPLS)
pytestmark = pytest.mark.usefixtures("interpreter")
SEGMENTS = packed.SEGMENTS[:3]


def draw(shape, seed=0):
    rng = np.random.default_rng(seed)
    x, state = rng.normal(size=shape), rng.normal(size=(shape[0], shape[2]))
    log_decay = -rng.gamma(1.0, 0.3, shape)
    return tuple(jnp.asarray(value, jnp.float32) for value in (x, log_decay, state))


def brute_force(x, log_decay, segments, state):
    """The recurrence in NumPy float64, a token of a row at a time."""
    x, log_decay, state = (np.asarray(value, np.float64) for value in (x, log_decay, state))
    h, final = np.zeros_like(x), state.copy()
    for row in range(x.shape[0]):
        current = state[row]
        for t, starts in packed.tokens(segments[row]):
            if starts:
                current = np.zeros_like(current)
            current = np.exp(log_decay[row, t]) * current + x[row, t]
            h[row, t] = current
        final[row] = current
    return h, final


@each_impl
def test_equals_a_loop_over_tokens(impl):
    x, log_decay, state = draw((3, 14, 5))
    h, final = compiled(
        x, log_decay, segments=jnp.asarray(SEGMENTS), initial_state=state, impl=impl
    )
    want, want_final = brute_force(x, log_decay, SEGMENTS, state)
    assert_close(h, want, "float32", "h")
    assert_close(final, want_final, "float32", "final state")
    np.testing.assert_array_equal(final[2], state[2])


@pytest.mark.parametrize(
    ("impl", "cut"),
    crossed(
        IMPLS,
        [1, 16, 36],
        gate=[("ref", 1), ("xla", 16), ("xla", 36), ("pallas_tpu", 1), ("pallas_tpu", 16)],
    ),
)
def test_two_parts_equal_the_whole_forward_and_backward(impl, cut):
    x, log_decay, state = draw((2, 37, 5))
    slope, final_slope, _ = draw((2, 37, 5), seed=1)

    def whole(x, log_decay, state):
        return compiled(x, log_decay, initial_state=state, impl=impl)

    def parts(x, log_decay, state):
        first, state = whole(x[:, :cut], log_decay[:, :cut], state)
        second, state = whole(x[:, cut:], log_decay[:, cut:], state)
        return jnp.concatenate([first, second], axis=1), state

    def value_and_gradients(function):
        def run(*arguments):
            outputs, pullback = jax.vjp(function, *arguments)
            return outputs, pullback((slope, final_slope[:, 0]))

        return jax.jit(run)

    results = []
    for function in (whole, parts):
        outputs, gradients = value_and_gradients(function)(x, log_decay, state)
        results.append((*outputs, *gradients))
    for found, want, what in zip(*results, ("h", "state", "dx", "dg", "dstate"), strict=True):
        assert_close(found, want, "float32", what)


@each_impl
def test_token_by_token_equals_the_whole(impl):
    x, log_decay, state = draw((2, 9, 5))
    want, want_final = compiled(x, log_decay, initial_state=state, impl=impl)
    step = jax.jit(lambda x, g, state: compiled(x, g, initial_state=state, impl=impl))
    for t in range(9):
        h, state = step(x[:, t : t + 1], log_decay[:, t : t + 1], state)
        assert_close(h[:, 0], want[:, t], "float32", f"token {t}")
    assert_close(state, want_final, "float32", "final state")


@each_impl
def test_packed_documents_equal_separate_ones_forward_and_backward(impl):
    lengths = (12, 1, 12, 12, 1)
    edges = np.cumsum((0, *lengths))
    x, log_decay, _ = draw((1, int(edges[-1]), 5))
    segments = jnp.asarray(np.repeat(np.arange(1, 6), lengths)[None], jnp.int32)

    def total(x, log_decay, pieces):
        """A loss that sees every token and the last state of the row."""
        values = []
        for start, end in pieces:
            packed = segments[:, start:end] if len(pieces) == 1 else None
            h, final = compiled(
                x[:, start:end], log_decay[:, start:end], segments=packed, impl=impl
            )
            values.append(jnp.sum(jnp.sin(h)))
        return sum(values) + jnp.sum(jnp.cos(final))

    documents = tuple(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))
    gradient = jax.jit(jax.grad(total, argnums=(0, 1)), static_argnums=2)
    packed = gradient(x, log_decay, ((0, int(edges[-1])),))
    separate = gradient(x, log_decay, documents)
    for found, want, what in zip(packed, separate, ("dx", "dg"), strict=True):
        assert_close(found, want, "float32", what)
    starts = edges[:-1]
    np.testing.assert_array_equal(np.asarray(packed[1])[:, starts], 0)


@each_impl
def test_no_state_means_zeros(impl):
    x, log_decay, state = draw((2, 6, 5))
    found = compiled(x, log_decay, impl=impl)
    want = compiled(x, log_decay, initial_state=jnp.zeros_like(state), impl=impl)
    jax.tree.map(np.testing.assert_array_equal, found, want)


@each_impl
@pytest.mark.parametrize("length", [1, 6])
def test_a_decay_of_minus_infinity_forgets_and_has_slope_zero(impl, length):
    x, _, state = draw((2, length, 5))
    never = jnp.full_like(x, -jnp.inf)

    def total(x, log_decay, state):
        h, final = compiled(x, log_decay, initial_state=state, impl=impl)
        return jnp.sum(h) + jnp.sum(final)

    h, final = compiled(x, never, initial_state=state, impl=impl)
    np.testing.assert_array_equal(h, x)
    np.testing.assert_array_equal(final, x[:, -1])
    _, dlog_decay, dstate = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(x, never, state)
    np.testing.assert_array_equal(dlog_decay, 0)
    np.testing.assert_array_equal(dstate, 0)


@each_impl
def test_nan_at_padding_reaches_nothing(impl):
    x, log_decay, state = draw((3, 14, 5))
    padding = jnp.asarray(SEGMENTS == 0)[..., None]

    def total(x, log_decay, state):
        h, final = compiled(
            x, log_decay, segments=jnp.asarray(SEGMENTS), initial_state=state, impl=impl
        )
        return jnp.sum(jnp.sin(h)) + jnp.sum(jnp.cos(final))

    gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    clean = gradient(x, log_decay, state)
    dirty = gradient(jnp.where(padding, jnp.nan, x), jnp.where(padding, jnp.nan, log_decay), state)
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)


@each_impl
@pytest.mark.parametrize("length", [1, 5])
def test_dtypes(impl, length):
    x, log_decay, _ = draw((2, length, 5))
    function = functools.partial(linear_scan, impl=impl)
    h, final = jax.eval_shape(function, x.astype(jnp.bfloat16), log_decay)
    assert h.dtype == jnp.bfloat16 and final.dtype == jnp.float32
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(value, np.float64)) for value in (x, log_decay)]
        h, final = jax.eval_shape(function, *wide)
        assert h.dtype == jnp.float64 and final.dtype == jnp.float64


def test_works_inside_shard_map():
    """A state that is the same on all devices, or none, comes to vary as the tokens do."""
    x, log_decay, state = draw((4, 9, 5))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def total(x, log_decay, state, wrap):
        def one(x, log_decay, state):
            first = linear_scan(x, log_decay, initial_state=state[None] + x[:, 0], impl="xla")
            return *first, *linear_scan(x, log_decay, impl="xla")

        return sum(jnp.sum(jnp.sin(out)) for out in wrap(one)(x, log_decay, state))

    rows = P("data")
    over = lambda f: jax.shard_map(f, mesh=mesh, in_specs=(rows, rows, P()), out_specs=(rows,) * 4)
    gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)), static_argnums=3)
    found = gradient(x, log_decay, state[0], over)
    want = gradient(x, log_decay, state[0], lambda f: f)
    for name, mine, expected in zip(("dx", "dg", "dstate"), found, want, strict=True):
        assert_close(mine, expected, "float32", name)


def test_costs_of_tpu_launches_are_the_formulas():
    """By hand, a token and channel: 11 FLOPs of eight rows doubled and joined, bytes of copies."""
    batch, length, width = 2, 512, 1024
    shape = (batch, length, width)
    arguments = {
        "x": jax.ShapeDtypeStruct(shape, jnp.bfloat16),
        "log_decay": jax.ShapeDtypeStruct(shape, jnp.float32),
        "initial_state": jax.ShapeDtypeStruct((batch, width), jnp.float32),
    }
    forward, backward = costs(linear_scan, arguments)
    tokens, state = batch * length * width, 4 * batch * width
    entering = length // pallas_tpu.LONGEST * state
    # Backward: again, products with slopes, doubled and joined, the slopes' sum and the gates'.
    assert forward.flops == 11 * tokens
    assert backward.flops == (11 + 1 + 11 + 1 + 1) * tokens
    assert (forward.transcendentals, backward.transcendentals) == (tokens, 2 * tokens)
    assert forward.bytes_accessed == (2 + 4 + 2) * tokens + 2 * state + entering
    assert backward.bytes_accessed == (2 + 4 + 2 + 2 + 4) * tokens + 2 * state + entering


def test_short_rows_have_two_tpu_blocks():
    found = [pallas_tpu.chunk_length(n) for n in (1, 16, 20, 37, 130, 512, 4096)]
    assert found == [16, 16, 16, 32, 128, 256, 256]


def test_float64_on_a_tpu_is_named():
    message = "linear_scan as pallas_tpu does not cover float64; the nearest dtype is float32; "
    with jax.enable_x64(True), setting.interpreting(None), pytest.raises(ValueError) as error:
        pallas_tpu.linear_scan(jnp.ones((1, 3, 2)), jnp.zeros((1, 3, 2)))
    assert str(error.value) == message + "or use xla."


X = jnp.zeros((2, 3, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"x": X[0]},
            "x has shape (3, 4), rank 2; it must have rank 3: (batch, time, width).",
        ),
        (
            {"x": X[:, :0], "log_decay": X[:, :0]},
            "x has shape (2, 0, 4); every size, time included, must be at least 1.",
        ),
        (
            {"log_decay": X[..., :3]},
            "log_decay has shape (2, 3, 3); it must be x's shape, (2, 3, 4).",
        ),
        (
            {"x": X.astype(jnp.int32)},
            "x has dtype int32; it must be floating, as float32.",
        ),
        (
            {"log_decay": X.astype(jnp.int32)},
            "log_decay has dtype int32; it must be floating, as float32.",
        ),
        (
            {"initial_state": X[:, 0, :2]},
            "initial_state has shape (2, 2); it must be (B, D) = (2, 4).",
        ),
        (
            {"initial_state": X[:, 0].astype(jnp.int32)},
            "initial_state has dtype int32; it must be floating, as float32.",
        ),
        (
            {"segments": jnp.ones((2, 4), jnp.int32)},
            "segments has shape (2, 4) and dtype int32; "
            "it must be (2, 3) int32, like the inputs' (B, T).",
        ),
        (
            {"impl": "fast"},
            "linear_scan has no implementation 'fast'; it has ref, xla, pallas_tpu "
            "(or None: chosen).",
        ),
    ],
)
def test_errors_say_what_and_what_instead(arguments, message):
    with pytest.raises(ValueError) as error:
        linear_scan(**{"x": X, "log_decay": X} | arguments)
    assert str(error.value) == message
