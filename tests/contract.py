"""The contract of `models/mixer.py` as functions of a Config; `test_contract.py` runs them on all.

Each check builds the mixer at a small width and raises AssertionError where the contract is broken.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kernels import dispatch
from models import lm, mixer
from parallel import sharding
from parallel.mesh import make_mesh
from tests.tolerance import assert_close

WIDTH, BATCH = 64, 2
# Rows of (document, tokens): one with boundaries on chunk edges, one ragged between paddings (0).
ROWS = (
    ((1, 16), (2, 16), (3, 32), (4, 6)),
    ((0, 3), (1, 20), (2, 1), (3, 41), (0, 5)),
)


def build(config, seed: int = 0):
    """Graph and weights (a nested dict) of the mixer."""
    graph, state = nnx.split(config.build(WIDTH, nnx.Rngs(seed)))
    return graph, nnx.to_pure_dict(state)


def inputs(length: int, dtype=jnp.float32, seed: int = 1, batch: int = BATCH):
    """Unit normal activations (B, T, D)."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(batch, length, WIDTH)), dtype)


def segments():
    """ROWS as an array (B, T)."""
    rows = [np.concatenate([np.full(count, number) for number, count in row]) for row in ROWS]
    return jnp.asarray(np.stack(rows), jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def run(graph, params, x, segments=None, state=None):
    """One call of the mixer."""
    return nnx.merge(graph, params)(x, segments=segments, state=state)


@functools.partial(jax.jit, static_argnums=0)
def fresh(graph, params, like):
    """The state before the first token for rows like `like`."""
    return nnx.merge(graph, params).init_state(like.shape[0], like.shape[1], like.dtype)


def close(got, want, what, dtype=jnp.float32):
    """Compare two pytrees leaf by leaf under the tolerance of `dtype`; integers must be equal."""
    paths = jax.tree_util.tree_leaves_with_path(want)
    for (path, b), a in zip(paths, jax.tree.leaves(got), strict=True):
        name = f"{what}{jax.tree_util.keystr(path)}"
        if jnp.issubdtype(b.dtype, jnp.floating):
            assert_close(np.asarray(a), np.asarray(b), dtype, name)
        else:
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=name)


def shape_and_dtype(config) -> None:
    """(B, T, D) in and out, in the input's dtype, with finite values, at every odd length."""
    graph, params = build(config)
    for dtype in (jnp.float32, jnp.bfloat16):
        x = inputs(3, dtype)
        y, _ = run(graph, params, x)
        assert y.shape == x.shape and y.dtype == dtype, (y.shape, y.dtype)
    whole, _ = run(graph, params, inputs(70))
    for length in (1, 2, 5, 33):
        y, _ = run(graph, params, inputs(70)[:, :length])
        if config.build(WIDTH, nnx.Rngs(0)).causal:
            close(y, whole[:, :length], f"first {length} tokens")
        assert np.isfinite(np.asarray(y)).all()


def causality(config) -> None:
    """The gradient of output t is zero at every later input, and not zero at input t."""
    graph, params = build(config)
    if not nnx.merge(graph, params).causal:
        return
    x = inputs(24, batch=1)
    jacobian = jax.jit(jax.jacrev(lambda x: run(graph, params, x)[0][0, :, :3].sum(-1)))(x)
    reach = np.abs(np.asarray(jacobian)[:, 0]).sum(-1)
    assert np.all(np.triu(reach, 1) == 0), "an output depends on a later input"
    assert np.all(np.diag(reach) > 0), "an output does not depend on its own input"


def _loss(graph, cuts, params, x, state, weights):
    """Weighted sum of outputs and final state when the row is read in pieces cut at `cuts`."""
    outputs = []
    for piece in jnp.split(x, cuts, axis=1):
        y, state = run(graph, params, piece, None, state)
        outputs.append(y)
    y = jnp.concatenate(outputs, axis=1)
    floats = [s for s in jax.tree.leaves(state) if jnp.issubdtype(s.dtype, jnp.floating)]
    total = jnp.sum(y * weights) + sum(jnp.sum(jnp.sin(s)) for s in floats)
    return total, (y, state)


def split(config) -> None:
    """Reading a row in pieces equals reading it whole: outputs, states and all gradients."""
    graph, params = build(config)
    x, weights = inputs(70), inputs(70, seed=2)
    _, state = run(graph, params, inputs(40, seed=3), None, fresh(graph, params, inputs(120)))
    floats, rest = _partition(state)

    def gradients(cuts):
        def loss(params, x, floats):
            return _loss(graph, cuts, params, x, _join(floats, rest), weights)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(params, x, floats)

    want = gradients(())
    for cuts in ((1, 38), (64,)):
        close(gradients(cuts), want, f"cut at {cuts}: ")


def _partition(state):
    """Floating leaves and the others, each with None in place of the rest."""
    is_float = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)
    floats = jax.tree.map(lambda leaf: leaf if is_float(leaf) else None, state)
    rest = jax.tree.map(lambda leaf: None if is_float(leaf) else leaf, state)
    return floats, rest


def _join(floats, rest):
    none = lambda leaf: leaf is None
    return jax.tree.map(lambda a, b: b if a is None else a, floats, rest, is_leaf=none)


def token_by_token(config) -> None:
    """Single-token steps equal one parallel call, in outputs and final state, after 300 tokens."""
    graph, params = build(config)
    x = inputs(300)
    state = fresh(graph, params, x)
    want = run(graph, params, x, None, state)

    @jax.jit
    def steps(state, x):
        def step(state, token):
            y, state = run(graph, params, token[:, None], None, state)
            return state, y[:, 0]

        state, y = jax.lax.scan(step, state, x.swapaxes(0, 1))
        return y.swapaxes(0, 1), state

    close(steps(state, x), want, "token by token: ")


def packing(config) -> None:
    """Documents packed in a row equal documents alone: outputs, gradients, and what follows."""
    graph, params = build(config)
    ids = segments()
    x, weights = inputs(70), inputs(70, seed=2) * (ids != 0)[..., None]
    spans = _documents(np.asarray(ids))

    def packed(params, x):
        y, state = run(graph, params, x, ids, fresh(graph, params, x))
        return jnp.sum(y * weights), (y * (ids != 0)[..., None], state)

    def separate(params, x):
        y, total = jnp.zeros_like(x), 0.0
        for row, start, stop in spans:
            out, _ = run(graph, params, x[row : row + 1, start:stop])
            total += jnp.sum(out * weights[row : row + 1, start:stop])
            y = y.at[row : row + 1, start:stop].set(out)
        return total, y

    grad = functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    (total, (y, state)), grads = jax.jit(grad(packed))(params, x)
    (alone, y_alone), grads_alone = jax.jit(grad(separate))(params, x)
    close((total, y, grads), (alone, y_alone, grads_alone), "packed: ")
    _final_states(graph, params, x, spans, state)


def _documents(ids):
    """(row, start, stop) of every document."""
    spans = []
    for row, numbers in enumerate(ids):
        edges = np.flatnonzero(np.diff(numbers, prepend=-1, append=-1))
        spans += [(row, a, b) for a, b in zip(edges, edges[1:], strict=False) if numbers[a] != 0]
    return spans


def _final_states(graph, params, x, spans, state):
    """What follows a packed row goes on from the row's last document alone."""
    after = inputs(4, seed=5)
    got, _ = run(graph, params, after, None, state)
    for row in range(x.shape[0]):
        _, start, stop = [span for span in spans if span[0] == row][-1]
        one = x[row : row + 1, start:stop]
        empty = fresh(graph, params, jnp.zeros((1, one.shape[1] + 4, WIDTH), x.dtype))
        _, alone = run(graph, params, one, None, empty)
        want, _ = run(graph, params, after[row : row + 1], None, alone)
        close(got[row : row + 1], want, f"row {row} continued")


def bfloat16(config) -> None:
    """bfloat16 activations stay near float32 ones, with float32 weights in both."""
    graph, params = build(config)
    x = inputs(70, jnp.bfloat16)
    want, _ = run(graph, params, x.astype(jnp.float32))
    got, _ = run(graph, params, x)
    close(got.astype(jnp.float32), want, "bfloat16", jnp.bfloat16)


def reference(config) -> None:
    """float32 chunked forms agree with the float64 token-by-token reference, on equal weights."""
    graph, params = build(config)
    x = inputs(70)
    ids = segments()
    got, _ = run(graph, params, x, ids)
    with jax.enable_x64(True), dispatch.using("ref"):
        wide = jax.tree.map(lambda p: jnp.asarray(np.asarray(p, np.float64)), params)
        want, _ = nnx.merge(graph, wide)(jnp.asarray(np.asarray(x, np.float64)), segments=ids)
        assert want.dtype == jnp.float64
        want = np.asarray(want)
    real = np.asarray(ids)[..., None] != 0
    assert_close(np.asarray(got) * real, want * real, jnp.float32, "float64 reference")


def names(config) -> None:
    """Every weight names every dimension, with names that the sharding table knows."""
    module = config.build(WIDTH, nnx.Rngs(0))
    dims = jax.tree.leaves(lm.weight_dims(module), is_leaf=lambda node: isinstance(node, tuple))
    for name in dims:
        sharding.weight_spec(name)


def sharded(config) -> None:
    """On a mesh of data x fsdp x tensor = 2 x 2 x 2: outputs and gradients as on one device."""
    graph, params = build(config)
    x, weights, ids = inputs(70, batch=4), inputs(70, seed=2, batch=4), jnp.tile(segments(), (2, 1))

    def loss(params, x):
        y, _ = nnx.merge(graph, params)(x, segments=ids)
        return jnp.sum(y * weights), y

    grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    want = jax.jit(grad)(params, x)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    dims = lm.weight_dims(nnx.merge(graph, params))
    place = lambda p, d: jax.device_put(p, sharding.weight_sharding(mesh, "weight", p.shape, d))
    with sharding.on(mesh):
        rows = NamedSharding(mesh, P(("data", "fsdp")))
        got = jax.jit(grad)(jax.tree.map(place, params, dims), jax.device_put(x, rows))
    close(got, want, "sharded: ")


def states(config) -> None:
    """A fresh state is all zeros, keeps its shapes through a call, and has the bytes it reports."""
    graph, params = build(config)
    x = inputs(9)
    state = fresh(graph, params, x)
    for leaf in jax.tree.leaves(state):
        assert not np.asarray(leaf).any(), "a fresh state must be all zeros"
    _, after = run(graph, params, x, None, state)
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert shapes(state) == shapes(after)
    one = fresh(graph, params, inputs(9, batch=1))
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(one))
    assert mixer.state_bytes(config, WIDTH, 9, jnp.float32) == held
    y, _ = run(graph, params, x)
    z, _ = run(graph, params, x, None, state)
    close(z, y, "a fresh state given or not: ")


def extremes(config) -> None:
    """Activations 30 times too large give finite gradients; two runs agree in every bit."""
    graph, params = build(config)
    x = 30 * inputs(70)
    loss = jax.jit(
        jax.value_and_grad(lambda p, x: jnp.sum(run(graph, p, x)[0] ** 2), argnums=(0, 1))
    )
    first, second = loss(params, x), loss(params, x)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert np.isfinite(np.asarray(a)).all(), "not finite"
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


CHECKS = (
    shape_and_dtype,
    causality,
    split,
    token_by_token,
    packing,
    bfloat16,
    reference,
    names,
    sharded,
    states,
    extremes,
)
