"""Layers that learn while they read, against plain loops over tokens written from the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.test_time import mesanet, titans, titans_context, ttt_linear, ttt_mlp
from tests.models.stirred import conv, l2, layer_norm, rms, sigmoid, silu, softplus

WIDTH, LENGTH = 8, 21


def compare(config, naive):
    """The layer in float64, its weights moved away from where they start, against `naive`."""
    rng = np.random.default_rng(0)
    graph, params = nnx.split(config.build(WIDTH, nnx.Rngs(0)))
    moved = lambda leaf: jnp.asarray(np.asarray(leaf) + 0.1 * rng.normal(size=leaf.shape))
    with jax.enable_x64(True):
        params, x = jax.tree.map(moved, params), rng.normal(size=(LENGTH, WIDTH))
        got, _ = jax.jit(lambda params, x: nnx.merge(graph, params)(x))(params, x[None])
        want = naive(nnx.merge(graph, params), x)
    # Rotary positions have the digits of float32.
    np.testing.assert_allclose(got[0], want, rtol=1e-5, atol=1e-6)


def through(x, w):
    """x (T, D) by a map (D, ...)."""
    return np.tensordot(x, np.asarray(w[...]), 1)


def outward(x, w):
    """x (T, H, K) by a map (H, K, D)."""
    return np.tensordot(x, np.asarray(w[...]), 2)


def convolved(x, layer):
    """The causal convolution of x (T, ...), with no activation."""
    bias = 0.0 if layer.bias is None else np.asarray(layer.bias[...])
    return conv(x, np.asarray(layer.taps[...])) + bias


def turned(x, places, base=10_000.0):
    """Rotary positions, as a product of complex numbers."""
    half = x.shape[-1] // 2
    angle = np.multiply.outer(places, base ** (-np.arange(half) / half))[:, None]
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], axis=-1)


def less(w, scale, sums):
    return jax.tree.map(lambda w, s: w - scale * s, w, sums)


def ttt(module, x):
    """arXiv 2407.04620, eqs. 1 to 4, one token and one head after the other."""
    places = np.arange(len(x)) % module.share.shape[0]
    qk = through(x, module.qk)
    q, k = (turned(convolved(qk, conv), places) for conv in (module.q_conv, module.k_conv))
    v, z = np.moveaxis(through(x, module.vz), 1, 0)
    rate = module.step * sigmoid(through(x, module.rate) + np.asarray(module.rate_bias[...]))
    share = np.maximum(1 / (1 + np.arange(module.share.shape[0])) + module.share[...], 0)
    o = np.stack([inner_ttt(module, h, places, q, k, v, rate, share) for h in range(q.shape[1])], 1)
    gain, bias = (np.ravel(w[...]) for w in (module.norm, module.norm_bias))
    o = layer_norm(o.reshape(len(x), -1), gain, eps=1e-6) + bias
    return outward(o.reshape(q.shape) * np.asarray(jax.nn.gelu(z)), module.o)


def read_ttt(w, gain, shift, x):
    """f(x; w) of one head."""
    y = x
    for n, (matrix, bias) in enumerate(w):
        y = (jax.nn.gelu(y) if n else y) @ matrix + bias
    y = y - y.mean()
    y = y / jnp.sqrt((y * y).mean() + 1e-6)
    return x + y * gain + shift


def loss_ttt(w, gain, shift, k, v):
    return jnp.square(read_ttt(w, gain, shift, k) - v).sum() / 2


reads_ttt, slope_ttt = jax.jit(read_ttt), jax.jit(jax.grad(loss_ttt))


def inner_ttt(module, head, places, q, k, v, rate, share):
    w = [[w[head], b[head, 0]] for w, b in zip(module.w, module.b, strict=True)]
    w, share, *norm = jax.tree.map(np.asarray, (w, share, module.gain[head], module.shift[head]))
    sums, out = jax.tree.map(np.zeros_like, w), []
    for t, place in enumerate(places):
        if place == 0 and t:
            w = less(w, share[-1], sums)
            sums = jax.tree.map(np.zeros_like, w)
        found = jax.tree.map(np.asarray, slope_ttt(w, *norm, k[t, head], v[t, head]))
        sums = less(sums, -rate[t, head], found)
        out.append(np.asarray(reads_ttt(less(w, share[place], sums), *norm, q[t, head])))
    return np.stack(out)


@pytest.mark.parametrize("config", [ttt_linear.Config(heads=2, batch=8), ttt_mlp.Config(heads=1)])
def test_ttt_is_gradient_steps_token_by_token(config):
    compare(config, ttt)


def recall(w, x):
    """M(x; w) of one head."""
    y = x
    for n, matrix in enumerate(w):
        y = (jax.nn.silu(y) if n else y) @ matrix
    return y


recalls = jax.jit(recall)


@jax.jit
def learn(taken, w, momentum, k, v, gates, rate, clip):
    """One step of eqs. 13 and 14 with the gradient at `taken`."""
    y, pull = jax.vjp(lambda w: recall(w, k), taken)
    (found,) = pull((y - v) * jnp.minimum(1, clip / jnp.linalg.norm(y - v)))
    alpha, eta, theta = gates[0], gates[1], gates[2] * rate
    momentum = jax.tree.map(lambda s, g: eta * s - theta * g, momentum, found)
    return jax.tree.map(lambda w, s: (1 - alpha) * w + s, w, momentum), momentum


def gates_of(memory, x):
    """alpha, eta and theta's share of its largest (T, 3, H)."""
    return sigmoid(through(x, memory.gates) + np.asarray(memory.gate_bias[...]))


def memorised(module, x):
    """arXiv 2501.00663, eqs. 12 to 15: y before the attention."""
    tokens = [np.asarray(module.persistent[...]), x]
    qkv = np.concatenate(
        [silu(convolved(through(part, module.qkv), module.conv)) for part in tokens]
    )
    q, k, v = l2(qkv[:, 0]), l2(qkv[:, 1]), qkv[:, 2]
    memory = module.memory
    gates = np.concatenate([gates_of(memory, part) for part in tokens])
    places = np.concatenate([np.arange(len(part)) for part in tokens]) % module.batch
    heads = []
    for head in range(q.shape[1]):
        w = taken = [np.asarray(w[head]) for w in memory.w]
        momentum, out = jax.tree.map(np.zeros_like, w), []
        for t, place in enumerate(places):
            taken = w if place == 0 else taken
            token = k[t, head], v[t, head], gates[t, :, head]
            w, momentum = learn(taken, w, momentum, *token, memory.rate, memory.clip)
            out.append(recalls(w, q[t, head]))
        heads.append(np.stack(out))
    o = rms(np.stack(heads, 1)[len(tokens[0]) :], np.asarray(module.norm[...])) * silu(
        through(x, module.z)
    )
    return outward(o, module.o)


def test_titans_memorises_token_by_token():
    compare(titans.Config(heads=2, batch=8, persistent=3, window=0, clip=0.8), memorised)


@pytest.mark.parametrize(("batch", "want"), [(1, [0.05, 0.0975]), (16, [0.05, 0.1])])
def test_two_steps_of_a_memory_by_hand(batch, want):
    """k = e_1 and v = (v_1, 0) twice, weights 0 at first, alpha = eta = 1/2, theta = 0.1 / 2.

    S_1 = 0.05 v_1 = M_1; S_2 = S_1 / 2 + 0.05 (v_1 - M), with M the weights before the mini-batch,
    and M_2 = M_1 / 2 + S_2: 0.0975 v_1 where each token is one, 0.1 v_1 where both are of one.
    """
    config = titans.Config(heads=1, depth=1, persistent=0, window=0, batch=batch, conv=2)
    graph, params = nnx.split(config.build(2, nnx.Rngs(0)))
    module = nnx.merge(graph, jax.tree.map(jnp.zeros_like, params))
    module.qkv[...] = module.qkv[...].at[0, :, 0, 0].set(1.0)
    module.conv.taps[...] = module.conv.taps[...].at[-1].set(1.0)
    call = jax.jit(lambda state: module(jnp.asarray([[[1.0, 7.0]]]), state=state)[1])
    state, found = module.init_state(1, 2), []
    for _ in range(2):
        state = call(state)
        found.append(np.asarray(state["memory"].weights[0]["w"])[0, 0] / 0.7310586)  # silu(1)
    assert [np.count_nonzero(w) for w in found] == [1, 1]
    np.testing.assert_allclose([w[0, 0] for w in found], want, rtol=1e-5)


def test_titans_reads_its_memory_through_a_window():
    def naive(module, x):
        y, places = memorised(module, x), np.arange(len(x))
        q, k, v = np.moveaxis(through(y, module.read), 1, 0)
        near = (places[:, None] >= places) & (places[:, None] < places + module.window)
        return outward(attended(turned(q, places), turned(k, places), v, near), module.out)

    compare(titans.Config(heads=1, depth=1, persistent=0, window=5), naive)


def attended(q, k, v, sees):
    score = np.einsum("thk,shk->hts", q, k) / np.sqrt(q.shape[-1])
    p = np.exp(np.where(sees, score, -np.inf))
    return np.einsum("hts,shk->thk", p / p.sum(-1, keepdims=True), v)


def in_context(module, x):
    """arXiv 2501.00663, eqs. 21 to 25, segment by segment."""
    memory, heads = module.memory, module.q.shape[1]
    w = [[np.asarray(w[head]) for w in memory.w] for head in range(heads)]
    momentum, out = jax.tree.map(np.zeros_like, w), []
    always = np.moveaxis(through(np.asarray(module.persistent[...]), module.kv), 1, 0)
    for start in range(0, len(x), module.segment):
        part = x[start : start + module.segment]
        places, order = np.arange(len(part)), np.tril(np.ones((len(part),) * 2, bool))
        ask = l2(through(part, module.ask))
        asked = [[recalls(w[h], token[h]) for h in range(heads)] for token in ask]
        recalled = outward(np.array(asked), module.recall)
        (hk, hv), (k, v) = (np.moveaxis(through(a, module.kv), 1, 0) for a in (recalled, part))
        keys = np.concatenate([always[0], turned(hk, places), turned(k, places)])
        values = np.concatenate([always[1], hv, v])
        sees = np.concatenate([np.ones((len(part), len(always[0])), bool), order, order], axis=1)
        q = turned(through(part, module.q), places)
        y = outward(attended(q, keys, values, sees), module.out)
        q, k, v = np.moveaxis(through(y, module.learn), 1, 0)
        q, k, gates, taken = l2(q), l2(k), gates_of(memory, y), list(w)
        m = np.zeros_like(q)
        for t in places:
            for h in range(heads):
                token = k[t, h], v[t, h], gates[t, :, h], memory.rate, memory.clip
                w[h], momentum[h] = learn(taken[h], w[h], momentum[h], *token)
                m[t, h] = recalls(w[h], q[t, h])
        out.append(rms(y, np.asarray(module.norm.scale[...])) * sigmoid(outward(m, module.gate)))
    return np.concatenate(out)


def test_titans_attends_to_what_it_recalls_segment_by_segment():
    compare(titans_context.Config(heads=2, segment=8, persistent=3), in_context)


def test_mesanet_solves_every_token_s_least_squares():
    def naive(module, x):
        qk = silu(convolved(through(x, module.qk), module.qk_conv))
        q, k, v = l2(qk[:, 0]), l2(qk[:, 1]), through(x, module.v)
        gates = sigmoid(through(x, module.gates) + np.asarray(module.gate_bias[...]))
        ridge = module.floor + softplus(np.asarray(module.ridge[...]))
        h, g = np.zeros((2, *q.shape[1:], q.shape[2]))
        out = np.zeros_like(v)
        for t in range(len(x)):
            decay, beta = gates[t, ..., None, None]
            h = decay * h + beta * k[t, :, :, None] * k[t, :, None]
            g = decay * g + beta * v[t, :, :, None] * k[t, :, None]
            for head in range(q.shape[1]):
                matrix = h[head] + np.diag(ridge[head])
                out[t, head] = g[head] @ np.linalg.solve(matrix, q[t, head])
        return outward(rms(out, np.asarray(module.norm[...]), 1e-5), module.o)

    compare(mesanet.Config(heads=2), naive)


def test_the_gradient_of_mesanet_s_solver_is_that_of_a_direct_solve():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        q, k, w = (jnp.asarray(rng.normal(size=(1, 5, 1, 4))) for _ in range(3))
        decay, root = jnp.log(jnp.full((1, 5, 1), 0.8)), jnp.asarray(rng.normal(size=(4, 4)))
        h, ridge = (root @ root.T)[None, None], jnp.full((1, 4), 0.5)

        def solved(q, k, decay, h, ridge):
            return jnp.sum(w * mesanet.solve(9, q, (k, k, decay, h), ridge, None))

        def direct(q, k, decay, h, ridge):
            total, h = 0.0, h[0, 0]
            for t in range(5):
                h = jnp.exp(decay[0, t, 0]) * h + jnp.outer(k[0, t, 0], k[0, t, 0])
                x = jnp.linalg.solve((h + jnp.diag(ridge[0])).T, q[0, t, 0])
                total += jnp.sum(w[0, t, 0] * x)
            return total

        every = (0, 1, 2, 3, 4)
        got, want = (
            jax.jit(jax.grad(f, argnums=every))(q, k, decay, h, ridge) for f in (solved, direct)
        )
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9)


def test_a_row_of_several_blocks_has_the_gradients_of_its_pieces():
    """Beyond 16 chunks the scan is cut into blocks that are run once more going back."""
    config = ttt_linear.Config(heads=1, batch=2)
    graph, params = nnx.split(config.build(4, nnx.Rngs(0)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 40, 4)), jnp.float32)

    def loss(params, x, pieces):
        state, total = None, 0.0
        for piece in jnp.split(x, pieces, axis=1):
            y, state = nnx.merge(graph, params)(piece, state=state)
            total += jnp.sum(jnp.sin(y))
        return total

    grad = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    for a, b in zip(*(jax.tree.leaves(grad(params, x, n)) for n in (1, 2)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
