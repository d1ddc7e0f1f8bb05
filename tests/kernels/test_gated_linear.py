"""Gated linear attention: what the generic comparison with the reference does not cover."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.gated_linear import gated_linear
from kernels.gated_linear.cases import GROUPS, HEADS, KEY, VALUE
from tests.kernels.crossed import crossed
from tests.tolerance import assert_close, rms

BATCH = 2
GATES = ("scalar", "vector", "scalar, bonus", "vector, bonus")


def each_gate(*kept):
    """All gates, of which the gate of the tests runs the kept: each kind, with a bonus or not."""
    long = pytest.mark.long
    marked = [gate if gate in kept else pytest.param(gate, marks=long) for gate in GATES]
    return pytest.mark.parametrize("gate", marked)


vector_has_bonus = each_gate("scalar", "vector, bonus")
scalar_has_bonus = each_gate("vector", "scalar, bonus")


def draw(length, gate, *, seed=0, batch=BATCH):
    gate, _, bonus = gate.partition(", ")
    rng = np.random.default_rng(seed)
    shapes = {
        "scalar": (batch, length, HEADS),
        "vector": (batch, length, HEADS, KEY),
        "constant": (HEADS,),
    }
    arrays = {
        "q": rng.normal(size=(batch, length, GROUPS, KEY)),
        "k": rng.normal(size=(batch, length, GROUPS, KEY)),
        "v": rng.normal(size=(batch, length, HEADS, VALUE)),
        "log_decay": -np.logaddexp(0, -rng.normal(2, 2, shapes[gate])),
        "initial_state": rng.normal(size=(batch, HEADS, KEY, VALUE)),
    }
    if bonus:
        arrays["bonus"] = rng.normal(size=(HEADS, KEY))
    return {name: value.astype(np.float32) for name, value in arrays.items()}


def rows(arguments, where):
    """The tokens `where` of every argument that has tokens, the rest whole, no state."""
    whole = ("initial_state", "bonus")
    given = {n: x if n in whole else x[:, where] for n, x in arguments.items()}
    return {n: x for n, x in given.items() if n != "initial_state"}


def slopes(arguments, *, seed=7):
    """Fixed random cotangents for (out, final_state)."""
    rng = np.random.default_rng(seed)
    v, state = arguments["v"], arguments["initial_state"]
    return rng.normal(size=v.shape), rng.normal(size=state.shape)


@functools.partial(jax.jit, static_argnames=("impl",))
def evaluate(arguments, cotangents, segments=None, impl="xla"):
    """(out, final state, gradients by name)."""

    def run(arguments):
        return gated_linear(**arguments, segments=segments, impl=impl)

    outputs, pullback = jax.vjp(run, arguments)
    cotangents = tuple(c.astype(o.dtype) for c, o in zip(cotangents, outputs, strict=True))
    return *outputs, pullback(cotangents)[0]


def evaluate_exactly(arguments, cotangents, segments=None):
    """The reference in float64."""
    with jax.enable_x64(True):
        wide = {name: np.asarray(value, np.float64) for name, value in arguments.items()}
        return evaluate(wide, cotangents, segments, impl="ref")


def assert_same(found, wanted, dtype="float32"):
    """Outputs and gradients of two evaluations agree."""
    for what, a, b in zip(("out", "final state"), found, wanted, strict=False):
        assert_close(a, b, dtype, what)
    for name, gradient in wanted[2].items():
        assert_close(found[2][name], gradient, dtype, f"gradient of {name}")


@pytest.mark.parametrize("gate", [*GATES, "constant", "constant, bonus"])
def test_the_reference_is_attention_with_decayed_scores(gate):
    length = 9
    arguments = {n: x.astype(np.float64) for n, x in draw(length, gate).items()}
    with jax.enable_x64(True):
        arrays = {name: jnp.asarray(value) for name, value in arguments.items()}
        out, final_state = gated_linear(**arrays, scale=0.7, impl="ref")
    q, k = (np.repeat(arguments[n], HEADS // GROUPS, axis=2) for n in "qk")
    gates = arguments["log_decay"][..., None] if "vector" not in gate else arguments["log_decay"]
    gates = np.broadcast_to(gates, (BATCH, length, HEADS, KEY))
    sums = np.concatenate([np.zeros_like(gates[:, :1]), np.cumsum(gates, axis=1)], axis=1)
    # The initial state is what one more position, before the first, has written.
    between = np.exp(sums[:, :, None] - sums[:, None])
    read, own = between[:, 1:], np.ones((HEADS, KEY))
    if "bonus" in arguments:
        read, own = between[:, :-1], arguments["bonus"]
    expected = np.einsum("bthk,bthk,bhkv->bthv", q, read[:, :, 0], arguments["initial_state"])
    state = np.einsum("bhk,bhkv->bhkv", between[:, -1, 0], arguments["initial_state"])
    scores = np.tril(np.einsum("bthk,bshk,btshk->bhts", q, k, read[:, :, 1:]), k=-1)
    expected += np.einsum("bhts,bshv->bthv", scores, arguments["v"])
    expected += np.einsum("bthk,bthk,hk,bthv->bthv", q, k, own, arguments["v"])
    state += np.einsum("bshk,bshk,bshv->bhkv", k, between[:, -1, 1:], arguments["v"])
    assert_close(out, 0.7 * expected, "float64", "out")
    assert_close(final_state, state, "float64", "final state")


@scalar_has_bonus
def test_heads_of_a_group_share_queries_and_keys(gate):
    arguments = draw(70, gate)
    repeated = dict(arguments)
    for name in "qk":
        repeated[name] = np.repeat(arguments[name], HEADS // GROUPS, axis=2)
    shared = evaluate(arguments, slopes(arguments))
    apart = evaluate(repeated, slopes(arguments))
    summed = dict(apart[2])
    for name in "qk":
        by_group = np.asarray(summed[name]).reshape(BATCH, 70, GROUPS, HEADS // GROUPS, KEY)
        summed[name] = by_group.sum(3)
    assert_same(shared, (*apart[:2], summed))


@pytest.mark.parametrize(
    ("length", "dtype"),
    crossed([1, 40], ["float32", "bfloat16"], gate=[(1, "bfloat16"), (40, "float32")]),
)
def test_a_constant_gate_is_that_gate_at_every_token(length, dtype):
    arguments = draw(length, "constant")
    for name in ("q", "k", "v", "log_decay"):
        arguments[name] = arguments[name].astype(jnp.dtype(dtype))
    segments = np.ones((BATCH, length), np.int32)
    segments[0, 7:9] = 0
    constant = evaluate(arguments, slopes(arguments), segments)
    gates = np.broadcast_to(arguments["log_decay"], (BATCH, length, HEADS))
    spread = evaluate_exactly(arguments | {"log_decay": gates}, slopes(arguments), segments)
    spread[2]["log_decay"] = np.asarray(spread[2]["log_decay"]).sum((0, 1))
    assert_same(constant, spread, dtype)


def test_a_scalar_gate_is_a_vector_gate_with_equal_entries():
    arguments = draw(70, "scalar")
    gates = np.repeat(arguments["log_decay"][..., None], KEY, axis=-1)
    scalar = evaluate(arguments, slopes(arguments))
    vector = evaluate(arguments | {"log_decay": gates}, slopes(arguments))
    vector[2]["log_decay"] = vector[2]["log_decay"].sum(-1)
    assert_same(scalar, vector)


@pytest.mark.parametrize(
    ("gate", "cut"),
    crossed(
        GATES,
        [1, 33],
        gate=[("scalar", 1), ("vector", 33), ("scalar, bonus", 33), ("vector, bonus", 1)],
    ),
)
def test_a_row_may_be_split_anywhere_and_the_state_passed_on(gate, cut):
    arguments = draw(70, gate)

    def in_two(arguments):
        state, outs = arguments["initial_state"], []
        for part in (slice(0, cut), slice(cut, None)):
            out, state = gated_linear(**rows(arguments, part), initial_state=state)
            outs.append(out)
        return jnp.concatenate(outs, axis=1), state

    @jax.jit
    def run(arguments, cotangents):
        outputs, pullback = jax.vjp(in_two, arguments)
        return *outputs, pullback(cotangents)[0]

    cotangents = tuple(c.astype(np.float32) for c in slopes(arguments))
    assert_same(run(arguments, cotangents), evaluate(arguments, cotangents))


@vector_has_bonus
def test_packed_documents_equal_separate_ones(gate):
    arguments = draw(70, gate, batch=1)
    segments = np.zeros((1, 70), np.int32)
    documents = [slice(0, 5), slice(5, 36), slice(38, 69)]
    for number, where in enumerate(documents, start=1):
        segments[:, where] = number
    cotangents = slopes(arguments)
    out, final_state, gradients = evaluate(arguments, cotangents, segments)
    of_bonus = 0
    for number, where in enumerate(documents):
        alone = rows(arguments, where)
        first, last = number == 0, number == len(documents) - 1
        state = arguments["initial_state"]
        alone["initial_state"] = state if first else np.zeros_like(state)
        pulls = (cotangents[0][:, where], cotangents[1] if last else 0 * cotangents[1])
        expected = evaluate(alone, pulls)
        assert_close(out[:, where], expected[0], "float32", f"document {number}")
        for name in alone:
            if name not in ("initial_state", "bonus"):
                found = gradients[name][:, where]
                assert_close(found, expected[2][name], "float32", f"{name} of document {number}")
        if first:
            wanted = expected[2]["initial_state"]
            assert_close(gradients["initial_state"], wanted, "float32", "initial state")
        if last:
            assert_close(final_state, expected[1], "float32", "final state")
        of_bonus += expected[2].get("bonus", 0)
    if "bonus" in arguments:
        assert_close(gradients["bonus"], of_bonus, "float32", "bonus")
    assert not np.any(np.asarray(out)[segments == 0])


@scalar_has_bonus
@pytest.mark.parametrize(
    "choices",
    [(0.0,), (-1e-4,), (-30.0, -1e-4), (0.0, -1e-4, -30.0, -3000.0, -1e30)],
    ids=str,
)
def test_extreme_gates_are_exact(gate, choices):
    arguments = draw(70, gate)
    rng = np.random.default_rng(3)
    shape = arguments["log_decay"].shape
    arguments["log_decay"] = rng.choice(choices, size=shape).astype(np.float32)
    found = evaluate(arguments, slopes(arguments))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    assert_same(found, evaluate_exactly(arguments, slopes(arguments)))


@pytest.mark.parametrize(
    ("gate", "length"),
    crossed(
        GATES,
        [1, 70],
        gate=[("scalar", 70), ("vector", 1), ("scalar, bonus", 1), ("vector, bonus", 70)],
    ),
)
def test_float64_in_gives_float64_accuracy(gate, length):
    arguments = {n: x.astype(np.float64) for n, x in draw(length, gate).items()}
    segments = np.ones((BATCH, length), np.int32)
    segments[0, length // 2 :] = 2
    segments[1, length // 3 : length // 2] = 0
    with jax.enable_x64(True):
        found = evaluate(arguments, slopes(arguments), segments)
    expected = evaluate_exactly(arguments, slopes(arguments), segments)
    assert_same(found, expected, "float64")


@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_where_every_gate_closes_only_the_token_itself_is_read(gate):
    arguments = draw(40, gate)
    arguments["log_decay"] = np.full_like(arguments["log_decay"], -200)
    out, _, gradients = evaluate(arguments, slopes(arguments))
    q, k = (np.repeat(arguments[n], HEADS // GROUPS, axis=2) for n in "qk")
    own = KEY**-0.5 * np.einsum("bthk,bthk->bth", q, k)[..., None] * arguments["v"]
    assert_close(out, own, "float32", "out")
    assert np.abs(np.asarray(gradients["log_decay"])).max() < 1e-5


@pytest.mark.parametrize("gate", ["scalar, bonus", "vector, bonus"])
def test_a_bonus_reads_the_last_write_before_its_gate(gate):
    arguments = draw(40, gate)
    arguments["log_decay"] = np.full_like(arguments["log_decay"], -200)
    out, _, gradients = evaluate(arguments, slopes(arguments))
    q, k = (np.repeat(arguments[n], HEADS // GROUPS, axis=2) for n in "qk")
    own = np.einsum("bthk,hk,bthk->bth", q, arguments["bonus"], k)[..., None] * arguments["v"]
    first = np.einsum("bhk,bhkv->bhv", q[:, 0], arguments["initial_state"])[:, None]
    last = np.einsum("bthk,bthk->bth", q[:, 1:], k[:, :-1])[..., None] * arguments["v"][:, :-1]
    expected = KEY**-0.5 * (own + np.concatenate([first, last], axis=1))
    assert_close(out, expected, "float32", "out")
    assert np.abs(np.asarray(gradients["log_decay"])).max() < 1e-5


def test_weak_gates_keep_their_digits_behind_strong_ones():
    """Differences of plain float32 sums of gates would be wrong by 1e-4 of the decays here."""
    arguments = draw(64, "scalar")
    gates = np.full((BATCH, 64, HEADS), -2e-4)
    gates[:, ::32] = gates[:, 1::32] = -997.3
    arguments["log_decay"] = gates.astype(np.float32)
    found = evaluate(arguments, slopes(arguments))
    expected = evaluate_exactly(arguments, slopes(arguments))
    assert rms(found[0], expected[0]) < 1e-6
    assert rms(found[1], expected[1]) < 1e-6


@pytest.mark.parametrize("gate", GATES)
def test_one_token_takes_no_loop_and_equals_a_chunk(gate):
    arguments = draw(1, gate)
    traced = jax.make_jaxpr(lambda arguments: gated_linear(**arguments))(arguments)
    assert "scan" not in str(traced) and "while" not in str(traced)
    padded = {
        n: x if n in ("initial_state", "bonus") else np.concatenate([x, np.ones_like(x)], axis=1)
        for n, x in arguments.items()
    }
    segments = jnp.asarray([[1, 0]] * BATCH, jnp.int32)
    run = jax.jit(gated_linear)
    out, final_state = run(**arguments)
    chunk_out, chunk_state = run(**padded, segments=segments)
    assert_close(out, chunk_out[:, :1], "float32", "out")
    assert_close(final_state, chunk_state, "float32", "final state")


def test_one_padding_token_changes_nothing():
    arguments = draw(1, "vector")
    segments = np.zeros((BATCH, 1), np.int32)
    out, final_state, gradients = evaluate(arguments, slopes(arguments), segments)
    assert not np.any(out)
    np.testing.assert_array_equal(final_state, arguments["initial_state"])
    assert not any(np.any(gradients[name]) for name in ("q", "k", "v", "log_decay"))


@vector_has_bonus
def test_memory_of_a_long_row_is_its_chunk_states(gate):
    """Forward and backward at T = 4096 need less than 45 MB beside inputs and gradients."""
    heads, length, dim = 4, 4096, 64
    token = jax.ShapeDtypeStruct((1, length, heads, dim), np.float32)
    gates = token if "vector" in gate else jax.ShapeDtypeStruct(token.shape[:3], np.float32)
    state = jax.ShapeDtypeStruct((1, heads, dim, dim), np.float32)
    arguments = dict(q=token, k=token, v=token, log_decay=gates, initial_state=state)
    if "bonus" in gate:
        arguments["bonus"] = jax.ShapeDtypeStruct((heads, dim), np.float32)
    compiled = evaluate.lower(arguments, (token, state)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 45e6


def reshaped(**shapes):
    """Arguments of length 3 with zeros of these shapes in place of the named ones."""
    arguments = draw(3, "scalar") | {n: np.zeros(s, np.float32) for n, s in shapes.items()}
    return {n: jnp.asarray(x) for n, x in arguments.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": (2, 3, 8)}, r"q has shape \(2, 3, 8\), rank 3; it must have rank 4"),
        ({"k": (2, 3, 2, 9)}, r"k has shape \(2, 3, 2, 9\); it must be q's shape, \(2, 3, 2, 8\)"),
        ({"v": (2, 4, 4, 12)}, r"v has \(batch, time\) \(2, 4\); it must be q's and k's \(2, 3\)"),
        (
            {"v": (2, 3, 5, 12)},
            r"v has 5 heads and q and k have 2; .* a multiple of theirs; the nearest is 4\.",
        ),
        ({"v": (2, 3, 1, 12)}, r"v has 1 heads and q and k have 2; .* the nearest is 2\."),
        (
            {"q": (2, 0, 2, 8), "k": (2, 0, 2, 8), "v": (2, 0, 4, 12)},
            r"every size, time included, must be at least 1",
        ),
        (
            {"log_decay": (2, 3)},
            r"log_decay has shape \(2, 3\); it must be \(2, 3, 4, 8\), \(2, 3, 4\) or \(4,\)",
        ),
        (
            {"initial_state": (2, 4, 12, 8)},
            r"initial_state has shape \(2, 4, 12, 8\); .* = \(2, 4, 8, 12\)",
        ),
        ({"bonus": (2, 8)}, r"bonus has shape \(2, 8\); it must be \(H, K\) = \(4, 8\)\."),
    ],
)
def test_wrong_shapes_are_named(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        gated_linear(**reshaped(**changes))
    assert "\n" not in str(error.value)


def test_an_integer_gate_is_named():
    arguments = reshaped() | {"log_decay": jnp.zeros((2, 3, 4), jnp.int32)}
    with pytest.raises(ValueError, match="log_decay has dtype int32; it must be floating"):
        gated_linear(**arguments)


def test_an_integer_bonus_is_named():
    with pytest.raises(ValueError, match="bonus has dtype int32; it must be floating"):
        gated_linear(**reshaped(), bonus=jnp.ones((HEADS, KEY), jnp.int32))


def test_segments_of_another_length_are_named():
    with pytest.raises(ValueError, match=r"segments has shape \(2, 4\) .* must be \(2, 3\)"):
        gated_linear(**reshaped(), segments=jnp.ones((2, 4), jnp.int32))
