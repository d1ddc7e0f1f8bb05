"""What is particular to the selective scan; tests/test_kernels.py proves the rest."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from kernels import setting
from kernels.linear_scan import linear_scan
from kernels.selective_scan import pallas_tpu, selective_scan
from tests.kernels import packed
from tests.kernels.crossed import crossed
from tests.kernels.launches import costs
from tests.tolerance import assert_close

compiled = jax.jit(selective_scan, static_argnames="impl")
IMPLS = ("ref", "xla", "pallas_tpu")
each_impl = pytest.mark.parametrize("impl", IMPLS)
NAMES = ("x", "dt", "A", "Bm", "Cm", "D", "initial_state")
pytestmark = pytest.mark.usefixtures("interpreter")
SEGMENTS = packed.SEGMENTS[:3]


def draw(batch, length, width=5, state=3, seed=0):
    """Arguments by name, in float32."""
    rng = np.random.default_rng(seed)
    values = (
        rng.normal(size=(batch, length, width)),
        rng.gamma(1.0, 0.2, (batch, length, width)),
        -rng.uniform(0.1, 4, (width, state)),
        rng.normal(size=(batch, length, state)),
        rng.normal(size=(batch, length, state)),
        rng.normal(size=width),
        rng.normal(size=(batch, width, state)),
    )
    return {n: jnp.asarray(v, jnp.float32) for n, v in zip(NAMES, values, strict=True)}


def brute_force(arguments, segments):
    """The recurrence in NumPy float64, a token of a row at a time."""
    given = (np.asarray(arguments[name], np.float64) for name in NAMES)
    x, dt, A, Bm, Cm, D, state = given
    y, final = np.zeros_like(x), state.copy()
    for row in range(x.shape[0]):
        current = state[row]
        for t, starts in packed.tokens(segments[row]):
            if starts:
                current = np.zeros_like(current)
            current = np.exp(dt[row, t][:, None] * A) * current
            current += np.outer(dt[row, t] * x[row, t], Bm[row, t])
            y[row, t] = current @ Cm[row, t] + D * x[row, t]
        final[row] = current
    return y, final


def value_and_gradients(function, arguments, seed=5):
    """(outputs, gradients by name) for random cotangents."""
    outputs, pullback = jax.vjp(lambda given: function(**given), arguments)
    rng = np.random.default_rng(seed)
    slopes = jax.tree.map(lambda o: jnp.asarray(rng.normal(size=o.shape), o.dtype), outputs)
    return outputs, pullback(slopes)[0]


@functools.partial(jax.jit, static_argnames="impl")
def evaluate(arguments, segments=None, impl="xla"):
    """`value_and_gradients` of an implementation."""
    function = functools.partial(selective_scan, segments=segments, impl=impl)
    return value_and_gradients(function, arguments)


@each_impl
def test_equals_a_loop_over_tokens(impl):
    arguments = draw(3, 14)
    y, final = compiled(**arguments, segments=jnp.asarray(SEGMENTS), impl=impl)
    want, want_final = brute_force(arguments, SEGMENTS)
    assert_close(y, want, "float32", "y")
    assert_close(final, want_final, "float32", "final state")
    np.testing.assert_array_equal(final[2], arguments["initial_state"][2])


@each_impl
def test_is_a_diagonal_recurrence_of_every_number_of_the_state(impl):
    """Against `linear_scan` over (D, N) flattened, which keeps the states of all tokens."""
    arguments = draw(3, 14)
    segments = jnp.asarray(SEGMENTS)

    def flat(x, dt, A, Bm, Cm, D, initial_state):
        batch, length, width = x.shape
        log_decay = dt[..., None] * A
        written = (dt * x)[..., None] * Bm[:, :, None]
        h, final = linear_scan(
            written.reshape(batch, length, -1),
            log_decay.reshape(batch, length, -1),
            initial_state=initial_state.reshape(batch, -1),
            segments=segments,
            impl="ref",
        )
        y = jnp.einsum("btdn,btn->btd", h.reshape(written.shape), Cm) + D * x
        y = jnp.where((segments != 0)[..., None], y, 0)
        return y, final.reshape(batch, width, -1)

    outputs, slopes = evaluate(arguments, segments, impl=impl)
    want, want_slopes = jax.jit(lambda given: value_and_gradients(flat, given))(arguments)
    for found, expected, what in zip(outputs, want, ("y", "final state"), strict=True):
        assert_close(found, expected, "float32", what)
    for name in NAMES:
        assert_close(slopes[name], want_slopes[name], "float32", f"gradient of {name}")


@pytest.mark.parametrize(
    ("impl", "cut"),
    crossed(IMPLS, [1, 8], gate=[("ref", 8), ("xla", 1), ("xla", 8), ("pallas_tpu", 8)]),
)
def test_parts_and_single_tokens_equal_the_whole(impl, cut):
    arguments = draw(2, 17)
    want, want_final = compiled(**arguments, impl=impl)
    state, pieces = arguments["initial_state"], []
    edges = [0, *range(cut, 17, cut), 17]
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        part = {n: arguments[n][:, start:end] for n in ("x", "dt", "Bm", "Cm")}
        y, state = compiled(**arguments | part | {"initial_state": state}, impl=impl)
        pieces.append(np.asarray(y))
    assert_close(np.concatenate(pieces, axis=1), want, "float32", "y")
    assert_close(state, want_final, "float32", "final state")


@each_impl
def test_without_a_state_and_without_a_skip_both_are_zero(impl):
    arguments = draw(2, 6)
    zeros = {n: jnp.zeros_like(arguments[n]) for n in ("D", "initial_state")}
    want = compiled(**arguments | zeros, impl=impl)
    found = compiled(**{n: arguments[n] for n in ("x", "dt", "A", "Bm", "Cm")}, impl=impl)
    jax.tree.map(np.testing.assert_array_equal, found, want)


@pytest.mark.parametrize(
    ("impl", "length"),
    crossed(IMPLS, [1, 9], gate=[("ref", 1), ("xla", 1), ("xla", 9), ("pallas_tpu", 9)]),
)
def test_a_step_of_zero_leaves_the_state_and_a_huge_one_forgets_it(impl, length):
    arguments = draw(2, length)
    still = arguments | {"dt": jnp.zeros_like(arguments["dt"])}
    _, final = compiled(**still, impl=impl)
    np.testing.assert_array_equal(final, still["initial_state"])
    huge = arguments | {"dt": jnp.full_like(arguments["dt"], 1e4)}
    (_, final), slopes = evaluate(huge, impl=impl)
    last = huge["dt"][:, -1] * huge["x"][:, -1]
    assert_close(final, last[..., None] * huge["Bm"][:, -1, None], "float32", "final state")
    np.testing.assert_array_equal(slopes["A"], 0)
    np.testing.assert_array_equal(slopes["initial_state"], 0)


@each_impl
def test_nan_at_padding_reaches_nothing(impl):
    arguments = draw(3, 14)
    padding = jnp.asarray(SEGMENTS == 0)[..., None]
    segments = jnp.asarray(SEGMENTS)
    tokens = {n: jnp.where(padding, jnp.nan, arguments[n]) for n in ("x", "dt", "Bm", "Cm")}
    clean = evaluate(arguments, segments, impl=impl)
    dirty = evaluate(arguments | tokens, segments, impl=impl)
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)


@each_impl
@pytest.mark.parametrize("length", [1, 5])
def test_dtypes(impl, length):
    arguments = draw(2, length)
    half = {n: arguments[n].astype(jnp.bfloat16) for n in ("x", "dt", "Bm", "Cm")}
    function = functools.partial(selective_scan, impl=impl)
    y, final = jax.eval_shape(function, **arguments | half)
    assert y.dtype == jnp.bfloat16 and final.dtype == jnp.float32
    with jax.enable_x64(True):
        wide = {n: jnp.asarray(np.asarray(a, np.float64)) for n, a in arguments.items()}
        y, final = jax.eval_shape(function, **wide)
        assert y.dtype == jnp.float64 and final.dtype == jnp.float64


def largest_array(jaxpr) -> int:
    """Elements of the largest array that any equation, however deep, gives back."""
    sizes = [0]
    for eqn in jaxpr.eqns:
        sizes += [math.prod(v.aval.shape) for v in eqn.outvars]
        sizes += [largest_array(inner) for inner in core.jaxprs_in_params(eqn.params)]
    return max(sizes)


def test_no_array_holds_the_states_of_all_tokens():
    """Neither pass keeps (B, T, D, N), nor more than a fraction of it."""
    batch, length, width, state = 1, 1024, 32, 16
    arguments = draw(batch, length, width, state)

    def total(arguments):
        return sum(jnp.sum(out) for out in selective_scan(**arguments, impl="xla"))

    largest = largest_array(jax.make_jaxpr(jax.grad(total))(arguments).jaxpr)
    assert batch * length * width <= largest <= batch * length * width * state / 8


def test_costs_of_tpu_launches_are_the_formulas():
    """By hand, a token and channel: products, and sums over N by folding and by a tree."""
    batch, length, width, state = 2, 512, 2048, 16
    token = jax.ShapeDtypeStruct((batch, length, width), jnp.bfloat16)
    projected = jax.ShapeDtypeStruct((batch, length, state), jnp.bfloat16)
    arguments = dict(x=token, dt=token, Bm=projected, Cm=projected)
    arguments["A"] = jax.ShapeDtypeStruct((width, state), jnp.float32)
    arguments["D"] = jax.ShapeDtypeStruct((width,), jnp.float32)
    arguments["initial_state"] = jax.ShapeDtypeStruct((batch, width, state), jnp.float32)
    forward, backward = costs(selective_scan, arguments)

    tokens, block = batch * length * width, 1024  # channels of a backward program's block
    tree, fold = 14, 2 * state - 8
    # Decay's exponent, decay, write: 4 N. Skip and dt x: 3.
    ours = 4 * state + fold + tree + 3
    # Again; slope 2 N, slopes of c and b 4 N, of the write, of the state 2 N, of dt, of A 4 N.
    theirs = 4 * state + 1 + (2 + 4 + 2 + 4) * state + 2 * (fold + tree) + 8 - state
    lanes = 2 * state * (127 + 128) * batch * length * (width // block)
    assert forward.flops == ours * tokens
    assert backward.flops == theirs * tokens + lanes
    assert (forward.transcendentals, backward.transcendentals) == tuple(
        n * state * tokens for n in (1, 2)
    )


def test_widths_of_tpu_programs():
    """All of a narrow array, or registers that divide a wide one evenly."""
    assert [pallas_tpu._lanes(n, 512) for n in (20, 128, 640, 1536, 4096)] == [
        20,
        128,
        128,
        512,
        512,
    ]
    assert [pallas_tpu._lanes(n, 3000, 256) for n in (256, 1536, 4096)] == [256, 1536, 2048]
    found = [pallas_tpu.chunk_length(n, 16) for n in (1, 20, 37, 130, 4096)]
    assert found == [16, 16, 32, 128, 128]
    assert [pallas_tpu.chunk_length(4096, n) for n in (16, 40, 64, 256)] == [128, 64, 64, 16]


@pytest.mark.parametrize("width, state", [(300, 6), (640, 24)])
def test_tpu_programs_of_several_parts_equal_the_reference(width, state):
    """Channels that fill no register, states that fill no tile, parts and blocks of channels."""
    arguments = draw(1, 20, width, state)
    runs = [evaluate(arguments, impl=impl) for impl in ("pallas_tpu", "ref")]
    for found, want in zip(*(outputs for outputs, _ in runs), strict=True):
        assert_close(found, want, "float32", "output")
    for name in NAMES:
        assert_close(*(slopes[name] for _, slopes in runs), "float32", f"gradient of {name}")


def test_what_the_tpu_kernel_declines_is_named():
    arguments = draw(1, 3, 4, 257)
    with pytest.raises(ValueError) as error:
        selective_scan(**arguments, impl="pallas_tpu")
    assert str(error.value) == (
        "selective_scan as pallas_tpu does not cover a state of 257 numbers a channel; "
        "the most is 256; or use xla."
    )
    with jax.enable_x64(True), setting.interpreting(None), pytest.raises(ValueError) as error:
        wide = {n: jnp.asarray(np.asarray(a, np.float64)) for n, a in draw(1, 3).items()}
        pallas_tpu.selective_scan(**wide)
    assert str(error.value) == (
        "selective_scan as pallas_tpu does not cover float64; the nearest dtype is float32; "
        "or use xla."
    )


X, A, P = jnp.zeros((2, 3, 4)), jnp.zeros((4, 5)), jnp.zeros((2, 3, 5))


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
            {"x": X.astype(jnp.int32)},
            "x has dtype int32; it must be floating, as float32.",
        ),
        (
            {"A": A[0]},
            "A has shape (5,), rank 1; it must have rank 2: (width, state).",
        ),
        (
            {"A": A[:, :0]},
            "A has shape (4, 0); every size must be at least 1.",
        ),
        (
            {"A": A.T},
            "A has shape (5, 4); it must be (D, N) = (4, 4).",
        ),
        (
            {"A": A.astype(jnp.complex64)},
            "A has dtype complex64; it must be floating, as float32.",
        ),
        (
            {"dt": X[..., :1]},
            "dt has shape (2, 3, 1); it must be x's shape (B, T, D) = (2, 3, 4).",
        ),
        (
            {"Bm": P[:, :2]},
            "Bm has shape (2, 2, 5); it must be (B, T, N) = (2, 3, 5).",
        ),
        (
            {"Cm": P[..., :4]},
            "Cm has shape (2, 3, 4); it must be (B, T, N) = (2, 3, 5).",
        ),
        (
            {"Cm": P.astype(jnp.int32)},
            "Cm has dtype int32; it must be floating, as float32.",
        ),
        (
            {"D": A[:, 0][:3]},
            "D has shape (3,); it must be (D,) = (4,).",
        ),
        (
            {"initial_state": jnp.zeros((2, 5, 4))},
            "initial_state has shape (2, 5, 4); it must be (B, D, N) = (2, 4, 5).",
        ),
        (
            {"segments": jnp.ones((3, 2), jnp.int32)},
            "segments has shape (3, 2) and dtype int32; "
            "it must be (2, 3) int32, like the inputs' (B, T).",
        ),
        (
            {"impl": "fast"},
            "selective_scan has no implementation 'fast'; it has ref, xla, pallas_tpu "
            "(or None: chosen).",
        ),
    ],
)
def test_errors_say_what_and_what_instead(arguments, message):
    given = {"x": X, "dt": X, "A": A, "Bm": P, "Cm": P} | arguments
    with pytest.raises(ValueError) as error:
        selective_scan(**given)
    assert str(error.value) == message
