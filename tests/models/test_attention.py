"""Each attention against its paper's equation, written as loops over tokens in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.attention import (
    aft,
    bidirectional,
    differential,
    forgetting,
    mla,
    path,
    softmax,
)
from models.parts import rotary
from tests import subject
from tests.tolerance import assert_close

LENGTH = 11


def outputs(config):
    """(weights, x (T, D), y (T, D)) in float64; zero weights are drawn, so that they count."""
    one = subject.of(config)
    graph, params = one.graph, one.params
    rng = np.random.default_rng(0)
    weights = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    drawn = lambda p: p + 0.3 * rng.normal(size=p.shape) * (np.std(p) == 0)
    weights = jax.tree.map(drawn, weights)
    x = rng.normal(size=(1, LENGTH, subject.WIDTH))
    with jax.enable_x64(True):
        run = jax.jit(lambda w, x: nnx.merge(graph, w)(x)[0])
        y = run(jax.tree.map(jnp.asarray, weights), jnp.asarray(x))
    return weights, x[0], np.asarray(y)[0]


def rms(x, scale):
    """RMS norm of the last axis."""
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * scale


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def turn(x, rates, magnitude=1.0):
    """x (T, H, K): pairs (i, i + n) of the first 2 n numbers as complex ones, turned by t rate."""
    n = len(rates)
    pairs = x[..., :n] + 1j * x[..., n : 2 * n]
    pairs = magnitude * pairs * np.exp(1j * np.arange(len(x))[:, None, None] * rates)
    return np.concatenate([pairs.real, pairs.imag, x[..., 2 * n :]], axis=-1)


def plain_rates(dim):
    """The frequencies of a head's pairs, rounded as the model has them."""
    return (10_000.0 ** -(np.arange(dim // 2) / (dim // 2))).astype(np.float32).astype(float)


def turned(x, dim=None):
    return turn(x, plain_rates(dim or x.shape[-1]))


def attend(q, k, v, visible, *, bias=None, cap=0.0, sinks=None, scale=None):
    """One query and one head at a time; `visible(t, s)` and `bias(t, s, h)` say what is seen."""
    out = np.zeros((len(q), q.shape[1], v.shape[-1]))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    for t in range(len(q)):
        for h in range(q.shape[1]):
            g = h * k.shape[1] // q.shape[1]
            seen = [s for s in range(len(k)) if visible(t, s)]
            score = np.array([scale * q[t, h] @ k[s, g] for s in seen])
            score = cap * np.tanh(score / cap) if cap else score
            score = score + (0 if bias is None else [bias(t, s, h) for s in seen])
            power = np.exp(score)
            rest = 0 if sinks is None else np.exp(sinks[h])
            out[t, h] = power @ v[seen, g] / (power.sum() + rest)
    return out


def causally(t, s):
    return s <= t


def yarn_by_hand(config, dim):
    """Frequencies and magnitude of arXiv 2309.00071, pair by pair; the ramp of the released code.

    Pair i turns `context * base^(-2 i / dim) / 2 pi` times within the trained context.
    """
    scale, rates = config.rope_factor, []
    place = lambda turns: (
        dim * np.log(config.rope_context / (2 * np.pi * turns)) / (2 * np.log(config.rope_base))
    )
    first, last = max(0, np.floor(place(32))), min(dim - 1, np.ceil(place(1)))
    for i in range(dim // 2):
        rate = config.rope_base ** (-2 * i / dim)
        divided = min(1.0, max(0.0, (i - first) / (last - first)))
        rates.append(divided * rate / scale + (1 - divided) * rate)
    return np.array(rates, np.float32).astype(float), 0.1 * np.log(scale) + 1


@pytest.mark.parametrize("name", softmax.CASES)
def test_softmax_attention(name):
    config = softmax.CASES[name]
    w, x, y = outputs(config)
    q = np.einsum("td,dhk->thk", x, w["q"])
    k, v = np.einsum("td,dpgk->ptgk", x, w["kv"])
    if config.qk_norm:
        q, k = rms(q, w["norms"][0]), rms(k, w["norms"][1])
    bias = None
    if config.positions == "alibi":
        bias = lambda t, s, h: -(2.0 ** (-2 * (h + 1))) * (t - s)
    elif config.rope_scaling == "yarn":
        rates, magnitude = yarn_by_hand(config, 8)
        q, k = turn(q, rates, magnitude), turn(k, rates, magnitude)
    else:
        q, k = turned(q), turned(k)
    near = lambda t, s: causally(t, s) and (not config.window or t - s < config.window)
    sinks = w["sinks"] if config.sinks else None
    o = attend(q, k, v, near, bias=bias, cap=config.softcap, sinks=sinks)
    if config.gated:
        o = o * sigmoid(np.einsum("td,dhk->thk", x, w["gate"]))
    # The angles of rotary positions are float32 in any case.
    assert_close(y, np.einsum("thk,hkd->td", o, w["o"]), jnp.float32, name)


@pytest.mark.parametrize("name", forgetting.CASES)
def test_forgetting_attention(name):
    w, x, y = outputs(forgetting.CASES[name])
    q = np.einsum("td,dhk->thk", x, w["q"])
    kv = np.einsum("td,dphk->tphk", x, w["kv"])
    log_f = np.log(sigmoid(np.einsum("td,dh->th", x, w["forget"]) + w["forget_bias"]))
    if name == "fox_pro":
        mix = sigmoid(np.einsum("td,dph->tph", x, w["shift"]))[..., None]
        before = np.concatenate([0 * kv[:1], kv[:-1]])
        kv = mix * before + (1 - mix) * kv
        q = rms(q, w["norms"][0])
        kv[:, 0] = rms(kv[:, 0], w["norms"][1])
    bias = lambda t, s, h: sum(log_f[i, h] for i in range(s + 1, t + 1))
    o = attend(q, kv[:, 0], kv[:, 1], causally, bias=bias)
    if name == "fox_pro":
        o = rms(o, w["norms"][2]) * sigmoid(np.einsum("td,dhk->thk", x, w["gate"]))
    assert_close(y, np.einsum("thk,hkd->td", o, w["o"]), jnp.float64, name)


@pytest.mark.parametrize("name", mla.CASES)
def test_latent_attention(name):
    config = mla.CASES[name]
    w, x, y = outputs(config)
    inputs = rms(x @ w["q_down"], w["q_norm"]) if config.q_rank else x
    q = np.einsum("tr,rhk->thk", inputs, w["q"])
    c = rms(x @ w["kv_down"], w["kv_norm"])
    dim = w["k_up"].shape[-1]
    shared = turned((x @ w["k_rope"])[:, None])
    q = np.concatenate([q[..., :dim], turned(q[..., dim:])], -1)
    k = np.einsum("tr,rhk->thk", c, w["k_up"])
    k = np.concatenate([k, np.repeat(shared, k.shape[1], 1)], -1)
    o = attend(q, k, np.einsum("tr,rhv->thv", c, w["v_up"]), causally)
    assert_close(y, np.einsum("thv,hvd->td", o, w["o"]), jnp.float32, name)


def test_differential_attention():
    config = differential.Config()
    w, x, y = outputs(config)
    q_1, q_2 = (turned(np.einsum("td,dhk->thk", x, w["q"][:, i])) for i in (0, 1))
    k_1, k_2 = (turned(np.einsum("td,dhk->thk", x, w["k"][:, i])) for i in (0, 1))
    v = np.einsum("td,dhv->thv", x, w["v"])
    first, second = (np.exp(w["lambda_q"][i] @ w["lambda_k"][i]) for i in (0, 1))
    weight = first - second + config.lambda_init
    o = attend(q_1, k_1, v, causally) - weight * attend(q_2, k_2, v, causally)
    o = o / np.sqrt(np.mean(o**2, -1, keepdims=True) + 1e-5) * w["norm"]
    o = o * (1 - config.lambda_init)
    assert_close(y, np.einsum("thv,hvd->td", o, w["o"]), jnp.float32, "differential")


@pytest.mark.parametrize("name", aft.CASES)
def test_attention_free_transformer(name):
    config = aft.CASES[name]
    w, x, y = outputs(config)
    q, k, v = np.einsum("td,dpc->ptc", x, w["qkv"])
    bias = np.zeros((LENGTH, 1))
    if config.form == "local":
        bias = w["bias"][:, None]
    if config.form == "conv":
        b = w["bias"]
        normed = (b - b.mean(1, keepdims=True)) / np.sqrt(b.var(1, keepdims=True) + 1e-12)
        bias = (w["gain"][:, None] * normed + w["offset"][:, None]).T
        bias = np.repeat(bias, k.shape[1] // bias.shape[1], axis=1)
    mean = np.zeros_like(q)
    for t in range(LENGTH):
        power = [np.exp(k[s] + (bias[t - s] if t - s < len(bias) else 0)) for s in range(t + 1)]
        mean[t] = sum(p * v[s] for s, p in enumerate(power)) / sum(power)
    assert_close(y, sigmoid(q) * mean @ w["o"], jnp.float64, name)


@pytest.mark.parametrize("name", path.CASES)
def test_path_attention(name):
    w, x, y = outputs(path.CASES[name])
    q, k, v = np.einsum("td,dphk->pthk", x, w["qkv"])
    u = np.einsum("td,dr,rhk->thk", x, w["w_down"], w["w_up"])
    taps = w["w_conv"]["taps"]
    u = np.concatenate([0 * u[: len(taps) - 1], u])
    u = sum(taps[i] * u[i : i + LENGTH] for i in range(len(taps))) + w["w_conv"]["bias"]
    u = u / np.sqrt(np.sum(u**2, -1, keepdims=True) + 1e-6)
    gates = np.einsum("td,dph->pth", x, w["gates"]) + w["gate_bias"][:, None]
    beta = 2 * sigmoid(gates[0])
    log_f = np.log(sigmoid(gates[1])) if name == "path_fox" else 0 * beta

    def extra(t, s, h):
        product = np.eye(k.shape[-1])
        for i in range(s + 1, t + 1):
            product = product @ (np.eye(len(product)) - beta[i, h] * np.outer(u[i, h], u[i, h]))
        change = k[s, h] @ product @ q[t, h] - k[s, h] @ q[t, h]
        return change * k.shape[-1] ** -0.5 + log_f[s + 1 : t + 1, h].sum()

    o = attend(q, k, v, causally, bias=extra)
    assert_close(y, np.einsum("thk,hkd->td", o, w["o"]), jnp.float64, name)


def test_a_local_layer_tells_documents_by_their_order():
    """A number that comes back within reach is another document."""
    one, x = subject.of(bidirectional.Config(reach=40)), subject.inputs(LENGTH)
    numbers = np.repeat([[1, 2, 1], [1, 2, 3]], [4, 3, 4], axis=1)
    again, new = (one.run(x, np.broadcast_to(row, x.shape[:2]))[0] for row in numbers)
    assert_close(again, new, np.float32, "numbers that come back")


@pytest.mark.parametrize("name", bidirectional.CASES)
def test_bidirectional_attention(name):
    config = bidirectional.CASES[name]
    w, x, y = outputs(config)
    q, k, v = np.einsum("td,dphk->pthk", x, w["qkv"])
    if config.qk_norm:
        q, k = rms(q, w["norms"][0]), rms(k, w["norms"][1])
    near = lambda t, s: not config.reach or abs(t - s) <= config.reach
    o = attend(turned(q), turned(k), v, near)
    assert_close(y, np.einsum("thk,hkd->td", o, w["o"]), jnp.float32, name)


def test_a_local_encoder_sees_its_reach_and_no_more():
    """Over many blocks of queries, not within one."""
    one = subject.of(bidirectional.Config(reach=40))
    graph, params = one.graph, one.params
    x = jnp.asarray(subject.inputs(150, batch=1))
    reach = jax.jit(jax.grad(lambda x: nnx.merge(graph, params)(x)[0][0, 75].sum()))(x)
    seen = np.flatnonzero(np.abs(np.asarray(reach)[0]).sum(-1))
    np.testing.assert_array_equal(seen, np.arange(35, 116))


def test_an_encoder_has_no_state():
    module = bidirectional.Config().build(64, nnx.Rngs(0))
    for call in (
        lambda: module.init_state(1, 8),
        lambda: module(jnp.ones((1, 2, 64)), state=()),
    ):
        with pytest.raises(ValueError, match="is bidirectional: it has no state"):
            call()


def test_ntk_keeps_the_fastest_pair_and_divides_the_slowest():
    plain, _ = rotary.Rotary().frequencies(16)
    scaled, magnitude = rotary.Rotary(scaling="ntk", factor=8.0).frequencies(16)
    assert scaled[0] == plain[0] and magnitude == 1.0
    np.testing.assert_allclose(scaled[-1], plain[-1] / 8)


def test_linear_interpolation_reads_a_position_as_one_divided():
    x = jnp.asarray(subject.inputs(5))[:, :, None]
    far = rotary.Rotary(factor=4.0)(x, 4 * jnp.arange(5)[None])
    assert_close(far, rotary.Rotary()(x, jnp.arange(5)[None]), jnp.float32, "interpolated")


def test_alibi_slopes_of_a_count_that_is_no_power_of_two():
    """As the paper's section 3 and its code: the four of 4 heads, then the odd ones of 8."""
    powers = [-2, -4, -6, -8, -1, -3]
    np.testing.assert_allclose(softmax.alibi_slopes(6), 2.0 ** np.array(powers))
