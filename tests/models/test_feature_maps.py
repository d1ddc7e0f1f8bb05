"""Linear attention by feature maps against the papers' sums over pairs, written out in NumPy.

Each reference is the quadratic form in float64, on weights taken from the module.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.linear_attention import (
    based,
    cosformer,
    efficient_attention,
    lightning,
    linear_transformer,
    performer,
    rebased,
    retnet,
    rfa,
)
from models.parts import features
from tests.tolerance import assert_close

WIDTH, LENGTH = 12, 9
RNG = np.random.default_rng(0)
X = RNG.normal(size=(1, LENGTH, WIDTH))
BEFORE = np.arange(LENGTH)[:, None] >= np.arange(LENGTH)  # token s is not after token t


def weights(module):
    """The module's weights as float64 arrays."""
    return {
        name: np.asarray(w, np.float64) for name, w in nnx.to_pure_dict(nnx.state(module)).items()
    }


def check(config, heads_of, x=X):
    """The module's output equals the output map of `heads_of(weights, q, k, v)`, each (T, H, .)."""
    module = config.build(WIDTH, nnx.Rngs(0))
    w = weights(module)
    q, k = np.einsum("td,dphk->pthk", x[0], w["qk"])
    v = np.einsum("td,dhv->thv", x[0], w["v"] if "v" in w else w["vg"][:, 0])
    want = np.einsum("thv,hvd->td", heads_of(w, q, k, v), w["o"])
    got, _ = jax.jit(lambda x: module(x))(jnp.asarray(x, jnp.float32))
    assert_close(np.asarray(got)[0], want, jnp.float32, type(config).__module__)


def read(weight_HTS, v_THV, least=1e-6):
    """sum_s w_ts v_s / max(sum_s w_ts, least) over s <= t."""
    weight_HTS = weight_HTS * BEFORE
    total_HT1 = np.maximum(weight_HTS.sum(-1, keepdims=True), least)
    return np.einsum("hts,shv->thv", weight_HTS / total_HT1, v_THV)


def products(q_THK, k_THK):
    """q_t k_s, (H, T, S)."""
    return np.einsum("thk,shk->hts", q_THK, k_THK)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def unit(x):
    """x / |x|."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def softmax(x, axis):
    x = np.exp(x - x.max(axis, keepdims=True))
    return x / x.sum(axis, keepdims=True)


def test_linear_transformer_is_attention_with_products_of_elu_plus_one():
    elu = lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))
    check(
        linear_transformer.Config(heads=3),
        lambda w, q, k, v: read(products(elu(q), elu(k)), v),
    )


def test_efficient_attention_softmaxes_keys_over_the_document():
    def heads(w, q, k, v):
        context = np.einsum("shk,shv->hkv", softmax(k, 0), v)
        return np.einsum("thk,hkv->thv", softmax(q, -1), context)

    check(efficient_attention.Config(heads=3, causal=False), heads)


@pytest.mark.parametrize("size", [1.0, 50.0])
def test_causal_efficient_attention_softmaxes_keys_over_what_came(size):
    def heads(w, q, k, v):
        seen = [softmax(k[: t + 1], 0) for t in range(LENGTH)]
        context = np.stack([np.einsum("shk,shv->hkv", a, v[: len(a)]) for a in seen])
        return np.einsum("thk,thkv->thv", softmax(q, -1), context)

    check(efficient_attention.Config(heads=3), heads, size * X)


def test_performer_is_attention_with_positive_random_features():
    def heads(w, q, k, v):
        f = lambda x: np.exp(
            x / 4**0.25 @ w["directions"].T - np.square(x).sum(-1, keepdims=True) / 4
        )
        return read(products(f(q), f(k)), v)

    # The released code's 1e-6 on each feature stays: features span few orders of magnitude here.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(performer, "FLOOR", 0.0)
        check(performer.Config(heads=3), heads)


def test_performer_estimates_the_softmax_kernel():
    """The mean of f(q) f(k) over directions is exp(q k / sqrt(K)) (lemma 1)."""
    directions = np.asarray(performer._orthogonal(jax.random.key(0), (40_000, 4)), np.float64)
    q, k = np.array([0.5, -0.3, 0.2, 0.4]), np.array([0.1, 0.6, -0.5, 0.3])
    f = lambda x: np.exp(directions @ x - x @ x / 2)
    assert abs(np.mean(f(q) * f(k)) / np.exp(q @ k) - 1) < 0.02
    gram = directions[:4] @ directions[:4].T
    assert np.abs(gram - np.diag(np.diag(gram))).max() < 1e-5


@pytest.mark.parametrize("horizon", [16, 5])
def test_cosformer_weighs_by_the_cosine_of_the_distance(horizon):
    def heads(w, q, k, v):
        place = np.minimum(np.arange(LENGTH), horizon)
        distance = place[:, None] - place
        weight = products(np.maximum(q, 0), np.maximum(k, 0))
        return read(weight * np.cos(np.pi / 2 * distance / horizon), v)

    check(cosformer.Config(heads=2, horizon=horizon), heads)


def test_rfa_follows_its_recurrence():
    def heads(w, q, k, v):
        normed = lambda x: x / np.sqrt(np.square(x).sum(-1, keepdims=True) + 1e-6)
        angle = lambda x: np.einsum("thk,hfk->thf", normed(x) * w["sigma"], w["directions"])
        f = lambda x: np.concatenate([np.sin(angle(x)), np.cos(angle(x))], -1) / np.sqrt(64)
        gate = sigmoid(X[0] @ w["gate"] + w["gate_bias"])
        s, z, mass, out = 0.0, 0.0, 0.0, []
        for phi_q, phi_k, value, g in zip(f(q), f(k), v, gate, strict=True):
            s = g[:, None, None] * s + (1 - g)[:, None, None] * phi_k[:, :, None] * value[:, None]
            z = g[:, None] * z + (1 - g)[:, None] * phi_k
            mass = g * mass + (1 - g)
            total = np.maximum(np.einsum("hf,hf->h", phi_q, z), np.exp(-2) * mass)
            out.append(np.einsum("hf,hfv->hv", phi_q, s) / total[:, None])
        return np.stack(out)

    check(rfa.Config(heads=3), heads)


def test_rfa_estimates_the_gaussian_kernel():
    """The mean of f(q) f(k) is exp(-|sigma (q - k)|^2 / 2) (theorem 1)."""
    module = rfa.Config(heads=1, directions=20_000).build(4, nnx.Rngs(0))
    qk = unit(np.array([[0.5, -0.3, 0.2, 0.4], [0.1, 0.6, -0.5, 0.3]]))
    f_q, f_k = np.asarray(module._map(jnp.asarray(qk[None, None, :, None])))[0, 0, :, 0]
    assert abs(f_q @ f_k - np.exp(-np.square(qk[0] - qk[1]).sum() / 2)) < 0.02


def test_based_is_attention_with_the_series_of_exp():
    def heads(w, q, k, v):
        a = products(q, k) / np.sqrt(5)
        return read(1 + a + a**2 / 2, v)

    check(based.Config(heads=3, key_dim=5), heads)


def test_rebased_is_attention_with_squares_of_normed_products():
    def heads(w, q, k, v):
        def norm(x, gamma, beta):
            x = x - x.mean(-1, keepdims=True)
            return gamma * x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5) + beta

        q, k = (norm(x, w["gamma"][i], w["beta"][i]) for i, x in enumerate((q, k)))
        return read(products(q, k) ** 2 / 5, v, least=1e-5)

    check(rebased.Config(heads=3, key_dim=5), heads)


def test_retnet_rotates_and_decays():
    def heads(w, q, k, v):
        rates = np.exp(1j * 10_000.0 ** (-np.arange(2) / 2))
        turn = lambda x: (
            (x[..., :2] + 1j * x[..., 2:]) * (rates ** np.arange(LENGTH)[:, None])[:, None]
        )
        gamma = 1 - 2.0 ** (-5 - np.arange(3))
        distance = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
        scores = np.einsum("thk,shk->hts", turn(q), turn(k).conj()).real / 2
        o = np.einsum("hts,shv->thv", BEFORE * scores * gamma[:, None, None] ** distance, v)
        o = o - o.mean(-1, keepdims=True)
        o = o / np.sqrt(np.square(o).mean(-1, keepdims=True) + 1e-6)
        gate = np.einsum("td,dhv->thv", X[0], w["vg"][:, 1])
        return o * gate * sigmoid(gate)

    check(retnet.Config(heads=3), heads)


def test_lightning_decays_by_the_slopes_of_alibi():
    def heads(w, q, k, v):
        silu = lambda x: x * sigmoid(x)
        distance = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
        decay = np.exp(-0.5 * 2.0 ** (-8 * np.arange(1, 4) / 3)[:, None, None] * distance)
        o = np.einsum("hts,shv->thv", BEFORE * products(silu(q), silu(k)) * decay, silu(v))
        o = o / np.sqrt(np.square(o).mean((1, 2), keepdims=True) + 1e-6)
        return o * sigmoid(np.einsum("td,dhv->thv", X[0], w["vg"][:, 1]))

    check(lightning.Config(heads=3, slope=0.5), heads)


def test_the_slopes_of_eight_heads_are_halves():
    np.testing.assert_allclose(lightning.slopes(8), 2.0 ** -np.arange(1, 9))


def test_running_max_starts_anew_at_documents_and_skips_padding():
    x = jnp.asarray([[3.0, 9.0, 1.0, 5.0, 2.0, 4.0, 8.0]])
    segments = jnp.asarray([[1, 0, 1, 1, 2, 2, 0]])
    old = {"top": jnp.asarray([4.0]), "begun": jnp.asarray([True])}
    run = jax.jit(features.running_max)
    top, decay, state = run(x, segments, old)
    real = np.asarray(segments)[0] != 0
    np.testing.assert_array_equal(np.asarray(top)[0][real], [4, 4, 5, 2, 4])
    np.testing.assert_array_equal(np.asarray(decay)[0][real], [0, 0, -1, 0, -2])
    assert state["top"] == 4 and state["begun"]
    _, _, fresh = run(x, jnp.zeros_like(segments))
    assert fresh["top"] == 0 and not fresh["begun"]


def test_quadratic_features_multiply_to_squares():
    x, y = RNG.normal(size=(2, 3, 5))
    got = (features.quadratic(jnp.asarray(x)) * features.quadratic(jnp.asarray(y))).sum(-1)
    np.testing.assert_allclose(got, (x * y).sum(-1) ** 2, rtol=1e-4)
