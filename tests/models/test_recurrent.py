"""Recurrent mixers against loops that follow the papers token by token, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.parts import nonlinear_scan
from models.recurrent import gru, hgrn, lstm, min_gru, min_lstm, qrnn, rwkv4, slstm, sru
from tests import subject
from tests.tolerance import assert_close

WIDTH, LENGTH = 8, 12


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def normed(x, groups=1):
    x = x.reshape(groups, -1)
    x = x - x.mean(-1, keepdims=True)
    return (x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)).reshape(-1)


def positive(x):
    return np.where(x >= 0, x + 0.5, sigmoid(x))


def loop_hgrn(w, x, bound=0.5):
    h, out = 0, []
    for token in x:
        forget = bound + (1 - bound) * sigmoid(token @ w["forget"] + w["forget_bias"])
        c = silu(np.einsum("d,dpc->pc", token, w["c"]) + w["c_bias"])
        gate = silu(np.einsum("d,dpc->pc", token, w["gate"]) + w["gate_bias"]).reshape(-1)
        if "phase" in w:
            h = forget * np.exp(1j * w["phase"]) * h + (1 - forget) * (c[0] + 1j * c[1])
            parts = np.concatenate([h.real, h.imag])
        else:
            h = forget * h + (1 - forget) * c[0]
            parts = h
        read = (normed(parts) * w["norm"] + w["norm_bias"]) * gate
        out.append(read @ w["o"].reshape(len(read), -1))
    return out


def loop_min_gru(w, x):
    h, out = 0, []
    for token in x:
        z, candidate = np.einsum("d,dpc->pc", token, w["w"]) + w["bias"]
        h = (1 - sigmoid(z)) * h + sigmoid(z) * positive(candidate)
        out.append(h @ w["o"])
    return out


def loop_min_lstm(w, x):
    h, out = 0, []
    for token in x:
        f, i, candidate = np.einsum("d,dpc->pc", token, w["w"]) + w["bias"]
        total = sigmoid(f) + sigmoid(i)
        h = sigmoid(f) / total * h + sigmoid(i) / total * positive(candidate)
        out.append(h @ w["o"])
    return out


def loop_sru(w, x):
    c, out = 0, []
    for token in x:
        u, f, r = np.einsum("d,dpc->pc", token, w["w"])
        f = sigmoid(f + w["v"][0] * c + w["bias"][0])
        r = sigmoid(r + w["v"][1] * c + w["bias"][1])
        c = f * c + (1 - f) * u
        out.append(r * c + (1 - r) * token * np.sqrt(3))
    return out


def loop_rwkv4(w, x):
    """The sum itself (section 3.1), every token's weights anew."""
    keys, values, out = [], [], []
    for t, token in enumerate(x):
        before = x[t - 1] if t else 0 * token
        mixed = w["mix"] * token + (1 - w["mix"]) * before
        r, k, v = np.einsum("pd,pdc->pc", mixed, w["w"])
        past = [k_s - (t - 1 - s) * np.exp(w["decay"]) for s, k_s in enumerate(keys)]
        weights = np.exp(np.stack([*past, w["bonus"] + k]))
        keys.append(k)
        values.append(v)
        wkv = (weights * np.stack(values)).sum(0) / weights.sum(0)
        out.append(sigmoid(r) * wkv @ w["o"])
    return out


def loop_qrnn(w, x):
    c, out, window = 0, [], len(w["w"])
    padded = np.concatenate([np.zeros((window - 1, WIDTH)), x])
    for t in range(len(x)):
        recent = padded[t : t + window][::-1]
        z, f, o = np.einsum("wd,wdpc->pc", recent, w["w"]) + w["bias"]
        c = sigmoid(f) * c + (1 - sigmoid(f)) * np.tanh(z)
        out.append(sigmoid(o) * c @ w["o"])
    return out


def loop_gru(w, x):
    h, out = np.zeros(WIDTH), []
    for token in x:
        given = np.einsum("d,dpc->pc", token, w["w"]) + w["bias"]
        again = np.einsum("d,dpc->pc", h, w["recurrent"])
        r, z = sigmoid(given[0] + again[0]), sigmoid(given[1] + again[1])
        n = np.tanh(given[2] + r * (again[2] + w["reset_bias"]))
        h = (1 - z) * n + z * h
        out.append(h @ w["o"])
    return out


def loop_lstm(w, x):
    h = c = np.zeros(WIDTH)
    out = []
    for token in x:
        i, f, o, z = (
            np.einsum("d,dpc->pc", token, w["w"])
            + np.einsum("d,dpc->pc", h, w["recurrent"])
            + w["bias"]
        )
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(z)
        h = sigmoid(o) * np.tanh(c)
        out.append(h @ w["o"])
    return out


def loop_slstm(w, x):
    """Equations 8 to 14, without the stabiliser of 15 to 17."""
    heads, dim = w["norm"].shape
    h, c, n, out = np.zeros((heads, dim)), 0, 0, []
    padded = np.concatenate([np.zeros((3, WIDTH)), x]).reshape(-1, heads, dim)
    for t, token in enumerate(padded[3:]):
        u = silu((padded[t : t + 4] * w["conv"]["taps"]).sum(0) + w["conv"]["bias"])
        again = np.einsum("hk,phkv->phv", h, w["recurrent"]) + w["bias"]
        i, f = np.einsum("hk,phkv->phv", u, w["gates"]) + again[:2]
        z, o = np.einsum("hk,phkv->phv", token, w["zo"]) + again[2:]
        c = sigmoid(f) * c + np.exp(i) * np.tanh(z)
        n = sigmoid(f) * n + np.exp(i)
        h = sigmoid(o) * c / n
        out.append(normed(h, heads) * w["norm"].reshape(-1))
    return out


def drawn(config):
    """Graph and random float64 weights, those that start at zero too."""
    graph, params = nnx.split(nnx.eval_shape(lambda: config.build(WIDTH, nnx.Rngs(0))))
    draw = np.random.default_rng(1).normal
    return graph, jax.tree.map(lambda p: 0.5 * draw(size=p.shape), nnx.to_pure_dict(params))


@pytest.mark.parametrize(
    ("config", "loop"),
    [
        (hgrn.Config(), loop_hgrn),
        (hgrn.Config(complex=False), loop_hgrn),
        (min_gru.Config(), loop_min_gru),
        (min_lstm.Config(), loop_min_lstm),
        (sru.Config(), loop_sru),
        (rwkv4.Config(), loop_rwkv4),
        (qrnn.Config(), loop_qrnn),
        (qrnn.Config(window=4), loop_qrnn),
        (gru.Config(), loop_gru),
        (lstm.Config(), loop_lstm),
        (slstm.Config(heads=2), loop_slstm),
    ],
)
def test_the_papers_loop(config, loop):
    graph, weights = drawn(config)
    x = np.random.default_rng(2).normal(size=(1, LENGTH, WIDTH))
    with jax.enable_x64(True):
        y, _ = subject.run(graph, weights, x)
        assert_close(y[0], np.stack(loop(weights, x[0])), jnp.float64, "the paper's loop")


def test_sru_starts_as_released():
    """All uniform: the candidate's map of variance 1 / d, the gates' of half, v within 1.2247."""
    module = sru.Config().build(512, nnx.Rngs(0))
    w, v = np.asarray(module.w[...]), np.asarray(module.v[...])
    np.testing.assert_allclose(w.var((0, 2)) * 512, [1, 0.5, 0.5], rtol=0.01)
    np.testing.assert_allclose(
        np.abs(w).max((0, 2)) * 512**0.5, [1.7321, 1.2247, 1.2247], rtol=1e-3
    )
    assert 1.2 < np.abs(v).max() <= 1.2248
    np.testing.assert_array_equal(module.bias[...], 0)


def test_a_large_key_of_rwkv4_does_not_overflow():
    """exp(k) would: sums are kept relative to the largest exponent."""
    graph, weights = drawn(rwkv4.Config())
    x = 1e4 * np.random.default_rng(0).normal(size=(1, LENGTH, WIDTH))
    y, state = subject.run(graph, weights, x)
    assert np.isfinite(np.asarray(y)).all()
    assert float(state["bb"].min()) >= 1


@pytest.mark.parametrize(("bound", "low", "high"), [(0.0, 0, 1e-12), (0.99, 1e-5, 1)])
def test_the_lower_bound_of_hgrn_is_memory(bound, low, high):
    """What is left of the first token after 200."""
    graph, weights = drawn(hgrn.Config(complex=False, lower_bound=bound))
    weights["c_bias"] = 0 * weights["c_bias"]
    x = np.zeros((1, 200, WIDTH))
    x[0, 0] = 1
    _, state = subject.run(graph, weights, x)
    assert low <= np.abs(np.asarray(state)).max() <= high


def test_a_nonlinear_scan_over_whole_chunks_and_a_rest(monkeypatch):
    """h_t = tanh(w h_{t-1} + x_t) with two documents between padding, and its gradient."""
    monkeypatch.setattr(nonlinear_scan, "CHUNK", 4)
    length = 11
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, length, 3)), jnp.float32)
    segments = np.asarray([[0, 3, 3, 3, 3, 3, 1, 1, 1, 0, 0]])
    h = jnp.asarray(rng.normal(size=(1, 3)), jnp.float32)

    def step(w, h, x):
        h = jnp.tanh(w * h + x)
        return h, h

    def fast(w):
        last, out = nonlinear_scan.scan(step, w, h, x, jnp.asarray(segments))
        return out.sum() + last.sum(), (out, last)

    def slow(w):
        state, out = h, []
        for t, number in enumerate(segments[0]):
            state = 0 * state if t == 6 else state
            after, _ = step(w, state, x[:, t])
            out.append(after if number else 0 * after)
            state = after if number else state
        out = jnp.stack(out, axis=1)
        return out.sum() + state.sum(), (out, state)

    got, want = (
        jax.jit(jax.value_and_grad(f, has_aux=True))(jnp.float32(0.9)) for f in (fast, slow)
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(a, b, jnp.float32, "scan")
