"""State spaces against loops over time, or sums over lags, written from the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.parts import diagonal
from models.state_space import dss, lru, mamba3, s4d, s5
from tests.models.stirred import mapped, rms, run, sigmoid, silu, softplus
from tests.tolerance import assert_close


def gelu(x):
    return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2


def parts(pair):
    return pair[0] + 1j * pair[1]


def glu(y, p):
    a, b = np.moveaxis(mapped(gelu(y), p["o"]) + p["o_bias"], 1, 0)
    return a * sigmoid(b)


def lags(x, kernel):
    """sum_l kernel[l] x_{t-l} of (T, D)."""
    return np.stack([np.sum(kernel[: t + 1] * x[t::-1], 0) for t in range(len(x))])


def powers(factor, length):
    return factor ** np.arange(length)[:, None, None]


def test_lru():
    x, y, p = run(lru.Config(state=12))
    factor = np.exp(-np.exp(p["log_rate"]) + 1j * np.exp(p["log_phase"]))
    b, c, h = parts(p["b"].swapaxes(0, 1)), parts(p["c"]), np.zeros(12, complex)
    want = []
    for x_t in x:
        h = factor * h + np.exp(p["log_gain"]) * (x_t @ b)
        want.append((h @ c).real + p["skip"] * x_t)
    assert_close(y, glu(np.stack(want), p), "float64", "LRU")


def test_lru_starts_with_the_variance_of_its_input():
    """gamma = sqrt(1 - |lambda|^2): the modes of white noise have variance one."""
    module = lru.Config(state=64, r_min=0.4, r_max=0.9).build(32, nnx.Rngs(0))
    radius = np.exp(-np.exp(np.asarray(module.log_rate[...])))
    assert_close(np.exp(2 * np.asarray(module.log_gain[...])), 1 - radius**2, "float32", "gamma")
    assert 0.4 < radius.min() < radius.max() < 0.9


@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
def test_s4d_is_the_convolution_of_its_kernel(rule):
    """K_l = 2 Re sum_n C_n bbar_n abar_n^l (arXiv 2206.11893, eq. 4)."""
    x, y, p = run(s4d.Config(state=8, start="inv", discretization=rule))
    dt = np.exp(p["log_dt"])[:, None]
    a = -np.exp(p["log_rate"]) + 1j * p["frequency"]
    if rule == "zoh":
        abar, bbar = np.exp(dt * a), (np.exp(dt * a) - 1) / a
    else:
        abar, bbar = (1 + dt * a / 2) / (1 - dt * a / 2), dt / (1 - dt * a / 2)
    kernel = 2 * np.sum(parts(p["c"]) * bbar * powers(abar, len(x)), -1).real
    assert_close(y, glu(lags(x, kernel) + p["skip"] * x, p), "float64", f"S4D {rule}")


def test_dss():
    """Proposition 1 of arXiv 2203.14343, DSS-exp, with a step for each part of Lambda."""
    x, y, p = run(dss.Config(state=6))
    (dt, turn), a = np.exp(p["log_dt"])[..., None], -np.exp(p["log_rate"]) + 1j * p["frequency"]
    z = dt * a.real + 1j * turn * a.imag
    kernel = parts(p["w"]) * (np.exp(z) - 1) / a * powers(np.exp(z), len(x))
    want = gelu(lags(x, kernel.sum(-1).real) + p["skip"] * x) @ p["o"] + p["o_bias"]
    assert_close(y, want, "float64", "DSS")


def test_dss_channels_share_their_modes():
    """One Lambda for all channels; W, the steps and D are a channel's (released DSSKernel)."""
    module = dss.Config(state=6).build(32, nnx.Rngs(0))
    assert module.log_rate.shape == module.frequency.shape == (6,)
    assert module.w.shape == (2, 32, 6) and module.log_dt.shape == (2, 32)
    np.testing.assert_allclose(np.exp(module.log_rate[...]), 0.5, rtol=1e-6)
    np.testing.assert_array_equal(module.log_dt[0], module.log_dt[1])


def test_s5():
    x, _, p = run(s5.Config(state=16, blocks=2))
    p["rate"][0] = -0.3  # grows: the released code cuts it at 1e-4
    y = again(s5.Config(state=16, blocks=2), p, x)
    dt, a = np.exp(p["log_dt"]), -np.maximum(p["rate"], 1e-4) + 1j * p["frequency"]
    b, c, h = parts(p["b"].swapaxes(0, 1)), parts(p["c"].swapaxes(0, 1)), np.zeros(8, complex)
    want = []
    for x_t in x:
        h = np.exp(dt * a) * h + (np.exp(dt * a) - 1) / a * (x_t @ b)
        want.append(gelu(2 * (c @ h).real + p["skip"] * x_t))
    want = np.stack(want)
    assert_close(y, want * sigmoid(want @ p["gate"] + p["gate_bias"]), "float64", "S5")


def again(config, weights, x):
    """The outputs of one row with other weights."""
    with jax.enable_x64(True):
        graph, _ = nnx.split(config.build(x.shape[1], nnx.Rngs(0)))
        y, _ = jax.jit(lambda weights, x: nnx.merge(graph, weights)(x))(weights, x[None])
        return np.asarray(y)[0]


def test_s5_starts_as_released():
    """Rates of 1/2; B is real and C complex before both are turned into the eigenbasis.

    In a block's eigenbasis a real row b has sum |b_m|^2 = |b|^2 / 2 over half of the modes: of P =
    256 numbers of variance 1 / P it is 1/2; C, of twice the variance, has 1 and no such mirror.
    """
    module = s5.Config(state=256, blocks=8).build(64, nnx.Rngs(0))
    np.testing.assert_allclose(module.rate[...], 0.5, rtol=1e-6)
    square = lambda w: float(jnp.square(w[...]).sum((1, 2)).mean())
    assert 0.45 < square(module.b) < 0.55 and 0.9 < square(module.c) < 1.1


def test_normal_legs():
    """V diag(a) V^* and its conjugate are HiPPO-LegS less its low-rank part."""
    rate, frequency, vectors = diagonal.normal_legs(8)
    n = np.arange(8)
    root = np.sqrt(2 * n + 1.0)
    hippo = -np.tril(np.outer(root, root), -1) - np.diag(n + 1.0)
    normal = hippo + np.outer(root, root) / 2
    got = 2 * (vectors * (-rate + 1j * frequency)) @ vectors.conj().T
    assert_close(got.real, normal, "float64", "HiPPO-N")


def test_modes_are_read_by_chunks():
    """Three chunks with documents across and at their edges equal a loop over tokens."""
    rng = np.random.default_rng(0)
    ids = np.repeat([1, 2, 0, 3, 0], [64, 20, 9, 51, 6])
    x, decay, phase = rng.normal(size=(1, len(ids), 3)), -rng.random((3, 4)), rng.random((3, 4))
    read, start = rng.normal(size=(2, 3, 4)), rng.normal(size=(1, 2, 12))
    with jax.enable_x64(True):
        y, last = diagonal.complex_modes(
            *map(jnp.asarray, (x, decay, phase, read)),
            segments=jnp.asarray(ids[None], jnp.int32),
            initial_state=jnp.asarray(start),
        )
        y, last = np.asarray(y), np.asarray(last)
    h, before, want = parts(start[0]).reshape(3, 4), 1, []
    for number, x_t in zip(ids, x[0], strict=True):
        if number:
            h = np.exp(decay + 1j * phase) * (h if number == before else 0) + x_t[:, None]
            before = number
        want.append(np.sum(parts(read) * h, -1).real * (number != 0))
    assert_close(y[0], np.stack(want), "float64", "outputs")
    assert_close(last[0], np.stack([h.real, h.imag]).reshape(2, -1), "float64", "state")


@pytest.mark.parametrize("rank", [1, 3])
def test_mamba3(rank):
    """S_t = a S_{t-1} + beta B_{t-1} x_{t-1}^T + gamma B_t x_t^T, summed over ranks."""
    x, y, p = run(mamba3.Config(head_dim=16, state=8, rank=rank))
    heads, pairs = 4, 2
    ranks = p.get("ranks", np.ones((3, 1, 1, 1)))
    s, angle = np.zeros((heads, 8, 16)), np.zeros((heads, pairs))
    b_last, v_last, want = np.zeros((rank, heads, 8)), np.zeros((rank, heads, 16)), []
    for x_t in x:
        z, v = mapped(x_t, p["zx"])
        rate, dt, share = mapped(x_t, p["gates"])
        dt, share = softplus(dt + p["dt_bias"]), sigmoid(share)
        alpha = np.exp(-softplus(rate) * dt)
        angle = angle + np.pi * dt[:, None] * np.tanh(mapped(x_t, p["angles"]))
        normed = rms(mapped(x_t, p["bc"]), p["bc_norm"], 1e-5)[:, :, None] + p["bc_bias"]
        b, c = turned(normed, angle)
        v_ranks = v * ranks[0]
        beta, gamma = (1 - share) * dt * alpha, share * dt
        s = (
            scaled(alpha, s)
            + scaled(beta, outer(b_last, v_last))
            + scaled(gamma, outer(b, v_ranks))
        )
        o = np.einsum("hnv,rhn->rhv", s, c) + p["skip"][:, None] * v_ranks
        o = np.sum(o * silu(z * ranks[1]) * ranks[2], 0)
        want.append(np.tensordot(o, p["o"], 2))
        b_last, v_last = b, v_ranks
    assert_close(y, np.stack(want), "float64", f"Mamba-3 of rank {rank}")


def outer(b, v):
    return np.einsum("rhn,rhv->hnv", b, v)


def scaled(weight, s):
    return weight[:, None, None] * s


def turned(x, angle):
    half = angle.shape[-1]
    z = (x[..., :half] + 1j * x[..., half : 2 * half]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag, x[..., 2 * half :]], -1)
