"""Fused cross-entropy: what tests/test_kernels.py does not ask of every operation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from kernels import setting
from kernels.cross_entropy import cross_entropy, pallas_tpu, xla
from tests.kernels.crossed import crossed
from tests.kernels.launches import costs
from tests.tolerance import assert_close

NAMES = ("total", "nll", "dx", "dhead", "dweights")


def draw(batch, length, width, vocabulary, *, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batch, length, width))
    head = rng.normal(size=(width, vocabulary)) / width**0.5
    targets = rng.integers(0, vocabulary, (batch, length)).astype(np.int32)
    weights = rng.uniform(size=(batch, length)) * (rng.uniform(size=(batch, length)) > 0.3)
    arrays = (x.astype(dtype), head.astype(dtype), targets, weights.astype(np.float32))
    return tuple(jnp.asarray(array) for array in arrays)


def value_and_slopes(function, x, head, targets, weights, scale=1.0):
    """(total, nll, gradients of scale * total in x, head and weights) as NumPy arrays."""

    def run(x, head, weights):
        total, nll = function(x, head, targets, weights)
        return scale * total, (total, nll)

    slopes, (total, nll) = jax.jit(jax.grad(run, (0, 1, 2), has_aux=True))(x, head, weights)
    return [np.asarray(array) for array in (total, nll, *slopes)]


def by_optax(x, head, targets, weights, softcap=0.0):
    logits = jnp.einsum("btd,dv->btv", x, head)
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(weights * nll), nll


def assert_same(found, expected, dtype="float32"):
    for name, a, b in zip(NAMES, found, expected, strict=True):
        assert_close(a, b, dtype, name)


@pytest.mark.parametrize(
    ("impl", "softcap", "vocabulary"),
    crossed(
        ["ref", "xla"],
        [0.0, 1.5],
        [1, 2, 257],
        gate=[
            ("ref", 0.0, 2),
            ("ref", 1.5, 257),
            ("xla", 0.0, 1),
            ("xla", 1.5, 2),
            ("xla", 0.0, 257),
        ],
    ),
)
def test_equals_optax_on_materialised_logits(impl, softcap, vocabulary):
    given = draw(2, 9, 8, vocabulary)
    fused = lambda *a: cross_entropy(*a, softcap=softcap, impl=impl)  # noqa: E731
    found = value_and_slopes(fused, *given, scale=0.3)
    expected = value_and_slopes(lambda *a: by_optax(*a, softcap), *given, scale=0.3)
    for name, a, b in zip(NAMES, found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("dtype", "chunk", "softcap"),
    crossed(
        ["float32", "bfloat16"],
        [1, 7, 16, 32],
        [0.0, 2.0],
        gate=[
            ("float32", 1, 0.0),
            ("float32", 7, 2.0),
            ("bfloat16", 7, 0.0),
            ("bfloat16", 16, 2.0),
            ("float32", 32, 2.0),
        ],
    ),
)
def test_chunked_equals_unchunked(dtype, chunk, softcap):
    given = draw(3, 32, 8, 50, dtype=dtype)
    found, expected = (
        value_and_slopes(lambda *a, c=c: xla._loss(*a, softcap, c), *given) for c in (chunk, 32)
    )
    assert_same(found, expected, dtype)
    assert [a.dtype for a in found] == [np.float32, np.float32, dtype, dtype, np.float32]


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_numerical_slopes(softcap):
    with jax.enable_x64(True):
        x, head, targets, weights = draw(2, 7, 3, 11, dtype=np.float64)

        def total(x, head, weights):
            return xla._loss(x, head, targets, weights, softcap, 3)[0]

        check_grads(jax.jit(total), (x, head, weights.astype(np.float64)), 1, ["rev"])


@pytest.mark.parametrize("impl", ["ref", "xla"])
def test_the_report_carries_no_gradient(impl):
    x, head, targets, weights = draw(2, 5, 4, 9)

    def reported(x, head, weights):
        return jnp.sum(cross_entropy(x, head, targets, weights, impl=impl)[1])

    for slope in jax.jit(jax.grad(reported, (0, 1, 2)))(x, head, weights):
        assert not np.asarray(slope).any()


@pytest.mark.parametrize("impl", ["ref", "xla"])
def test_tokens_of_weight_zero_count_for_nothing(impl):
    x, head, targets, weights = draw(2, 40, 4, 9)
    other = jnp.where(weights == 0, (targets + 1) % 9, targets)
    assert np.any(other != targets)
    run = lambda *a: cross_entropy(*a, impl=impl)  # noqa: E731
    first, second = (value_and_slopes(run, x, head, t, weights) for t in (targets, other))
    for name, a, b in zip(NAMES, first, second, strict=True):
        if name in ("total", "dx", "dhead"):
            np.testing.assert_array_equal(a, b, err_msg=name)
    assert not first[2][np.asarray(weights) == 0].any()


def test_a_target_beyond_the_vocabulary_is_loud():
    x, head, targets, weights = draw(1, 5, 4, 9)
    targets = targets.at[0, 2].set(9)
    total, nll = jax.jit(cross_entropy)(x, head, targets, weights)
    assert np.isnan(total) and np.isnan(nll[0, 2]) and np.isfinite(np.delete(nll[0], 2)).all()


def test_large_logits_stay_finite():
    x, head, targets, weights = draw(2, 20, 8, 30)
    found = value_and_slopes(cross_entropy, 1000 * x, head, targets, weights)
    expected = value_and_slopes(by_optax, 1000 * x, head, targets, weights)
    assert all(np.isfinite(array).all() for array in found)
    assert_same(found, expected)


def test_the_loss_alone_is_the_loss_of_the_gradient_program():
    given = draw(2, 70, 8, 30)
    total, nll = jax.jit(cross_entropy)(*given)
    found = value_and_slopes(cross_entropy, *given)
    assert_close(total, found[0], "float32", "total")
    assert_close(nll, found[1], "float32", "nll")


@pytest.mark.parametrize("slopes", [False, True])
def test_a_large_case_holds_no_whole_array_of_logits(slopes):
    batch, length, width, vocabulary = 2, 2048, 16, 20_000
    shapes = ((batch, length, width), (width, vocabulary), (batch, length), (batch, length))
    dtypes = (np.float32, np.float32, np.int32, np.float32)
    given = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, dtypes, strict=True)]

    def total(*arguments):
        return cross_entropy(*arguments)[0]

    compiled = jax.jit(jax.grad(total, (0, 1, 3)) if slopes else total).lower(*given).compile()
    assert f"f32[{batch},{length},{vocabulary}]" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < batch * length * vocabulary * 4 / 6


@pytest.mark.parametrize("batch", [1, 3, 200])
@pytest.mark.parametrize("length", [1, 100, 3000])
@pytest.mark.parametrize("vocabulary", [10, 5000, 300_000])
def test_chunks_are_equal_and_few(batch, length, vocabulary):
    chunk = xla.chunk_length(batch, length, vocabulary)
    count = -(-length // chunk)
    assert 1 <= chunk <= length and count <= xla.CHUNKS
    assert count * chunk - length < count
    rows = max(xla.CHUNK_BYTES / (4 * vocabulary), xla.CHUNK_ROWS)
    assert batch * (chunk - 1) <= max(rows, batch * length / xla.CHUNKS)


def zeros(*shape, dtype=np.float32):
    return jnp.zeros(shape, dtype)


GOOD = {
    "x": zeros(2, 5, 4),
    "head": zeros(4, 9),
    "targets": zeros(2, 5, dtype=int),
    "weights": zeros(2, 5),
}
FAULTS = [
    ({"x": zeros(5, 4)}, "x has shape (5, 4), rank 2; it must have rank 3: (batch, time, width)."),
    ({"head": zeros(4)}, "head has shape (4,), rank 1; it must have rank 2: (width, vocabulary)."),
    ({"x": zeros(2, 0, 4)}, "x has shape (2, 0, 4); every size, time included, must be"),
    ({"head": zeros(4, 0)}, "head has shape (4, 0); every size must be at least 1."),
    ({"x": zeros(2, 5, 4, dtype=int)}, "x has dtype int32; it must be floating, as float32."),
    ({"head": zeros(4, 9, dtype=int)}, "head has dtype int32; it must be floating, as float32."),
    ({"head": zeros(9, 4)}, "head has shape (9, 4); its first size must be x's width, 4."),
    (
        {"targets": zeros(2, 4, dtype=int)},
        "targets has shape (2, 4); it must be x's (batch, time),",
    ),
    ({"weights": zeros(5, 2)}, "weights has shape (5, 2); it must be x's (batch, time), (2, 5)."),
    ({"targets": zeros(2, 5)}, "targets has dtype float32; it must be an integer, as int32."),
    ({"weights": zeros(2, 5, dtype=int)}, "weights has dtype int32; it must be floating, as float"),
    ({"softcap": -1.0}, "softcap is -1.0; it must be 0 (off) or positive, as 30.0."),
    ({"softcap": float("nan")}, "softcap is nan; it must be 0 (off) or positive, as 30.0."),
    ({"impl": "fast"}, "cross_entropy has no implementation 'fast'; it has ref, xla"),
]


@pytest.mark.parametrize(("fault", "message"), FAULTS)
def test_faults(fault, message):
    jax.eval_shape(cross_entropy, **GOOD)
    with pytest.raises(ValueError) as error:
        cross_entropy(**GOOD | fault)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_costs_of_tpu_launches_are_the_formulas():
    """32 rows and 301 entries: one tile of 32 rows, two of 256 entries, the last one ragged."""
    x, head, targets, weights = draw(2, 16, 24, 301)
    found = costs(cross_entropy, dict(x=x, head=head), targets=targets, weights=weights)
    rows, width, entries = 32, 24, 512
    product = 2 * rows * width * entries
    assert [cost.flops for cost in found] == [product, 2 * product, 2 * product]
    x, head, number = 4 * rows * width, 4 * width * entries, 4 * rows
    moved = [x + head + 3 * number, 2 * x + head + 3 * number, x + 2 * head + 3 * number]
    assert [cost.bytes_accessed for cost in found] == moved


@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_tpu_kernel_equals_optax(softcap):
    given = draw(2, 9, 8, 257)
    fused = lambda *a: cross_entropy(*a, softcap=softcap, impl="pallas_tpu")  # noqa: E731
    with setting.interpreting():
        found = value_and_slopes(fused, *given)
    assert_same(found, value_and_slopes(lambda *a: by_optax(*a, softcap), *given))


def test_tpu_kernel_is_loud_about_a_target_beyond_the_vocabulary():
    x, head, targets, weights = draw(1, 5, 4, 9)
    with setting.interpreting():
        total, nll = cross_entropy(x, head, targets.at[0, 2].set(9), weights, impl="pallas_tpu")
    assert np.isnan(total) and np.isnan(nll[0, 2]) and np.isfinite(np.delete(nll[0], 2)).all()


def test_a_width_beyond_the_room_of_a_tpu_names_the_widest():
    x, head, targets, weights = draw(1, 2, 3840, 9)
    message = r"does not cover width 3840 \(at most 3712 fits into VMEM\); use xla."
    with setting.interpreting(), pytest.raises(ValueError, match=message):
        cross_entropy(x, head, targets, weights, impl="pallas_tpu")
    for rows in (1, 100, 5000):
        for name in ("forward", "dx", "dhead"):
            assert pallas_tpu.tiles(name, rows, 3712, 50257, 4, 4).vocabulary >= 128


def test_a_tpu_kernel_needs_a_tpu():
    with pytest.raises(ValueError, match="cross_entropy as pallas_tpu needs a TPU"):
        cross_entropy(**GOOD, impl="pallas_tpu")
