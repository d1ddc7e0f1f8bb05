"""Convolutional mixers against sums over lags and loops over tokens, written from the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import lm, pattern
from models.convolution import gated_conv, h3, hyena, mega, monarch_mixer
from models.parts.implicit_filter import ImplicitFilter
from tests import contract, subject
from tests.models.stirred import conv, mapped, rms, run, sigmoid, silu, softmax
from tests.tolerance import assert_close


def lags(x, kernel):
    """sum_l kernel[l] x_{t-l} of (T, D), for kernels shorter or longer than T."""
    return conv(x, kernel[: len(x)][::-1])


def filters(p, length, count):
    """Filters (F, count, D): a network of sines over the lag, times a window."""
    lag = np.arange(count)[:, None]
    bands = (len(p["maps"][0]) - 1) // 2
    angle = 2 * np.pi * np.linspace(1e-4, bands - 1, bands) * lag / length
    h = np.concatenate([lag / (length - 1), np.cos(angle), -np.sin(angle)], 1)
    for n in range(3):
        h = np.sin(p["frequency"] * (h @ p["maps"][n] + p["biases"][n]))
    out = np.tensordot(h, p["out"], 1)
    rates = np.linspace(3.0701134573, 15.3505672866, out.shape[-1])  # of the released code
    return np.moveaxis(out * np.exp(-rates * lag / (length - 1))[:, None], 1, 0)


def test_gated_conv():
    x, y, p = run(gated_conv.Config(channels=24))
    b, c, u = np.moveaxis(mapped(x, p["bcu"]), 1, 0)
    assert_close(y, (c * conv(b * u, p["conv"]["taps"])) @ p["o"], "float64", "LFM2")


@pytest.mark.parametrize("length", [8, 64])
def test_hyena(length):
    """Filters shorter and longer than the row; three gates."""
    x, y, p = run(hyena.Config(order=3, length=length, filter_hidden=16, filter_bands=4))
    parts = conv(mapped(x, p["xv"]), p["conv"]["taps"], p["conv"]["bias"])
    h, z = filters(p["filters"], length, min(length, len(x))), parts[:, -1]
    for n in range(3):
        z = parts[:, n] * (lags(z, h[n]) + p["skip"][n] * z)
    assert_close(y, z @ p["o"], "float64", "Hyena")


@pytest.mark.parametrize("frequency", [1.0, 10.0])
@pytest.mark.parametrize("length", [64, 1024])
def test_filters_start_with_the_same_energy(length, frequency):
    """The sum of squares of a filter does not depend on how far it reaches, or its sines."""
    h = ImplicitFilter(1, 32, length, nnx.Rngs(0), frequency=frequency)(length)
    assert 0.5 < float(jnp.square(h).sum(1).mean()) < 2


def test_the_windows_of_filters_are_those_released():
    """Three channels fall by e^-3.0701, e^-9.2103 and e^-15.3506 up to the last lag."""
    filters = ImplicitFilter(1, 3, 16, nnx.Rngs(0), hidden=4, bands=2)
    filters.out[...] = jnp.ones_like(filters.out[...])
    h = np.asarray(filters(16))[0]
    fallen = np.log(h[-1] / h[-1, 0]) - np.log(h[0] / h[0, 0])
    np.testing.assert_allclose(fallen, [0, -6.1402, -12.2805], atol=1e-3)
    filters.maps[0][...] = 0 * filters.maps[0][...]  # nothing but the biases is left: one value
    h = np.asarray(filters(16))[0]
    np.testing.assert_allclose(np.log(h[0] / h[-1]), [3.0701, 9.2103, 15.3506], atol=1e-3)


def test_the_network_of_filters_starts_as_torch_draws_it():
    """Maps and biases uniform within 1 / sqrt(inputs), of variance 1 / (3 inputs)."""
    filters = ImplicitFilter(1, 8, 16, nnx.Rngs(0), hidden=256, bands=32)
    for inputs, w, bias in zip((65, 256, 256), filters.maps, filters.biases, strict=True):
        for drawn in (np.asarray(w[...]), np.asarray(bias[...])):
            assert 0.97 < np.abs(drawn).max() * inputs**0.5 <= 1
            assert 0.8 < drawn.var() * 3 * inputs < 1.2


def test_h3():
    x, y, p = run(h3.Config(state=8, shift=5))
    q, k, v = np.moveaxis(mapped(x, p["qkv"]), 1, 0)
    kv = (lags(k, p["taps"]) + p["skips"][0] * k) * v
    dt, a = np.exp(p["log_dt"])[:, None], -np.exp(p["log_rate"]) + 1j * p["frequency"]
    powers = np.exp(dt * a) ** np.arange(len(x))[:, None, None]
    kernel = 2 * np.sum((p["c"][0] + 1j * p["c"][1]) * (np.exp(dt * a) - 1) / a * powers, -1).real
    want = (q * (lags(kv, kernel) + p["skips"][1] * kv)) @ p["o"]
    assert_close(y, want, "float64", "H3")


def test_mega():
    """The update gate goes from the stream itself to h, which reads the normed stream."""
    stream, y, p = run(mega.Config(modes=3, chunk=8))
    x = rms(stream, p["norm"]["scale"])
    u = average(x, p)
    z = silu(u @ p["z"] + p["z_bias"])
    (gain_q, gain_k), (offset_q, offset_k) = p["gain"], p["offset"]
    q, k, v = z * gain_q + offset_q, z * gain_k + offset_k, silu(x @ p["v"] + p["v_bias"])
    o = np.zeros_like(v)
    for t in range(len(x)):
        seen = range(t // 8 * 8, t + 1)
        scores = [q[t] @ k[s] / np.sqrt(q.shape[1]) + bias(p["position"], t, s) for s in seen]
        o[t] = softmax(np.array(scores)) @ v[seen.start : seen.stop]
    phi, h = np.moveaxis(mapped(u, p["gate"]) + p["gate_bias"], 1, 0)
    h = silu(h + (silu(u @ p["r"] + p["r_bias"]) * o) @ p["o"])
    assert_close(y, stream + sigmoid(phi) * (h - stream), "float64", "Mega")


def test_mega_with_an_open_gate_forgets_the_stream():
    """All weights 0 but the norm's and an update gate near 1: h = 0, so x + 1 (0 - x) = 0."""
    config = mega.Config(modes=1, key_dim=2, value_dim=4, chunk=4)
    graph, params = nnx.split(config.build(4, nnx.Rngs(0)))
    module = nnx.merge(graph, jax.tree.map(jnp.zeros_like, params))
    module.norm.scale[...] = jnp.ones(4)
    module.gate_bias[...] = jnp.asarray([[40.0] * 4, [0.0] * 4])
    call = jax.jit(lambda params: nnx.merge(graph, params)(jnp.full((1, 4, 4), 3.0))[0])
    np.testing.assert_allclose(call(nnx.state(module)), 0, atol=1e-6)
    module.gate_bias[...] = jnp.asarray([[-40.0] * 4, [0.0] * 4])  # a shut one keeps it
    np.testing.assert_allclose(call(nnx.state(module)), 3, rtol=1e-6)


def test_mega_is_a_block():
    """No norm and no channel mixer are put around it: `mega,glu` is the paper's layer."""
    blocks = lm.Config(pattern=pattern.parse("mega,glu")).blocks()
    assert blocks[0] == mega.Config() and blocks[1].channel is None


def average(x, p):
    """The damped moving average (arXiv 2209.10655, section 3.1) behind its silu."""
    alpha, delta = sigmoid(p["alpha"]), sigmoid(p["delta"])
    h, u = np.zeros_like(alpha), []
    for x_t in x:
        h = alpha * p["into"] * x_t[:, None] + (1 - alpha * delta) * h
        u.append(silu(np.sum(p["out"] * h, -1) + p["skip"] * x_t))
    return np.stack(u)


def bias(position, t, s):
    """alpha^T R_{s-t} beta: rotary vectors of both positions multiplied."""
    half = position.shape[1] // 2
    angle = 10_000.0 ** (-np.arange(half) / half)
    a, b = (v[:half] + 1j * v[half:] for v in position)
    return np.sum(a * np.exp(1j * t * angle) * np.conj(b * np.exp(1j * s * angle))).real


def test_mega_counts_chunks_inside_a_document():
    """The contract's documents are shorter than the default chunk; here three chunks end."""
    ids = jnp.asarray([np.repeat([0, 1, 2, 0], [3, 7, 13, 2])], jnp.int32)
    module, x = (
        mega.Config(chunk=5).build(32, nnx.Rngs(0)),
        jnp.asarray(subject.inputs(25, batch=1))[..., :32],
    )
    call = jax.jit(lambda x, ids, state: module(x, segments=ids, state=state))
    packed, state = call(x, ids, module.init_state(1, 25))
    after, _ = call(x[:, :1], None, state)
    for start, stop in ((3, 10), (10, 23)):
        alone, state = call(x[:, start:stop], None, module.init_state(1, 25))
        assert_close(packed[:, start:stop], alone, "float32", f"document from {start}")
    assert_close(after, call(x[:, :1], None, state)[0], "float32", "what follows")


def test_mega_goes_on_inside_a_chunk():
    """Pieces that end inside and at the end of chunks, and single tokens, equal the whole."""
    module, x = (
        mega.Config(chunk=5).build(32, nnx.Rngs(0)),
        jnp.asarray(subject.inputs(23, batch=2))[..., :32],
    )
    call, pieces = jax.jit(lambda x, state: module(x, state=state)), []
    whole, want = call(x, module.init_state(2, 23))
    state = module.init_state(2, 23)
    for piece in jnp.split(x, (8, 16, 17, 18, 19, 20, 21, 22), axis=1):
        y, state = call(piece, state)
        pieces.append(y)
    assert_close(jnp.concatenate(pieces, 1), whole, "float32", "pieces")
    contract.close(state, want, "state")


def dense(p, part):
    """The matrix of a Monarch map, entry by entry (arXiv 2204.00595, definition 3.1)."""
    right, left = p["right"][part], p["left"][part]
    blocks, size = len(right), len(left)
    matrix = np.einsum("ijk,kil->ijlk", right, left)
    return matrix.reshape(blocks * size, blocks * size)


@pytest.mark.parametrize("causal", [True, False])
def test_monarch_mixer(causal):
    config = monarch_mixer.Config(
        causal=causal, blocks=8, length=16, filter_hidden=8, filter_bands=2
    )
    x, y, p = run(config)
    into = np.stack([x @ dense(p["into"], part) for part in range(3)], 1)
    v, gate, u = np.moveaxis(conv(into, p["conv"]["taps"], p["conv"]["bias"]), 1, 0)
    h = filters(p["filters"], 16, 16)
    if causal:
        want = gate * (lags(u * v, h[0]) + p["skips"][0] * u * v)
    else:
        want = gate * both_ways(u * v, *h[:2]) + gate * p["skips"][0] * u * v
        want = want + both_ways(x, *h[2:]) + p["skips"][1] * x
    assert_close(y, want @ dense(p["out"], 0), "float64", "Monarch Mixer")


def both_ways(x, back, ahead):
    """Earlier tokens by `back`, later ones by `ahead`, both from the token itself on."""
    return lags(x, back) + lags(x[::-1], ahead)[::-1]


def test_a_filter_ahead_begins_at_the_token_itself():
    """e_0 ahead and nothing back give y_t = x_t, as k_rev of the released fftconv_ref does."""
    x = jnp.asarray(subject.inputs(7))[..., :3]
    ahead = jnp.zeros((7, 3)).at[0].set(1.0)
    y = monarch_mixer._both_ways(x, (0 * ahead, ahead), jnp.zeros(3), None)
    assert_close(y, x, "float32", "e_0")
    y = monarch_mixer._both_ways(x, (0 * ahead, ahead[::-1]), jnp.zeros(3), None)
    assert_close(y[:, 0], x[:, 6], "float32", "e_6")


def test_the_sines_of_monarch_mixers_filters_start_at_ten():
    module = monarch_mixer.Config(length=8).build(16, nnx.Rngs(0))
    np.testing.assert_array_equal(module.filters.frequency[...], 10.0)


def test_bounded_states_hold_the_whole_capacity():
    """A state for fewer tokens than the filters reach is smaller and reads the same."""
    config = hyena.Config(order=1, length=64, filter_hidden=8)
    module, x = config.build(32, nnx.Rngs(0)), jnp.asarray(subject.inputs(12))[..., :32]
    small, large = module.init_state(len(x), 12), module.init_state(len(x), 100)
    assert small["z"][0].shape[1] == 11 and large["z"][0].shape[1] == 63
    call = jax.jit(lambda state: module(x, state=state)[0])
    assert_close(call(small), call(large), "float32", "outputs")
