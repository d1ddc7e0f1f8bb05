"""Likeness of predictions: bounds, symmetry, hand cases in float64, padding, and robustness."""

import math

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special

from resources import fidelity as lib

ALL = np.ones((2, 3), bool)
# One shape, so that one program serves every example.
LOGITS = hnp.arrays(np.float32, (2, 3, 5), elements=st.floats(-90, 90, width=32))


def compare(p, q, mask=ALL, targets=None):
    return lib.fidelity([(p, q, mask, targets)])


@hypothesis.given(LOGITS, LOGITS)
@hypothesis.settings(deadline=None, max_examples=150)
def test_bounds_and_symmetry(p, q):
    forth, back = compare(p, q), compare(q, p)
    assert forth.loyalty == pytest.approx(back.loyalty, rel=1e-6)  # sums in another order
    assert 0 <= forth.loyalty <= 1 and 0 <= forth.agreement <= 1
    assert forth.kl >= 0 and forth.kl_reverse >= 0
    assert (forth.kl, forth.kl_reverse) == (back.kl_reverse, back.kl)


@hypothesis.given(LOGITS, st.floats(-50, 50, width=32))
@hypothesis.settings(deadline=None, max_examples=100)
def test_equal_models_are_equal(p, shift):
    same = compare(p, p)
    assert same == lib.Fidelity(6, 1.0, 0.0, 0.0, 1.0, None)
    shifted = compare(p, p + np.float32(shift))  # the same probabilities but for rounding
    assert shifted.loyalty > 0.999 and shifted.kl < 1e-6


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_against_scipy_in_float64(scale):
    rng = np.random.default_rng(0)
    p = (rng.normal(size=(4, 7, 50)) * 3).astype(np.float32)
    q = (p + scale * rng.normal(size=p.shape)).astype(np.float32)
    targets = rng.integers(0, 50, (4, 7))
    found = compare(p, q, np.ones((4, 7), bool), targets)
    probability_p, probability_q = (scipy.special.softmax(x.astype(float), -1) for x in (p, q))
    forth = scipy.special.rel_entr(probability_p, probability_q).sum(-1).mean()
    back = scipy.special.rel_entr(probability_q, probability_p).sum(-1).mean()
    distance = scipy.spatial.distance.jensenshannon(probability_p, probability_q, 2, axis=-1)
    losses = [
        -np.log(np.take_along_axis(x, targets[..., None], -1)).mean()
        for x in (probability_p, probability_q)
    ]
    assert found.kl == pytest.approx(forth, rel=1e-3)
    assert found.kl_reverse == pytest.approx(back, rel=1e-3)
    assert found.loyalty == pytest.approx(1 - distance.mean(), rel=1e-4)
    assert found.perplexity_ratio == pytest.approx(math.exp(losses[1] - losses[0]), rel=1e-4)
    assert found.agreement == (p.argmax(-1) == q.argmax(-1)).mean()


def test_a_case_by_hand():
    """p = (1/2, 1/2) and q = (1/4, 3/4): the sums, written out."""
    p, q = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    found = compare(p, q, np.array([True]), np.array([1]))
    assert found.positions == 1
    assert found.agreement == 0.0  # of equal ones, the first counts
    assert found.kl == pytest.approx(math.log(4 / 3) / 2, rel=1e-5)
    assert found.kl_reverse == pytest.approx(0.75 * math.log(3) - math.log(2), rel=1e-5)
    entropy = lambda *x: -sum(v * math.log2(v) for v in x)
    divergence = entropy(3 / 8, 5 / 8) - (1 + entropy(1 / 4, 3 / 4)) / 2
    assert found.loyalty == pytest.approx(1 - math.sqrt(divergence), rel=1e-5)
    assert found.perplexity_ratio == pytest.approx(2 / 3)


def test_models_that_share_nothing():
    p, q = np.array([[0.0, -np.inf, -np.inf]]), np.array([[-np.inf, 0.0, -np.inf]])
    found = compare(p, q, np.array([True]))
    assert (found.loyalty, found.agreement, found.kl) == (0.0, 0.0, math.inf)
    both = compare(p, p, np.array([True]))
    assert (both.loyalty, both.kl) == (1.0, 0.0)


def test_nearly_equal_models_are_told_apart_in_float32():
    """A divergence of 5e-9 over 10,000 tokens drowns in a plain float32 sum of p log(p / q)."""
    rng = np.random.default_rng(1)
    p = rng.normal(size=(1, 10_000)).astype(np.float32)
    q = (p + 1e-4 * rng.normal(size=p.shape)).astype(np.float32)
    log_p, log_q = (scipy.special.log_softmax(x.astype(float), -1) for x in (p, q))
    exact = (np.exp(log_p) * (log_p - log_q)).sum()
    distance = scipy.spatial.distance.jensenshannon(np.exp(log_p[0]), np.exp(log_q[0]), 2)
    found = compare(p, q, np.array([True]))
    assert found.kl == pytest.approx(exact, rel=0.05)
    assert 1 - found.loyalty == pytest.approx(distance, rel=0.01)


def test_batches_are_folded_and_padding_is_nothing():
    rng = np.random.default_rng(2)
    p, q = rng.normal(size=(2, 6, 4, 9)).astype(np.float32)
    targets = rng.integers(0, 9, (6, 4))
    mask = rng.random((6, 4)) < 0.6
    whole = compare(p, q, mask, targets)
    assert whole.positions == mask.sum()
    rows = [lib.Batch(p[i], q[i], mask[i], targets[i]) for i in range(6)]
    for field, value in vars(lib.fidelity(iter(rows))).items():
        assert value == pytest.approx(getattr(whole, field), rel=1e-6)
    p[~mask], q[~mask], targets[~mask] = np.nan, 1e30, -1
    assert compare(p, q, mask, targets) == whole


def test_bfloat16_is_computed_in_float32():
    p = np.random.default_rng(3).normal(size=(2, 3, 100)) * 4
    p, q = jnp.asarray(p, jnp.bfloat16), jnp.asarray(p + 0.1, jnp.bfloat16)
    wide = compare(p.astype(jnp.float32), q.astype(jnp.float32))
    assert compare(p, q) == wide


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_logits_are_refused(bad):
    p = np.zeros((2, 3, 5), np.float32)
    q = p.copy()
    q[1, 2, 0] = bad
    with pytest.raises(ValueError, match="hold NaN"):
        compare(p, q)
    with pytest.raises(ValueError, match="hold NaN"):
        compare(q, p)


def test_compression_ratio():
    assert lib.compression_ratio(400, 100) == 4.0
    with pytest.raises(ValueError, match="compressed model has 0 bytes"):
        lib.compression_ratio(400, 0)


def test_extrapolation_and_noise_are_relative():
    bits = {256: 3.0, 1024: 2.5, 512: 2.0, 2048: 4.0}
    assert lib.extrapolation(bits, 512) == {1024: 1.25, 2048: 2.0}
    growth = lib.noise_growth({0.2: 3.0, 0.0: 2.0, 0.1: 2.2})
    assert list(growth) == [0.1, 0.2]
    assert list(growth.values()) == pytest.approx([0.1, 0.5])


@hypothesis.given(
    hnp.arrays(np.int32, (3, 8), elements=st.integers(0, 6)),
    hnp.arrays(bool, (3, 8)),
    st.floats(0, 1),
    st.integers(0, 2**31 - 1),
)
@hypothesis.settings(deadline=None, max_examples=40)
def test_a_share_is_replaced_by_others(tokens, mask, share, seed):
    noisy = np.asarray(lib.corrupt(tokens, share, 7, jax.random.key(seed), mask))
    changed = noisy != tokens
    assert changed.sum() == round(share * mask.sum())
    assert not changed[~mask].any()
    assert noisy.min() >= 0 and noisy.max() < 7


def test_replacements_are_uniform_over_places_and_others():
    tokens = np.full((100, 300), 2)
    noisy = np.asarray(lib.corrupt(tokens, 0.5, 4, jax.random.key(0)))
    share = np.bincount(noisy.ravel(), minlength=4) / tokens.size
    assert share == pytest.approx([1 / 6, 1 / 6, 1 / 2, 1 / 6], abs=0.01)
    assert (noisy != 2).mean(axis=1) == pytest.approx(0.5, abs=0.15)
    again = np.asarray(lib.corrupt(tokens, 0.5, 4, jax.random.key(1)))
    assert (again != noisy).any()


ZEROS = np.zeros((2, 3, 5))
KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compare(ZEROS, np.zeros((2, 3, 4))), "batch 0: logits"),
        (lambda: compare(ZEROS, ZEROS, np.ones((2, 2), bool)), "do not match"),
        (lambda: compare(ZEROS, ZEROS, np.ones((2, 3))), "the mask is float64; give bool"),
        (lambda: compare(ZEROS, ZEROS, ~ALL), "no position counts"),
        (lambda: lib.fidelity([]), "no position counts"),
        (lambda: compare(ZEROS, ZEROS, ALL, np.full((2, 3), 5)), "target 5 is outside of 0 to 4"),
        (lambda: compare(ZEROS, ZEROS, ALL, np.zeros((3,), int)), r"targets \(3,\)"),
        (
            lambda: lib.fidelity([(ZEROS, ZEROS, ALL), (ZEROS, ZEROS, ALL, np.zeros((2, 3), int))]),
            "give all or none",
        ),
        (lambda: lib.extrapolation({256: 1.0}, 512), "trained length 512: there is 256"),
        (lambda: lib.extrapolation({256: 1.0, 512: 1.0}, 512), "no length is above"),
        (lambda: lib.extrapolation({512: 0.0, 1024: 1.0}, 512), "the loss at 512 is 0.0"),
        (lambda: lib.noise_growth({0.1: 1.0, 0.2: 2.0}), "there is 0.1, 0.2"),
        (lambda: lib.noise_growth({0: 1.0, 20: 2.0}), "lies in 0 to 1, not at 20"),
        (lambda: lib.corrupt([1, 2], 1.5, 3, KEY), "share=1.5"),
        (lambda: lib.corrupt([0, 0], 0.5, 1, KEY), "vocabulary=1"),
        (lambda: lib.corrupt([1, 3], 0.5, 3, KEY), "token 3 is outside of 0 to 2"),
    ],
)
def test_wrong_values_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
