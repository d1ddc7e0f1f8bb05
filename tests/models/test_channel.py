"""Channel mixers and mixtures of experts: against loops over tokens, and what routers report."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import auxiliary, mixer
from models.attention import moa
from models.channel import deepseek_moe, expert_choice, noisy_topk, soft_moe, zero_computation
from models.parts import capacity, routing, ternary
from tests.models.channel_loops import LENGTH, NAIVE, SIZES, WIDTH, softmax
from tests.tolerance import assert_close

MIXTURES = [
    *("dropless", "switch", "gshard", "noisy_topk", "deepseek_moe", "expert_choice"),
    *("zero_computation", "moa"),
]


# Small programs that run once: nearly all of their time is compilation.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def activations(batch=1, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, LENGTH, WIDTH))


def built(config):
    """Graph and weights (a nested dict)."""
    graph, state = nnx.split(config.build(WIDTH, nnx.Rngs(0)))
    return graph, nnx.to_pure_dict(state)


def call(graph, params, x, segments=None):
    """Outputs of a call, and the first value of each loss and measure by name."""
    with auxiliary.collecting() as found:
        y, _ = nnx.merge(graph, params)(x, segments=segments)
    first = lambda kind: {name: values[0] for name, values in found[kind].items()}
    return y, first("losses"), first("metrics")


run = jit(call, static_argnums=0)


def shaken(config):
    """The mixer, weights moved so that zeros are none: graph and weights."""
    graph, params = built(config)
    rng = np.random.default_rng(1)
    moved = lambda w: np.asarray(w, np.float64) + 0.1 * rng.normal(size=w.shape)
    return graph, jax.tree.map(moved, params)


@pytest.mark.parametrize("name", NAIVE)
def test_equals_a_loop_over_tokens(name):
    config, naive = NAIVE[name]
    with jax.enable_x64(True):
        graph, params = shaken(config)
        x = activations()
        y, _, _ = run(graph, params, jnp.asarray(x))
        assert_close(y[0], naive(config, params, x[0]), y.dtype, name)


@pytest.mark.parametrize("name", ["switch", "gshard"])
def test_capacity_drops_in_these_tests(name):
    """Else the loops above would prove nothing about it."""
    config, _ = NAIVE[name]
    _, _, metrics = run(*built(config), jnp.asarray(activations(), jnp.float32))
    assert 0.02 < metrics["dropped"] < 0.5


def test_capacity_counts_kept_choices_along_the_document():
    """Two experts, factor 1, at least 1: up to token t expert 0 keeps (t + 1) / 2, rounded up."""
    expert = jnp.asarray([[0, 0, 0, 1, 0, 2, 0, 0, 0]])[..., None]
    ids = jnp.asarray([[1, 1, 1, 1, 1, 0, 2, 2, 2]])
    keep = jit(functools.partial(capacity.keep, factor=1.0, least=1))
    kept, state = keep(expert, capacity.empty_counts(1, 2), ids)
    assert kept[0, :, 0].tolist() == [0, 2, 0, 1, 0, 2, 0, 2, 0]
    assert state["counts"].tolist() == [[2, 0]] and state["position"].tolist() == [3]
    more, _ = keep(jnp.asarray([[[1], [0], [0]]]), state, None)
    assert more.tolist() == [[[1], [0], [2]]]


def test_an_overloaded_expert_keeps_its_share_to_the_end():
    """All of 64 tokens choose one of four experts: it keeps a quarter of them, not the first 8."""
    expert = jnp.zeros((1, 64, 1), jnp.int32)
    kept, _ = capacity.keep(expert, capacity.empty_counts(1, 4), None, factor=1.0, least=8)
    at = np.flatnonzero(np.asarray(kept)[0, :, 0] == 0)
    assert at.tolist() == [*range(8), *range(32, 64, 4)]


@pytest.mark.parametrize(
    ("chosen", "want"), [((4, 5), 1.0), ((5, 4), 1.0), ((4,), 0.0), ((5,), 1.0)]
)
def test_zero_computation_divides_by_the_weights_kept(chosen, want):
    """Of the zero expert (4) and the copy (5) the copy has all; the zero expert alone gives 0."""
    config = zero_computation.Config(experts=4, constants=1, top_k=len(chosen), hidden=8)
    module = config.build(WIDTH, nnx.Rngs(0))
    logits = np.full(7, -9.0)
    logits[list(chosen)] = 3.0 - np.arange(len(chosen))
    x = jnp.ones((1, 2, WIDTH))
    module.router[...] = jnp.broadcast_to(jnp.asarray(logits) / WIDTH, (WIDTH, 7))
    y, _, _ = run(*nnx.split(module), x)
    np.testing.assert_allclose(y, want * x, rtol=1e-6)


@pytest.mark.parametrize("name", MIXTURES)
def test_padding_changes_nothing(name):
    """Neither the outputs nor what is reported, whatever the padding holds."""
    config, _ = NAIVE[name]
    x = jnp.asarray(activations(), jnp.float32)
    padded = jnp.concatenate([100 * x[:, :3], x, 50 * x[:, :5]], axis=1)
    ids = jnp.pad(jnp.ones((1, LENGTH), jnp.int32), ((0, 0), (3, 5)))
    want, *said = run(*built(config), x)
    got, *said_padded = run(*built(config), padded, ids)
    assert_close(got[:, 3:-5], want, jnp.float32, "outputs")
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, said_padded, said)


@pytest.mark.parametrize("name", MIXTURES)
def test_gradients_reach_the_router(name):
    """From the outputs and from the losses, each alone."""
    config, _ = NAIVE[name]
    graph, params = built(config)
    x = jnp.asarray(activations(), jnp.float32)

    def parts(params):
        y, losses, _ = call(graph, params, x)
        return jnp.stack([jnp.sum(jnp.sin(y)), *losses.values()])

    for of_one in np.asarray(jit(jax.jacrev(parts))(params)["router"]):
        assert np.isfinite(of_one).all() and np.abs(of_one).max() > 1e-8


def test_balance_is_one_when_even():
    """E sum f P of a router that gives every expert an equal share."""
    probs = jax.nn.softmax(5 * jnp.eye(4))[None]
    expert = jnp.arange(4)[None, :, None]
    even = routing.balance(probs, expert, jnp.ones((1, 4), bool))
    np.testing.assert_allclose(even, 1.0, rtol=1e-6)
    uneven = routing.balance(probs[:, :1], expert[:, :1], jnp.ones((1, 1), bool))
    assert uneven > 3


def test_z_is_the_mean_square_of_logsumexp():
    logits = np.random.default_rng(0).normal(size=(2, 5, 4))
    want = np.mean(np.log(np.exp(logits).sum(-1)) ** 2)
    np.testing.assert_allclose(routing.z(jnp.asarray(logits), jnp.ones((2, 5), bool)), want, 1e-5)


def test_smooth_load_is_the_chance_under_fresh_noise():
    """P(x, e) of eqs. 8 and 9: the k-th highest of the others, taken literally."""
    logits = np.random.default_rng(0).normal(size=(1, 3, 5))
    scale, top_k = np.full(logits.shape, 0.7), 2
    got = np.asarray(noisy_topk.smooth_load(jnp.asarray(logits), jnp.asarray(scale), top_k))
    for t, row in enumerate(logits[0]):
        for e, logit in enumerate(row):
            rival = np.sort(np.delete(row, e))[-top_k]
            want = 0.5 * (1 + math.erf((logit - rival) / 0.7 / math.sqrt(2)))
            np.testing.assert_allclose(got[0, t, e], want, rtol=1e-5)


def test_bias_gradient_is_the_excess_of_load():
    """Whatever the loss, and not through the weights."""
    config, _ = NAIVE["deepseek_moe"]
    graph, params = built(config)
    x = jnp.asarray(activations(), jnp.float32)

    @functools.partial(jit, static_argnums=1)
    def gradient(params, factor):
        def loss(params):
            y, _, metrics = call(graph, params, x)
            return factor * jnp.sum(jnp.sin(y)), metrics["load_max"]

        return jax.grad(loss, has_aux=True)(params)

    for factor in (1.0, -3.0):
        grads, load_max = gradient(params, factor)
        even = LENGTH * config.top_k / config.experts
        excess = grads["bias"] / deepseek_moe.TINY
        np.testing.assert_allclose(excess.sum(), 0, atol=1e-4)
        np.testing.assert_allclose(excess.max() / even + 1, load_max, rtol=1e-5)


def test_sign_steps_of_the_bias_even_the_load():
    """Activations with a common part, so that a few experts get most of them."""
    config = deepseek_moe.Config(experts=8, hidden=8, top_k=2, groups=1, top_groups=1)
    graph, params = built(config)
    x = jnp.asarray(activations(8) + 1.0, jnp.float32)
    gradient = jit(jax.grad(lambda params: jnp.sum(call(graph, params, x)[0])))
    uneven = []
    for _ in range(40):
        excess = gradient(params)["bias"] / deepseek_moe.TINY
        uneven.append(float(jnp.std(excess)))
        params["bias"] = params["bias"] - 0.02 * jnp.sign(excess)
    assert np.mean(uneven[-10:]) < uneven[0] / 4


def test_sequence_balance_is_that_of_each_document():
    """A packed row: the mean by tokens of what its documents have alone."""
    rng = np.random.default_rng(0)
    probs = jnp.asarray(softmax(rng.normal(size=(1, 12, 4))), jnp.float32)
    hot = jnp.asarray(rng.integers(0, 2, size=(1, 12, 4)), jnp.int32)
    ids = jnp.asarray([[0, 1, 1, 1, 1, 1, 2, 2, 0, 3, 3, 3]])
    packed = jit(deepseek_moe.sequence_balance)(probs, hot, ids)
    alone = 0.0
    for a, b in ((1, 6), (6, 8), (9, 12)):
        share, mean = np.mean(hot[0, a:b], 0), np.mean(probs[0, a:b], 0)
        alone += (b - a) / 10 * 4 * np.sum(share * mean)
    np.testing.assert_allclose(packed, alone, rtol=1e-5)


def test_expert_choice_looks_ahead():
    """The first token loses its experts to better ones that come later: not for language models."""
    assert not expert_choice.Mixer.causal
    graph, params = built(expert_choice.Config(**SIZES, capacity_factor=1.0))
    x = jnp.asarray(activations(), jnp.float32)[:, :4]
    first = []
    for other in (-1, 1):
        # The best expert of the first token likes the others less than it, or more.
        best = int(jnp.argmax(x[0, 0] @ params["router"]))
        later = x.at[:, 1:].set(10 * other * params["router"][:, best])
        first.append(np.asarray(run(graph, params, later)[0])[0, 0])
    assert np.abs(first[0]).max() > 1e-3 and np.abs(first[0] - first[1]).max() > 1e-3


def test_more_documents_than_slots_for_them_are_nan():
    x = jnp.asarray(activations(2), jnp.float32)[:, :6]
    ids = jnp.asarray([[1, 1, 2, 2, 3, 3], [1, 1, 1, 1, 2, 2]])
    y, _, _ = run(*built(soft_moe.Config(**SIZES, documents=2)), x, ids)
    assert np.isnan(np.asarray(y[0])).all() and np.isfinite(np.asarray(y[1])).all()


def test_gradients_pass_straight_through_rounding():
    """As of x + stop(round(x) - x) of each normalised input and each weight."""
    stop = jax.lax.stop_gradient
    rng = np.random.default_rng(0)
    x, w = jnp.asarray(rng.normal(size=(1, 5, 8))), jnp.asarray(rng.normal(size=(8, 6)))

    def straight(x, w):
        x = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + ternary.EPS)
        x_whole, x_step, w_whole, w_step = ternary.rounded(x, w)
        return (x + stop(x_whole * x_step - x)) @ (w + stop(w_whole * w_step - w))

    rounded = lambda x, w: ternary.bit_linear("btd,df->btf", x, w, jnp.float32)
    total = lambda f: lambda x, w: jnp.sin(f(x, w)).sum()
    one, other = (jit(jax.value_and_grad(total(f), (0, 1)))(x, w) for f in (rounded, straight))
    for got, want in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert_close(got, want, jnp.float32, "straight through")


def test_rounding_is_exact_in_bfloat16():
    """Whole numbers to 127 are; so a product in bfloat16 has the bits of one in float32."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, 5, 64)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(64, 6)), jnp.float32)
    one, other = (
        ternary.bit_linear("btd,df->btf", x, w, dtype) for dtype in (jnp.float32, jnp.bfloat16)
    )
    np.testing.assert_array_equal(one, other)


def test_keys_and_values_do_not_grow_with_experts():
    """MoA's point: the cache is that of kv_heads heads."""
    few, many = (mixer.state_bytes(moa.Config(experts=n), 64, 100) for n in (4, 32))
    assert few == many
