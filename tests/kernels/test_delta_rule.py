"""What only the delta rule and dplr promise: products, equalities, pieces, documents, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import setting
from kernels.delta_rule import delta_rule, dplr
from tests.kernels.crossed import crossed
from tests.kernels.launches import costs
from tests.tolerance import assert_close

B, T, G, H, K, V = 2, 70, 2, 4, 8, 12
compiled = jax.jit(delta_rule, static_argnames=("impl", "scale"))
compiled_dplr = jax.jit(dplr, static_argnames="impl")


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
    return compiled(q, k, v, beta, decay, initial_state=state, impl=impl, **options)


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


@functools.partial(jax.jit, static_argnums=(0, 2))
def loss_and_slopes(operation, arrays, cut=T):
    """Of a loss of all outputs and the last state, of the row cut in two where `cut` says so."""
    weights = np.random.default_rng(9).normal(size=(B, T, H, V)).astype(np.float32)

    def loss(arrays):
        *inputs, state = arrays
        outs = []
        for part in (slice(0, cut), slice(cut, T)):
            if part.start < T:
                out, state = operation([*(a[:, part] for a in inputs), state])
                outs.append(out)
        return jnp.sum(jnp.concatenate(outs, axis=1) * weights) + jnp.sum(jnp.sin(state))

    return jax.value_and_grad(loss)(arrays)


@pytest.mark.parametrize(
    ("gate", "cut"),
    crossed(
        ["scalar", "vector"], [1, 33, 64], gate=[("vector", 1), ("scalar", 33), ("scalar", 64)]
    ),
)
def test_pieces_are_the_whole(gate, cut):
    arrays = [jnp.asarray(a, jnp.float32) for a in draw(4, gate)]
    want, got = loss_and_slopes(call, arrays), loss_and_slopes(call, arrays, cut)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(a, b, jnp.float32, f"cut at {cut}")


@pytest.mark.parametrize("gate", ["none", "scalar", "vector"])
def test_packed_documents_are_separate_documents(gate):
    arrays = draw(5, gate)
    edges = [0, 16, 17, 43, 69, T]
    row = np.repeat([1, 2, 3, 4, 5], np.diff(edges))
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


def draw_dplr(seed=0, length=T, strong=False):
    """q, k, v, a, b, log_decay and a state, float64; b^T a in (-1, 0), or (-2, 0) if `strong`."""
    rng = np.random.default_rng(seed)
    q, k, kappa = rng.normal(size=(3, B, length, H, K))
    kappa /= np.linalg.norm(kappa, axis=-1, keepdims=True)
    v = rng.normal(size=(B, length, H, V))
    eta = (2 if strong else 1) * rng.uniform(size=q.shape)
    decay = -rng.exponential(0.3, size=q.shape)
    return [q, k, v, -kappa, eta * kappa, decay, rng.normal(size=(B, H, K, V))]


def transitions(q, k, v, a, b, decay, state):
    """S_t as an explicit product with diag(exp g) + b a^T."""
    out, final = np.zeros(v.shape), np.zeros_like(state)
    for row, head in np.ndindex(B, H):
        s = state[row, head]
        for t in range(v.shape[1]):
            at = (row, t, head)
            s = (np.diag(np.exp(decay[at])) + np.outer(b[at], a[at])) @ s + np.outer(k[at], v[at])
            out[at] = K**-0.5 * q[at] @ s
        final[row, head] = s
    return out, final


def call_dplr(arrays, impl="xla", **options):
    """The operation on float32 copies, the state last."""
    *inputs, state = (jnp.asarray(a, jnp.float32) for a in arrays)
    return compiled_dplr(*inputs, initial_state=state, impl=impl, **options)


@pytest.mark.parametrize("impl", ["ref", "xla"])
@pytest.mark.parametrize("strong", [False, True])
def test_dplr_equals_products_of_matrices(strong, impl):
    arrays = draw_dplr(strong=strong)
    for got, want in zip(call_dplr(arrays, impl), transitions(*arrays), strict=True):
        assert_close(got, want, jnp.float32, "dplr")


@pytest.mark.parametrize(
    ("gate", "impl"),
    crossed(["scalar", "vector"], ["ref", "xla"], gate=[("scalar", "ref"), ("vector", "xla")]),
)
def test_delta_rule_is_dplr(gate, impl):
    """k' = beta k, a = exp(g) k, b = -beta k: the same function, so the same gradients too."""
    arrays = [jnp.asarray(a, jnp.float32) for a in draw(8, gate)]
    arrays[:2] = (jnp.repeat(a, H // G, axis=2) for a in arrays[:2])
    weights = jnp.asarray(np.random.default_rng(9).normal(size=(B, T, H, V)), jnp.float32)

    def loss(operation):
        def run(arrays):
            out, state = operation(arrays)
            return jnp.sum(out * weights) + jnp.sum(jnp.sin(state)), (out, state)

        return jax.jit(jax.value_and_grad(run, has_aux=True))

    def through_dplr(arrays):
        q, k, v, beta, decay, state = arrays
        decay = jnp.broadcast_to(decay if gate == "vector" else decay[..., None], k.shape)
        written = beta[..., None] * k
        return call_dplr([q, written, v, jnp.exp(decay) * k, -written, decay, state], impl)

    got, want = loss(through_dplr)(arrays), loss(lambda arrays: call(arrays, impl))(arrays)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(a, b, jnp.float32, gate)


@pytest.mark.parametrize("cut", [1, 33, 64])
def test_dplr_in_pieces_is_the_whole(cut):
    arrays = [jnp.asarray(a, jnp.float32) for a in draw_dplr(4)]
    want, got = loss_and_slopes(call_dplr, arrays), loss_and_slopes(call_dplr, arrays, cut)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(a, b, jnp.float32, f"cut at {cut}")


def test_dplr_of_packed_documents_is_dplr_of_each():
    arrays = draw_dplr(5)
    edges = [0, 16, 17, 43, 69, T]
    row = np.repeat([1, 2, 3, 4, 5], np.diff(edges))
    out, state = call_dplr(arrays, segments=jnp.asarray(np.stack([row, row]), jnp.int32))
    entering = arrays[6]
    for a, b in zip(edges, edges[1:], strict=False):
        want, last = call_dplr([x[:, a:b] for x in arrays[:6]] + [entering])
        assert_close(out[:, a:b], want, jnp.float32, f"document {a}:{b}")
        entering = np.zeros_like(arrays[6])
    assert_close(state, last, jnp.float32, "final state")


def test_dplr_gradients_at_extreme_gates():
    """Each gradient in float32 against the reference in float64, gates at e^-30 beside 1 - 1e-4."""
    arrays = draw_dplr(6)
    arrays[5] = np.random.default_rng(0).choice([0.0, -1e-4, -30.0], size=arrays[5].shape)
    arrays = [a.astype(np.float32) for a in arrays]
    weights = np.random.default_rng(9).normal(size=(B, T, H, V)).astype(np.float32)

    def gradients(impl, arrays, weights):
        def loss(arrays):
            *inputs, state = arrays
            out, state = dplr(*inputs, initial_state=state, impl=impl)
            return jnp.sum(out * weights) + jnp.sum(jnp.sin(state))

        return jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(arrays))

    got = gradients("xla", arrays, weights)
    with jax.enable_x64(True):
        wide = [a.astype(np.float64) for a in (*arrays, weights)]
        want = gradients("ref", wide[:-1], wide[-1])
    for name, a, b in zip("q k v a b log_decay state".split(), got, want, strict=True):
        assert_close(a, b, jnp.float32, f"gradient of {name}")


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (0, (B, T, H), r"q has shape \(2, 70, 4\), rank 3; it must have rank 4"),
        (1, (B, T, H, 9), r"k has shape \(2, 70, 4, 9\); it must be q's shape, \(2, 70, 4, 8\)"),
        (2, (B, T, 2 * H, V), r"v has 8 heads and q and k have 4; .* so v must have 4"),
        (2, (B, T + 1, H, V), r"v has \(batch, time\) \(2, 71\); it must be q's and k's \(2, 70\)"),
        (3, (B, T, H, 1), r"a has shape \(2, 70, 4, 1\); it must be q's shape, \(2, 70, 4, 8\)"),
        (4, (B, T, 1, K), r"b has shape \(2, 70, 1, 8\); it must be q's shape, \(2, 70, 4, 8\)"),
        (5, (B, T, H), r"log_decay has shape \(2, 70, 4\); it must be q's shape, \(2, 70, 4, 8\)"),
        (6, (B, H, V, K), r"initial_state has shape .* it must be .* \(2, 4, 8, 12\)"),
    ],
)
def test_dplr_says_in_one_line_which_shape_is_wrong(index, shape, message):
    arrays = draw_dplr()
    arrays[index] = np.zeros(shape)
    with pytest.raises(ValueError, match=message) as caught:
        call_dplr(arrays)
    assert "\n" not in str(caught.value)


def test_dplr_gates_are_floating():
    arrays = [jnp.asarray(a, jnp.float32) for a in draw_dplr()]
    arrays[5] = arrays[5].astype(jnp.int32)
    with pytest.raises(ValueError, match="log_decay has dtype int32; it must be floating"):
        dplr(*arrays[:6], initial_state=arrays[6])


def test_dplr_segments_fit():
    with pytest.raises(ValueError, match=r"segments has shape \(2, 69\) .* \(2, 70\)"):
        call_dplr(draw_dplr(), segments=jnp.ones((B, T - 1), jnp.int32))


@pytest.mark.parametrize(
    ("heads", "dim", "gate", "message"),
    [
        (1, 264, "none", "does not take keys or values of 264, at most 256; use impl='xla'"),
        (5, 128, "scalar", "does not take 5 heads a key of 128, at most 4; use impl='xla'"),
        (3, 128, "vector", "does not take 3 heads a key of 128, at most 2; use impl='xla'"),
    ],
)
def test_the_tpu_kernel_says_what_it_does_not_take(heads, dim, gate, message):
    key, shape = jnp.zeros((1, 2, 1, dim)), (1, 2, heads)
    gates = {"none": None, "scalar": jnp.zeros(shape), "vector": jnp.zeros((*shape, dim))}[gate]
    value, beta = jnp.zeros((*shape, dim)), jnp.zeros(shape)
    with setting.interpreting(), pytest.raises(ValueError, match=message) as caught:
        delta_rule(key, key, value, beta, gates, impl="pallas_tpu")
    assert "\n" not in str(caught.value)


def launched(gate):
    """float32 calls of a few chunks for counting: (arguments, length, heads, key, value)."""
    length, heads, key, value = 256, 4, 32, 48
    of_key, number = (1, length, heads, key), (1, length, heads)
    shapes = dict(q=of_key, k=of_key, v=(1, length, heads, value))
    shapes |= dict(a=of_key, b=of_key) if gate == "low rank" else dict(beta=number)
    if gate != "none":
        shapes["log_decay"] = number if gate == "scalar" else of_key
    shapes["initial_state"] = (1, heads, key, value)
    given = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    return given, length, heads, key, value


@pytest.mark.parametrize("gate", ["none", "scalar", "vector", "low rank"])
def test_costs_of_tpu_launches_are_the_formulas(gate):
    """FLOPs of a chunk of 64 by hand: products of C C K, of C C V, of C K V, and the inverse."""
    given, length, heads, key, value = launched(gate)
    forward, backward = costs(dplr if gate == "low rank" else delta_rule, given)
    chunk = 64
    square = 2 * chunk * chunk
    # Joining 16 + 16 twice and 32 + 32 once, two products each.
    inverse = 2 * 2 * (2 * 16**3) + 2 * (2 * 32**3)
    # Scores: q and k meet k. By halving, readers and writers meet at 4 (whole columns), 8, 16, 32
    # (half of them): 5/4 C C K a pair, and twice that backward.
    ours, theirs = {"vector": (2.5, 7.5), "low rank": (5, 15)}.get(gate, (2, 6))
    values, states = {"low rank": ((4, 10), (4, 9))}.get(gate, ((2, 5), (3, 7)))
    for found, keys, of_values, of_states in zip(
        (forward, backward), (ours, theirs), values, states, strict=True
    ):
        one = square * (keys * key + of_values * value) + 2 * chunk * of_states * key * value
        assert found.flops == heads * length // chunk * (one + inverse)

    inputs = sum(4 * x.size for name, x in given.items() if name != "initial_state")
    state, out = 4 * heads * key * value, 4 * length * heads * value
    entering = state * length // chunk
    assert forward.bytes_accessed == inputs + out + 2 * state + entering
    assert backward.bytes_accessed == 2 * inputs + out + 2 * state + entering
