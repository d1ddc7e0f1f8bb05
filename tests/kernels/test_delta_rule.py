"""What only the delta rule promises: products, strong writes, pieces, documents, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.delta_rule import delta_rule
from tests.tolerance import assert_close

B, T, G, H, K, V = 2, 70, 2, 4, 8, 12


def draw(seed=0, gate="scalar", strength=1.0, length=T, unit=True):
    """q, k, v, beta, log_decay and a state, float64; beta in (0, strength)."""
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(2, B, length, G, K))
    if unit:
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v = rng.normal(size=(B, length, H, V))
    beta = strength * rng.uniform(size=(B, length, H))
    shape = {"none": None, "scalar": (B, length, H), "vector": (B, length, H, K)}[gate]
    decay = None if shape is None else -rng.exponential(0.2, size=shape)
    return [q, k, v, beta, decay, rng.normal(size=(B, H, K, V))]


def products(q, k, v, beta, decay, state):
    """S_t as an explicit product: S_t = (I - beta k k^T) diag(alpha) S_{t-1} + beta k v^T."""
    out, final = np.zeros(v.shape), np.zeros_like(state)
    for b in range(v.shape[0]):
        for h in range(v.shape[2]):
            s, g = state[b, h], h // (v.shape[2] // q.shape[2])
            for t in range(v.shape[1]):
                key = k[b, t, g]
                alpha = 1.0 if decay is None else np.exp(decay[b, t, h])
                erase = np.eye(len(key)) - beta[b, t, h] * np.outer(key, key)
                s = erase @ (alpha * np.eye(len(key))) @ s
                s = s + beta[b, t, h] * np.outer(key, v[b, t, h])
                out[b, t, h] = len(key) ** -0.5 * q[b, t, g] @ s
            final[b, h] = s
    return out, final


def call(arrays, impl="xla", **options):
    """The operation on float32 copies, the state last."""
    q, k, v, beta, decay, state = (
        None if a is None else jnp.asarray(a, jnp.float32) for a in arrays
    )
    return delta_rule(q, k, v, beta, decay, initial_state=state, impl=impl, **options)


@pytest.mark.parametrize("impl", ["ref", "xla"])
@pytest.mark.parametrize("gate", ["none", "scalar", "vector"])
def test_equals_products_of_matrices(gate, impl):
    arrays = draw(gate=gate)
    for got, want in zip(call(arrays, impl), products(*arrays), strict=True):
        assert_close(got, want, jnp.float32, gate)


@pytest.mark.parametrize("gate", ["none", "scalar", "vector"])
def test_beta_near_two_and_long_keys(gate):
    arrays = draw(1, gate, strength=2.0, unit=False)
    arrays[1] *= 1.5 / np.linalg.norm(arrays[1], axis=-1, keepdims=True).mean()
    if gate == "none":  # without decay such keys make the state grow by itself; keep them short
        arrays[1] /= np.linalg.norm(arrays[1], axis=-1, keepdims=True)
    for got, want in zip(call(arrays), products(*arrays), strict=True):
        assert_close(got, want, jnp.float32, gate)


def test_vector_gate_of_equal_entries_is_the_scalar_gate():
    scalar = draw(2)
    vector = [*scalar]
    vector[4] = np.repeat(scalar[4][..., None], K, axis=-1)
    for got, want in zip(call(vector), call(scalar), strict=True):
        assert_close(got, want, jnp.float32, "gate")


def test_grouped_heads_are_repeated_heads():
    grouped = draw(3)
    repeated = [np.repeat(a, H // G, axis=2) for a in grouped[:2]] + grouped[2:]
    for got, want in zip(call(grouped), call(repeated), strict=True):
        assert_close(got, want, jnp.float32, "heads")


@pytest.mark.parametrize("gate", ["scalar", "vector"])
@pytest.mark.parametrize("cut", [1, 33, 64])
def test_pieces_are_the_whole(gate, cut):
    arrays = [jnp.asarray(a, jnp.float32) for a in draw(4, gate)]
    weights = jnp.asarray(np.random.default_rng(9).normal(size=(B, T, H, V)), jnp.float32)

    def whole(arrays):
        out, state = call(arrays)
        return jnp.sum(out * weights) + jnp.sum(jnp.sin(state))

    def pieces(arrays):
        first, state = call([a[:, :cut] for a in arrays[:5]] + [arrays[5]])
        second, state = call([a[:, cut:] for a in arrays[:5]] + [state])
        out = jnp.concatenate([first, second], axis=1)
        return jnp.sum(out * weights) + jnp.sum(jnp.sin(state))

    want, got = (jax.jit(jax.value_and_grad(f))(arrays) for f in (whole, pieces))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(a, b, jnp.float32, f"cut at {cut}")


@pytest.mark.parametrize("gate", ["none", "scalar", "vector"])
def test_packed_documents_are_separate_documents(gate):
    arrays = draw(5, gate)
    edges = [0, 16, 17, 40, T]
    row = np.repeat([1, 2, 3, 4], np.diff(edges))
    segments = jnp.asarray(np.stack([row, row]), jnp.int32)
    out, state = call(arrays, segments=segments)
    alone = arrays[5]
    for a, b in zip(edges, edges[1:], strict=False):
        part = [None if x is None else x[:, a:b] for x in arrays[:5]]
        want, alone = call([*part, alone])
        assert_close(out[:, a:b], want, jnp.float32, f"document {a}:{b}")
        last, alone = alone, np.zeros_like(arrays[5])
    assert_close(state, last, jnp.float32, "final state")


@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_extreme_gates_stay_finite_and_right(gate):
    arrays = draw(6, gate)
    choices = np.random.default_rng(0).choice([0.0, -1e-4, -30.0], size=arrays[4].shape)
    arrays[4] = choices
    got = call(arrays)
    for a, b in zip(got, products(*arrays), strict=True):
        assert_close(a, b, jnp.float32, gate)
    floats = [jnp.asarray(a, jnp.float32) for a in arrays]
    grads = jax.jit(jax.grad(lambda arrays: jnp.sum(call(arrays)[0] ** 2)))(floats)
    for grad in grads:
        assert np.isfinite(np.asarray(grad)).all()


def test_a_written_pair_is_read_back():
    """beta = 1 and a unit key: reading the key gives exactly the value written last."""
    arrays = draw(7, "none", length=5)
    arrays[3] = np.ones_like(arrays[3])
    arrays[0] = arrays[1]
    out, _ = call(arrays, scale=1.0)
    assert_close(out, arrays[2], jnp.float32, "recall")


@pytest.mark.parametrize(
    ("index", "shape", "word"),
    [
        (0, (B, T, G), "q"),
        (1, (B, T, G, K + 1), "k"),
        (2, (B, T, H + 1, V), "heads"),
        (2, (B, T + 1, H, V), "v"),
        (3, (B, T, H + 1), "beta"),
        (4, (B, T, H, K + 1), "log_decay"),
        (5, (B, H, V, K), "initial_state"),
    ],
)
def test_wrong_shapes_are_one_line(index, shape, word):
    arrays = draw()
    arrays[index] = np.zeros(shape)
    with pytest.raises(ValueError, match=word) as caught:
        call(arrays)
    assert "\n" not in str(caught.value)
