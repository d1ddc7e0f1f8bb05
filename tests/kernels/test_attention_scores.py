"""Attention with sinks, soft cap and forgetting: what tests/test_kernels.py does not ask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from kernels.attention import attention, cached_attention, scores, xla
from tests.kernels.crossed import crossed
from tests.kernels.heads import causal_mask
from tests.kernels.refusals import assert_raises_one_line
from tests.tolerance import assert_close

SHAPES = {"q": (4, 8), "k": (2, 8), "v": (2, 6)}  # heads and size


def draw(batch, length, *, slots=None, dtype=np.float32, seed=0, extreme=False):
    """q, k, v, sinks and log_forget; `extreme` mixes gates of -30 and -1e-4."""
    rng = np.random.default_rng(seed)
    sizes = {"q": length, "k": slots or length, "v": slots or length}
    given = {n: rng.normal(size=(batch, sizes[n], *SHAPES[n])) for n in SHAPES}
    given["sinks"] = rng.normal(size=4)
    gates = -np.logaddexp(0, -rng.normal(2, 2, (batch, length, 4)))
    if extreme:
        gates = rng.choice([-30.0, -1e-4], size=gates.shape)
    given["log_forget"] = gates
    return {n: jnp.asarray(x, dtype) for n, x in given.items()}


def value_and_slopes(function, given, seed=7):
    """The output and the gradient of every array in `given` for a random cotangent."""
    shape = (*given["q"].shape[:3], given["v"].shape[3])
    cotangent = jnp.asarray(np.random.default_rng(seed).normal(size=shape), given["v"].dtype)
    return jax.tree.map(np.asarray, compiled(function)(given, cotangent))


def compiled(function):
    """The program of `value_and_slopes`."""

    @jax.jit
    def run(given, cotangent):
        out, pullback = jax.vjp(lambda arrays: function(**arrays), given)
        return {"out": out} | pullback(cotangent)[0]

    return run


def wide_reference(function, given):
    """`value_and_slopes` of the reference in float64."""
    with jax.enable_x64(True):
        wide = {n: jnp.asarray(np.asarray(x), np.float64) for n, x in given.items()}
        return value_and_slopes(lambda **a: function(**a, impl="ref"), wide)


def assert_same(found, expected, dtype="float32"):
    assert set(found) == set(expected)
    for name in expected:
        assert_close(found[name], expected[name], dtype, name)


def by_hand(given, visible, *, softcap=0.0, window=0):
    """Loops over batch, heads and queries in float64; gates are summed one by one."""
    given = {n: np.asarray(x, np.float64) for n, x in given.items()}
    q, k, v = (given[n] for n in "qkv")
    out = np.zeros((*q.shape[:3], v.shape[3]))
    for b, t, h in np.ndindex(q.shape[:3]):
        seen, g = np.flatnonzero(visible[b, t]), h * k.shape[2] // q.shape[2]
        score = k[b, seen, g] @ q[b, t, h] / np.sqrt(q.shape[3])
        if softcap:
            score = softcap * np.tanh(score / softcap)
        if "log_forget" in given:
            after = given["log_forget"][b, t:0:-1, h].cumsum()[::-1]
            score += np.append(after, 0)[seen]
        sink = np.exp(given["sinks"][h]) if "sinks" in given else 0
        weights = np.exp(score)
        if len(seen):
            out[b, t, h] = weights @ v[b, seen, g] / (weights.sum() + sink)
    return out


def only(given, names):
    return {n: x for n, x in given.items() if n in "qkv" or n in names}


def packed_rows(lengths, numbers, batch=2):
    return jnp.asarray(np.repeat([numbers] * batch, lengths, axis=1), jnp.int32)


BOTH = ("sinks", "log_forget")
PAIRS = [  # every value of a parameter with every value of another
    ((), 0, 0, "ref"),
    ((), 2, 40, "xla"),
    (("sinks",), 0, 0, "xla"),
    (("sinks",), 2, 40, "ref"),
    (("log_forget",), 0, 40, "ref"),
    (("log_forget",), 2, 0, "xla"),
    (BOTH, 0, 40, "xla"),
    (BOTH, 2, 0, "ref"),
]


@pytest.mark.parametrize(
    ("names", "softcap", "window", "impl"),
    crossed([(), ("sinks",), ("log_forget",), BOTH], [0, 2], [0, 40], ["ref", "xla"], gate=PAIRS),
)
def test_options_equal_brute_force(names, softcap, window, impl):
    given = only(draw(1, 150), names)
    expected = by_hand(given, causal_mask(150, window)[None], softcap=softcap)
    run = functools.partial(attention, softcap=softcap, window=window, impl=impl)
    out = jax.jit(run)(**given)
    assert_close(out, expected, "float32", "out")


@pytest.mark.parametrize(
    ("dtype", "option"),
    crossed(
        ["float32", "bfloat16", "float64"],
        [((), 0), (("sinks",), 2), (("log_forget",), 0)],
        gate=[
            ("float32", (("log_forget",), 0)),
            ("bfloat16", ((), 0)),
            ("float64", (("sinks",), 2)),
        ],
    ),
)
def test_options_match_the_reference_over_several_blocks(dtype, option):
    names, softcap = option
    segments = packed_rows([1, 90, 3, 61, 105], [0, 3, 0, 4, 3])
    with jax.enable_x64(dtype == "float64"):
        given = only(draw(2, 260, dtype=dtype), names)
        run = lambda **a: attention(**a, segments=segments, softcap=softcap)  # noqa: E731
        assert_same(value_and_slopes(run, given), wide_reference(run, given), dtype)


def test_sinks_and_a_cap_without_causality():
    given = only(draw(2, 200), ("sinks",))
    run = lambda **a: attention(**a, causal=False, softcap=3.0)  # noqa: E731
    assert_same(value_and_slopes(run, given), wide_reference(run, given))


@pytest.mark.parametrize("packed", [False, True])
def test_strong_and_weak_gates_mixed_keep_their_digits(packed):
    """Every other gate is e^-30: the sums from the start reach -9000, those that matter -1e-4."""
    given = draw(1, 600, extreme=True)
    segments = packed_rows([133, 4, 400, 63], [1, 0, 2, 1], batch=1) if packed else None
    run = lambda **a: attention(**a, segments=segments)  # noqa: E731
    assert_same(value_and_slopes(run, given), wide_reference(run, given))


@pytest.mark.parametrize("reverse", [False, True])
def test_sums_of_gates_lose_nothing(reverse):
    rng = np.random.default_rng(0)
    gates = jnp.asarray(rng.choice([-30.0, -1e-4], size=(1, 3000, 2)), np.float32)
    segments = packed_rows([3, 1500, 1, 900, 596], [0, 1, 0, 1, 2], batch=1)
    real = np.asarray(segments)[..., None] != 0
    if not reverse:
        high, low = (np.asarray(x, np.float64) for x in scores.forget_sums(gates, segments))
        wide = np.where(real, np.asarray(gates, np.float64), 0)
        expected = np.concatenate([wide[:, :2404].cumsum(1), wide[:, 2404:].cumsum(1)], axis=1)
        np.testing.assert_allclose(high + low, expected, rtol=0, atol=1e-9)
    else:
        weights = rng.normal(size=gates.shape).astype(np.float32)
        found = jax.grad(lambda g: jnp.sum(weights * scores.forget_sums(g, segments)[0]))(gates)
        wide = weights.astype(np.float64)[:, ::-1]
        suffix = np.concatenate([wide[:, :596].cumsum(1), wide[:, 596:].cumsum(1)], axis=1)
        expected = np.where(real, suffix[:, ::-1], 0)
        assert_close(found, expected, "float32", "gradient")


def test_documents_do_not_feel_each_others_gates():
    """Packed equals separate, with padding inside a document and a number that comes back."""
    document = np.repeat([0, 1, 2, 0, 3], [5, 70, 1, 3, 81]).astype(np.int32)
    document[[7, 8, 150]] = 0
    number = jnp.asarray([0, 2, 5, 2], jnp.int32)[document][None]
    given = draw(1, 160, extreme=True)

    def separate(sinks, **arrays):
        out = jnp.zeros((1, 160, 4, 6))
        for n in (1, 2, 3):
            (place,) = np.nonzero(document == n)
            alone = {name: x[:, place] for name, x in arrays.items()}
            out = out.at[:, place].set(attention(**alone, sinks=sinks))
        return out

    found = value_and_slopes(lambda **a: attention(**a, segments=number), given)
    assert_same(found, value_and_slopes(separate, given))
    for name in ("out", "q", "k", "v", "log_forget"):
        assert not found[name][number == 0].any(), name


def test_a_gate_in_one_document_changes_no_bit_of_another():
    given = draw(1, 300)
    segments = packed_rows([100] * 3, [1, 2, 3], batch=1)
    run = compiled(lambda **a: attention(**a, segments=segments))
    louder = given | {"log_forget": given["log_forget"].at[:, 100:200].multiply(1000)}
    first, second = (run(g, jnp.cos(given["v"].repeat(2, axis=2))) for g in (given, louder))
    for name in ("out", "q", "k", "v", "log_forget"):
        for part in (slice(0, 100), slice(200, 300)):
            np.testing.assert_array_equal(first[name][:, part], second[name][:, part])


@pytest.mark.parametrize("sink", [-1e30, 200.0])
def test_a_sink_far_from_the_scores(sink):
    """Far below, it is not there; far above, nothing is read, and no gradient is lost to noise."""
    given = draw(1, 150)
    given["sinks"] = jnp.full(4, sink)
    found = value_and_slopes(attention, given)
    if sink < 0:
        plain = {n: x for n, x in given.items() if n != "sinks"}
        expected = value_and_slopes(attention, plain)
        assert not found.pop("sinks").any()
        assert_same(found, expected)
    else:
        assert not any(x.any() for x in found.values())


def test_a_sink_that_wins_leaves_true_gradients():
    given = draw(1, 150)
    given["sinks"] = jnp.full(4, 30.0)
    assert_same(value_and_slopes(attention, given), wide_reference(attention, given))


@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"window": 5}, {}])
def test_numerical_slopes(options):
    with jax.enable_x64(True):
        given = draw(1, 150, dtype=np.float64)
        segments = jnp.asarray(np.repeat([[1, 0, 1, 4]], [60, 3, 2, 85], axis=1), jnp.int32)
        run = jax.jit(lambda given: attention(**given, segments=segments, **options))
        check_grads(run, (given,), 1, ["rev"])


def with_biases(given, slots, seed=3):
    rng = np.random.default_rng(seed)
    batch, length = given["q"].shape[:2]
    extra = {"bias_q": (batch, length, 4), "bias_k": (batch, slots, 4)}
    given = {n: x for n, x in given.items() if n != "log_forget"}
    dtype = given["q"].dtype
    return given | {n: jnp.asarray(rng.normal(size=s), dtype) for n, s in extra.items()}


@pytest.mark.parametrize(
    ("length", "dtype"),
    crossed(
        [1, 7, 75],
        ["float32", "bfloat16", "float64"],
        gate=[(1, "float32"), (7, "float64"), (75, "bfloat16")],
    ),
)
def test_a_cache_with_options_matches_the_reference(length, dtype, monkeypatch):
    monkeypatch.setattr(xla, "SCORE_BYTES", 1)
    rng = np.random.default_rng(1)
    place = {
        "positions": rng.integers(0, 90, (2, length)),
        "kv_positions": rng.permuted(np.tile(np.arange(-5, 85), (2, 1)), axis=1).clip(-1),
        "segments": rng.integers(0, 3, (2, length)),
        "kv_segments": rng.integers(0, 3, (2, 90)),
    }
    place = {n: jnp.asarray(x, jnp.int32) for n, x in place.items()}
    with jax.enable_x64(dtype == "float64"):
        given = with_biases(draw(2, length, slots=90, dtype=dtype), 90)
        if dtype == "bfloat16":  # its slope is the sink's share: what rounded slopes differ by
            del given["bias_q"]
        run = lambda **a: cached_attention(**a, **place, softcap=2.0)  # noqa: E731
        assert_same(value_and_slopes(run, given), wide_reference(run, given), dtype)


@pytest.mark.parametrize(
    ("impl", "window"), crossed(["ref", "xla"], [0, 6], gate=[("ref", 0), ("xla", 6)])
)
def test_forgetting_token_by_token_equals_attention(impl, window):
    """Each slot's bias is the sum of the gates after it: every step adds its own to all."""
    given = draw(2, 40, extreme=True)
    slots = window or 40

    @jax.jit
    def step(cache, t):
        q, k, v, gate = (given[n][:, t][:, None] for n in ("q", "k", "v", "log_forget"))
        put = lambda x, new: x.at[:, t % slots].set(new[:, 0])  # noqa: E731
        bias = put(cache["bias"] + gate, 0 * gate)
        new = {"k": put(cache["k"], k), "v": put(cache["v"], v), "bias": bias}
        new["filled"] = cache["filled"].at[:, t % slots].set(t)
        place = {"positions": jnp.full((2, 1), t), "kv_positions": new["filled"], "window": window}
        extra = {"bias_k": bias, "sinks": given["sinks"], "softcap": 2.0, "impl": impl}
        return new, cached_attention(q, new["k"], new["v"], **place, **extra)

    cache = {"k": jnp.zeros((2, slots, 2, 8)), "v": jnp.zeros((2, slots, 2, 6))}
    cache |= {"bias": jnp.zeros((2, slots, 4)), "filled": jnp.full((2, slots), -1)}
    outs = []
    for t in range(40):
        cache, out = step(cache, t)
        outs.append(np.asarray(out))
    expected = jax.jit(functools.partial(attention, window=window, softcap=2.0))(**given)
    assert_close(np.concatenate(outs, axis=1), expected, "float32", "out")


def test_continuing_with_forgetting_from_a_cache_equals_attention():
    """Sums are counted from the first new token: what came before it has a positive bias."""
    given, cut = draw(2, 200), 70
    time = jnp.tile(jnp.arange(200), (2, 1))

    def continued(q, k, v, sinks, log_forget):
        whole = {"q": q, "k": k, "v": v, "log_forget": log_forget}
        first = attention(**{n: x[:, :cut] for n, x in whole.items()}, sinks=sinks)
        total = jnp.cumsum(log_forget, axis=1)
        total = total - total[:, cut - 1 : cut]
        place = {"positions": time[:, cut:], "kv_positions": time, "sinks": sinks}
        rest = cached_attention(q[:, cut:], k, v, **place, bias_q=total[:, cut:], bias_k=-total)
        return jnp.concatenate([first, rest], axis=1)

    assert_same(value_and_slopes(continued, given), value_and_slopes(attention, given))


def test_both_forms_of_one_token_agree():
    given = with_biases(draw(2, 1, slots=20), 20)
    visible = jnp.asarray(np.random.default_rng(0).uniform(size=(2, 1, 20)) > 0.5)

    def form(function):
        def run(q, k, v, **joined):
            return function(q, k, v, visible, xla.Joined(**joined), scale=0.3, softcap=2.0)

        return value_and_slopes(run, given)

    assert_same(form(xla._attend_by_group), form(xla._attend_across_groups))


def test_rows_that_see_nothing_are_zero_with_sinks_too():
    given = with_biases(draw(2, 1, slots=3), 3)
    place = {"positions": jnp.asarray([[3], [-1]]), "kv_positions": jnp.asarray([[4, 5, -1]] * 2)}
    for x in value_and_slopes(lambda **a: cached_attention(**a, **place), given).values():
        assert np.isfinite(x).all() and not x.any()


@pytest.mark.parametrize("names", [(), ("sinks", "log_forget")])
def test_inside_shard_map(names):
    given = only(draw(4, 140), names)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {n: P() if n == "sinks" else P("data") for n in given}

    slopes = jax.grad(lambda given: jnp.sum(jnp.square(attention(**given))))
    with jax.set_mesh(mesh):
        found = jax.jit(jax.shard_map(slopes, in_specs=(specs,), out_specs=specs))(given)
    assert_same(found, jax.jit(slopes)(given))


def test_memory_of_both_passes_at_length_4096_with_everything_on():
    shapes = {n: (1, 4096, 4, 64) for n in "qkv"} | {"sinks": (4,), "log_forget": (1, 4096, 4)}
    given = {n: jax.ShapeDtypeStruct(s, np.float32) for n, s in shapes.items()}
    total = lambda given: jnp.sum(jnp.square(attention(**given, softcap=30.0)))  # noqa: E731
    compiled = jax.jit(jax.grad(total)).lower(given).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 64 << 20


GOOD = draw(2, 5)
SHARED_FAULTS = [
    ({"sinks": jnp.zeros(3)}, "sinks has shape (3,) and dtype float32; it must be (4,) floating"),
    ({"sinks": jnp.zeros(4, int)}, "sinks has shape (4,) and dtype int32; it must be (4,) float"),
    ({"softcap": -1.0}, "softcap is -1.0; it must be 0 (off) or positive, as 50.0."),
    ({"softcap": float("nan")}, "softcap is nan; it must be 0 (off) or positive"),
]
FAULTS = [
    (
        {"log_forget": jnp.zeros((2, 5, 2))},
        "log_forget has shape (2, 5, 2) and dtype float32; it must be (2, 5, 4) floating",
    ),
    (
        {"log_forget": jnp.zeros((2, 5, 4), int)},
        "log_forget has shape (2, 5, 4) and dtype int32; it must be (2, 5, 4) floating",
    ),
    ({"causal": False}, "log_forget is given with causal=False; forgetting needs causal=True"),
]
CACHED_FAULTS = [
    (
        {"bias_q": jnp.zeros((2, 5, 2))},
        "bias_q has shape (2, 5, 2) and dtype float32; it must be (2, 5, 4) floating",
    ),
    (
        {"bias_k": jnp.zeros((2, 5, 4))},
        "bias_k has shape (2, 5, 4) and dtype float32; it must be (2, 6, 4) floating",
    ),
]


@pytest.mark.parametrize(("fault", "message"), SHARED_FAULTS + FAULTS)
def test_faults_of_attention(fault, message):
    jax.eval_shape(functools.partial(attention, softcap=1.0), **GOOD)
    assert_raises_one_line(attention, GOOD | fault, message)


@pytest.mark.parametrize(("fault", "message"), SHARED_FAULTS + CACHED_FAULTS)
def test_faults_of_cached_attention(fault, message):
    place = {"positions": jnp.zeros((2, 5), int), "kv_positions": jnp.zeros((2, 6), int)}
    given = with_biases(draw(2, 5, slots=6), 6) | place
    jax.eval_shape(cached_attention, **given)
    assert_raises_one_line(cached_attention, given | fault, message)
