"""Low-rank mixers against NumPy forms of the papers' equations, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.low_rank import fnet, linformer, nystromformer, sinkhorn, synthesizer
from models.parts import documents
from tests import subject
from tests.tolerance import assert_close

WIDTH, LENGTH = 8, 24
rng = np.random.default_rng(0)
X = rng.normal(size=(1, LENGTH, WIDTH))


def drawn(config):
    """Graph and random float64 weights, those that start at zero too."""
    graph, params = nnx.split(nnx.eval_shape(lambda: config.build(WIDTH, nnx.Rngs(0))))
    draw = np.random.default_rng(1).normal
    return graph, jax.tree.map(lambda p: 0.5 * draw(size=p.shape), nnx.to_pure_dict(params))


def call(graph, weights, x, segments=None):
    with jax.enable_x64(True):
        return np.asarray(subject.run(graph, weights, x, segments)[0])


def softmax(scores):
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def heads_of(w, x):
    """q, k, v of one document as (3, H, T, K)."""
    return np.einsum("td,dphk->phtk", x[0], w["qkv"])


def out(w, o):
    return np.einsum("htk,hkd->td", o, w["o"])


def softmax_attention(w, x):
    q, k, v = heads_of(w, x)
    return out(w, softmax(q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])) @ v)


def test_linformer_is_equation_7():
    graph, w = drawn(linformer.Config(heads=2, rank=4, length=32))
    q, k, v = heads_of(w, X)
    keys, values = w["mixes"][:, :LENGTH]
    shares = softmax(q @ (keys.T @ k).swapaxes(1, 2) / np.sqrt(q.shape[-1]))
    assert_close(call(graph, w, X)[0], out(w, shares @ (values.T @ v)), jnp.float64, "eq. 7")


def test_linformer_without_mixing_is_softmax_attention():
    graph, w = drawn(linformer.Config(heads=2, rank=LENGTH, length=LENGTH))
    w["mixes"] = np.stack([np.eye(LENGTH)] * 2)
    assert_close(call(graph, w, X)[0], softmax_attention(w, X), jnp.float64, "E = F = 1")


def test_nystromformer_with_a_landmark_a_token_is_softmax_attention():
    graph, w = drawn(nystromformer.Config(heads=2, landmarks=32, iterations=40, conv=0))
    w["qkv"] *= 3  # far from uniform scores: the inverse is well conditioned
    error = np.abs(call(graph, w, X)[0] - softmax_attention(w, X)).max()
    assert error < 1e-6


def test_nystromformer_is_equation_13():
    """Six landmarks of four tokens, NumPy's pseudo-inverse, and the convolution as a sum."""
    graph, w = drawn(nystromformer.Config(heads=2, landmarks=6, iterations=30, conv=5))
    q, k, v = heads_of(w, X)
    q = q / np.sqrt(q.shape[-1])
    q_mean, k_mean = (a.reshape(2, 6, 4, -1).mean(2).swapaxes(1, 2) for a in (q, k))
    core = np.linalg.pinv(softmax(q_mean.swapaxes(1, 2) @ k_mean))
    o = softmax(q @ k_mean) @ core @ softmax(q_mean.swapaxes(1, 2) @ k.swapaxes(1, 2)) @ v
    padded = np.pad(v, ((0, 0), (2, 2), (0, 0)))
    o += sum(w["taps"][j][:, None, None] * padded[:, j : j + LENGTH] for j in range(5))
    assert_close(call(graph, w, X)[0], out(w, o), jnp.float32, "eq. 13")


def loop_synthesizer(w, x, causal):
    v = np.einsum("td,dhv->htv", x[0], w["v"])
    if "table" in w:
        scores = w["table"][:, :LENGTH, :LENGTH]
    else:
        hidden = np.maximum(
            np.einsum("td,dhk->htk", x[0], w["hidden"]) + w["hidden_bias"][:, None], 0
        )
        scores = (hidden @ w["score"] + w["score_bias"][:, None])[:, :, :LENGTH]
    if causal:
        scores = np.where(np.tri(LENGTH, dtype=bool), scores, -np.inf)
    return out(w, softmax(scores) @ v)


@pytest.mark.parametrize("form", ["dense", "random"])
@pytest.mark.parametrize("causal", [False, True])
def test_synthesizer(form, causal):
    graph, w = drawn(synthesizer.Config(heads=2, length=32, form=form, causal=causal))
    want = loop_synthesizer(w, X, causal)
    assert_close(call(graph, w, X)[0], want, jnp.float64, "section 3")


def test_fnet_is_the_real_part_of_a_two_dimensional_transform():
    want = np.fft.fft2(X[0], norm="ortho").real
    graph, w = drawn(fnet.Config())
    assert_close(call(graph, w, X)[0], want, jnp.float64, "eq. 3")


def loop_sinkhorn(w, x, block):
    """Equations 1 to 6 for a whole number of blocks."""
    blocks = LENGTH // block
    sums = x[0].reshape(blocks, block, -1).sum(1)
    hidden = np.maximum(sums @ w["place_in"] + w["place_bias"], 0)
    sort = np.einsum("nr,rhm->hnm", hidden, w["sort"][..., :blocks])
    move = np.exp(sort / 0.75)
    for _ in range(8):
        move = move / move.sum(-1, keepdims=True)
        move = move / move.sum(-2, keepdims=True)
    q, k, v = (a.reshape(2, blocks, block, -1) for a in heads_of(w, x))
    both = lambda y: np.concatenate([y, np.einsum("hnm,hmck->hnck", move, y)], axis=2)
    shares = softmax(q @ both(k).swapaxes(2, 3) / np.sqrt(q.shape[-1]))
    return out(w, (shares @ both(v)).reshape(2, LENGTH, -1))


def test_sinkhorn_attention():
    graph, w = drawn(sinkhorn.Config(heads=2, block=4, length=32))
    assert_close(call(graph, w, X)[0], loop_sinkhorn(w, X, 4), jnp.float64, "eqs. 1 to 6")


def test_sinkhorn_of_one_block_is_softmax_attention():
    """The block sorts to itself, so that every key is there twice."""
    graph, w = drawn(sinkhorn.Config(heads=2, block=32, length=32))
    assert_close(call(graph, w, X)[0], softmax_attention(w, X), jnp.float64, "one block")


@pytest.mark.parametrize(
    "config",
    [
        linformer.Config(heads=2, rank=4, length=32),
        nystromformer.Config(heads=2, landmarks=4),
        synthesizer.Config(heads=2, length=32),
        fnet.Config(),
        sinkhorn.Config(heads=2, block=4, length=32),
    ],
)
def test_packed_form_equals_the_efficient_form(config):
    """One document told by segments takes the packed path and gives the same numbers."""
    graph, w = drawn(config)
    padded = np.concatenate([X[:, :3], X, X[:, :5]], axis=1)
    segments = jnp.asarray([[0] * 3 + [2] * LENGTH + [0] * 5])
    packed = call(graph, w, padded, segments)
    assert_close(packed[:, 3:-5], call(graph, w, X), jnp.float64, "between padding")


def test_documents_one_by_one():
    """Each document is at the front, alone; gradients of weights and rows are those of a sum."""
    x = jnp.asarray(rng.normal(size=(2, 6, 3)), jnp.float32)
    segments = jnp.asarray([[0, 4, 4, 4, 2, 2], [1, 3, 3, 0, 0, 0]])
    spans = [(0, 1, 4), (0, 4, 6), (1, 0, 1), (1, 1, 3)]

    def prefix(w, rows, length_B):
        return jnp.tanh(w * jnp.cumsum(rows, axis=1)) * length_B[:, None, None]

    def packed(w, x):
        y = documents.each(prefix, w, x, segments)
        return jnp.sum(y**2), y

    def separate(w, x):
        y = jnp.zeros_like(x)
        for row, start, stop in spans:
            alone = documents.each(prefix, w, x[row : row + 1, start:stop], None)
            y = y.at[row, start:stop].set(alone[0])
        return jnp.sum(y**2), y

    results = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(jnp.float32(0.7), x)
        for f in (packed, separate)
    )
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        assert_close(a, b, jnp.float32, "one by one")
