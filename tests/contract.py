"""The contract of `models/mixer.py` as functions of a Config; `test_contract.py` runs them on all.

Each check builds the mixer at a small width and raises AssertionError where the contract is broken.
A check without comparisons may say what it saw, for the table (tests/pages.py).
Programs are shared between the checks of a config: equal functions of equal shapes compile once.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import schema
from kernels import dispatch
from models import mixer
from models import weights as named_weights
from parallel import sharding
from parallel.mesh import make_mesh
from tests.tolerance import assert_close, rms

WIDTH, BATCH, CAPACITY = 64, 4, 120
# Rows of (document, tokens), 0 for padding: boundaries on the edges of chunks and off them, single
# tokens, padding at both ends. Few lengths, so that documents of one length run together.
ROWS = (
    ((1, 16), (2, 16), (3, 1), (4, 37)),
    ((0, 3), (1, 16), (2, 1), (3, 37), (0, 13)),
    ((1, 1), (2, 16), (3, 16), (5, 37)),
    ((0, 5), (1, 1), (2, 1), (3, 1), (4, 16), (6, 37), (0, 9)),
)
LENGTH, LAST = 70, 37  # tokens of a row, and of the last document of every row


def build(config):
    """Graph and weights (a nested dict) of the mixer."""
    key = schema.fingerprint(config)
    if key not in _BUILT:
        make = lambda: nnx.split(config.build(WIDTH, nnx.Rngs(0)))
        graph, _ = nnx.eval_shape(make)
        _BUILT[key] = graph, jax.jit(lambda: nnx.to_pure_dict(make()[1]))()
    return _BUILT[key]


ERRORS: list[float] = []  # relative RMS errors of the comparisons since it was last cleared
_BUILT = {}  # by the settings: the checks of a config share one mixer


def causal(graph, params) -> bool:
    """Whether the mixer serves language models; else it reads whole documents and has no state."""
    return nnx.merge(graph, params).causal


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


def fresh(graph, params, x, capacity: int = CAPACITY):
    """The state before the first token for rows like `x`; None for an encoder."""
    module = nnx.merge(graph, params)
    return module.init_state(x.shape[0], capacity, x.dtype) if module.causal else None


def close(got, want, what, dtype=jnp.float32):
    """Compare two pytrees leaf by leaf under the tolerance of `dtype`; integers must be equal."""
    paths = jax.tree_util.tree_leaves_with_path(want)
    for (path, b), a in zip(paths, jax.tree.leaves(got), strict=True):
        name = f"{what}{jax.tree_util.keystr(path)}"
        if jnp.issubdtype(b.dtype, jnp.floating):
            assert_close(np.asarray(a), np.asarray(b), dtype, name)
            ERRORS.append(rms(a, b))
        else:
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=name)


def shape_and_dtype(config) -> None:
    """(B, T, D) in and out, finite, and a beginning of a row reads as it does in the whole row."""
    graph, params = build(config)
    x = inputs(LENGTH)
    whole, _ = run(graph, params, x)
    assert whole.shape == x.shape and whole.dtype == x.dtype, (whole.shape, whole.dtype)
    for length in (2, LAST):
        y, _ = run(graph, params, x[:, :length])
        assert y.shape == (BATCH, length, WIDTH) and np.isfinite(np.asarray(y)).all()
        if causal(graph, params):
            close(y, whole[:, :length], f"first {length} tokens")


def causality(config) -> None:
    """The gradient of output t is zero at every later input, and not zero at input t.

    In an encoder other inputs later on change outputs before: else it were a causal one.
    """
    graph, params = build(config)
    x = inputs(24, batch=1)
    if not causal(graph, params):
        other = x.at[:, 12:].set(inputs(24, seed=9, batch=1)[:, 12:])
        first, second = (run(graph, params, one)[0][:, :12] for one in (x, other))
        assert rms(second, first) > 1e-3, "no output depends on a later input: say causal = True"
        return
    outputs = lambda x: nnx.merge(graph, params)(x)[0][0, :, :3].sum(-1)
    jacobian = jax.jit(jax.jacrev(outputs))(x)
    reach = np.abs(np.asarray(jacobian)[:, 0]).sum(-1)
    assert np.all(np.triu(reach, 1) == 0), "an output depends on a later input"
    assert np.all(np.diag(reach) > 0), "an output does not depend on its own input"


def _pieces(graph, cuts, params, x, floats, rest, weights):
    """Weighted sum of outputs and final state when the row is read in pieces cut at `cuts`."""
    outputs, state = [], _join(floats, rest)
    for piece in jnp.split(x, cuts, axis=1):
        y, state = nnx.merge(graph, params)(piece, state=state)
        outputs.append(y)
    y = jnp.concatenate(outputs, axis=1)
    held = [s for s in jax.tree.leaves(state) if jnp.issubdtype(s.dtype, jnp.floating)]
    total = jnp.sum(y * weights) + sum(jnp.sum(jnp.sin(s)) for s in held)
    return total, (y, state)


_gradients = jax.jit(
    jax.value_and_grad(_pieces, argnums=(2, 3, 4), has_aux=True), static_argnums=(0, 1)
)


def split(config) -> str | None:
    """Reading a row in pieces equals reading it whole: outputs, states and all gradients."""
    graph, params = build(config)
    if not causal(graph, params):
        return _refuses_states(graph, params)
    x, weights, before = inputs(LENGTH), inputs(LENGTH, seed=2), inputs(LAST, seed=3)
    _, state = run(graph, params, before, None, fresh(graph, params, before))
    floats, rest = _partition(state)
    (_, whole), slopes = _gradients(graph, (), params, x, floats, rest, weights)
    (_, pieces), slopes_of_pieces = _gradients(graph, (1, 65), params, x, floats, rest, weights)
    close((pieces, slopes_of_pieces), (whole, slopes), "in pieces: ")


def _refuses_states(graph, params) -> str:
    """An encoder says that it keeps no state, whether asked for one or given one."""
    module = nnx.merge(graph, params)
    with pytest.raises(ValueError, match="bidirectional"):
        module.init_state(1, 8)
    with pytest.raises(ValueError, match="bidirectional"):
        module(inputs(2), state={})
    return "refuses"


def _partition(state):
    """Floating leaves and the others, each with None in place of the rest."""
    is_float = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)
    floats = jax.tree.map(lambda leaf: leaf if is_float(leaf) else None, state)
    rest = jax.tree.map(lambda leaf: None if is_float(leaf) else leaf, state)
    return floats, rest


def _join(floats, rest):
    none = lambda leaf: leaf is None
    return jax.tree.map(lambda a, b: b if a is None else a, floats, rest, is_leaf=none)


@functools.partial(jax.jit, static_argnums=0)
def _steps(graph, params, x, state):
    def step(state, token):
        y, state = nnx.merge(graph, params)(token[:, None], state=state)
        return state, y[:, 0]

    state, y = jax.lax.scan(step, state, x.swapaxes(0, 1))
    return y.swapaxes(0, 1), state


def token_by_token(config, dtype=jnp.float32) -> str | None:
    """Single-token steps equal one parallel call, in outputs and final state, after 300 tokens."""
    graph, params = build(config)
    if not causal(graph, params):
        return _refuses_states(graph, params)
    x = inputs(300, dtype)
    state = fresh(graph, params, x, 300)
    want = run(graph, params, x, None, state)
    close(_steps(graph, params, x, state), want, "token by token: ", dtype)


def _packed(graph, params, x, ids, weights, state):
    y, state = nnx.merge(graph, params)(x, segments=ids, state=state)
    y = y * (ids != 0)[..., None]
    return jnp.sum((y * weights).astype(jnp.float32)), (y, state)


_packed = jax.jit(jax.value_and_grad(_packed, argnums=(1, 2), has_aux=True), static_argnums=0)


def _separate(graph, params, x, spans, weights):
    """`_packed` with every document by itself, those of one length in one call."""
    y, total = jnp.zeros_like(x), 0.0
    for length, starts in spans:
        cut = lambda a: jnp.stack([a[row, at : at + length] for row, at in starts])  # noqa: B023
        out, _ = nnx.merge(graph, params)(cut(x))
        total += jnp.sum((out * cut(weights)).astype(jnp.float32))
        for one, (row, at) in zip(out, starts, strict=True):
            y = y.at[row, at : at + length].set(one)
    return total, y


_separate = jax.jit(
    jax.value_and_grad(_separate, argnums=(1, 2), has_aux=True), static_argnums=(0, 3)
)


def _spans():
    """((length, ((row, start), ...)), ...): the documents of ROWS by their length."""
    found = {}
    for row, documents in enumerate(ROWS):
        at = 0
        for number, length in documents:
            if number:
                found.setdefault(length, []).append((row, at))
            at += length
    return tuple((length, tuple(starts)) for length, starts in found.items())


def packing(config, dtype=jnp.float32) -> None:
    """Documents packed in a row equal documents alone: outputs, gradients, and what follows.

    What tells documents apart is their order, not their numbers.
    """
    graph, params = build(config)
    ids = segments()
    x, weights = inputs(LENGTH, dtype), inputs(LENGTH, dtype, seed=2) * (ids != 0)[..., None]
    before = fresh(graph, params, x)
    (_, (y, state)), grads = _packed(graph, params, x, ids, weights, before)
    (_, y_alone), grads_alone = _separate(graph, params, x, _spans(), weights)
    close((y, grads), (y_alone, grads_alone), "packed: ", dtype)
    is_causal = causal(graph, params)
    _numbers_may_come_back(graph, params, x, weights, state if is_causal else None)
    if not is_causal:
        return
    # What follows a packed row goes on from the row's last document alone.
    starts = dict(_spans())[LAST]
    last = jnp.stack([x[row, at : at + LAST] for row, at in starts])
    _, alone = run(graph, params, last, None, before)
    after = inputs(4, dtype, seed=5)
    got, want = (run(graph, params, after, None, s)[0] for s in (state, alone))
    close(got, want, "continued", dtype)


def _numbers_may_come_back(graph, params, x, weights, state) -> None:
    """Documents are told apart by order: numbers used twice in a row change not one bit."""
    ids = np.asarray(segments())
    order = np.cumsum(np.diff(ids, axis=1, prepend=0) > 0, axis=1)
    twice = jnp.asarray(np.where(ids != 0, 1 + order % 2, 0), jnp.int32)
    once, again = (_packed(graph, params, x, i, weights, state) for i in (segments(), twice))
    for a, b in zip(*map(jax.tree.leaves, (once, again)), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def bfloat16(config) -> None:
    """bfloat16 activations stay near float32 ones, with float32 weights in both."""
    graph, params = build(config)
    x = inputs(LENGTH, jnp.bfloat16)
    want, _ = run(graph, params, x.astype(jnp.float32))
    got, _ = run(graph, params, x)
    assert got.dtype == x.dtype, got.dtype
    close(got.astype(jnp.float32), want, "bfloat16", jnp.bfloat16)


def packing_bfloat16(config) -> None:
    """`packing` with bfloat16 activations."""
    packing(config, jnp.bfloat16)


def token_by_token_bfloat16(config) -> str | None:
    """`token_by_token` with bfloat16 activations."""
    return token_by_token(config, jnp.bfloat16)


def reference(config) -> None:
    """float32 chunked forms agree with the float64 token-by-token reference, on equal weights."""
    graph, params = build(config)
    x, ids = inputs(LENGTH), segments()
    weights = inputs(LENGTH, seed=2) * (ids != 0)[..., None]
    got = _packed(graph, params, x, ids, weights, fresh(graph, params, x))[0][1][0]
    with jax.enable_x64(True), dispatch.using("ref"):
        wide = jax.tree.map(lambda p: jnp.asarray(np.asarray(p, np.float64)), params)
        want, _ = run(graph, wide, jnp.asarray(np.asarray(x, np.float64)), ids)
        assert want.dtype == jnp.float64
        want = np.asarray(want)
    want = want * (np.asarray(ids)[..., None] != 0)
    assert_close(got, want, jnp.float32, "float64 reference")
    ERRORS.append(rms(got, want))


def names(config) -> None:
    """Every weight names every dimension, with names that the sharding table knows."""
    dims = jax.tree.leaves(
        named_weights.dims(nnx.merge(*build(config))), is_leaf=lambda node: isinstance(node, tuple)
    )
    for name in dims:
        sharding.weight_spec(name)


def sharded(config) -> None:
    """On a mesh of data x fsdp x tensor = 2 x 2 x 2: outputs and gradients as on one device."""
    graph, params = build(config)
    ids, x = segments(), inputs(LENGTH)
    weights = inputs(LENGTH, seed=2) * (ids != 0)[..., None]
    state = fresh(graph, params, x)
    (_, want), grads = _packed(graph, params, x, ids, weights, state)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    dims = named_weights.dims(nnx.merge(graph, params))
    place = lambda p, d: jax.device_put(p, sharding.weight_sharding(mesh, "weight", p.shape, d))
    with sharding.on(mesh):
        rows = NamedSharding(mesh, P(("data", "fsdp")))
        x, ids, weights = jax.device_put((x, ids, weights), rows)
        state = jax.device_put(state, sharding.shard_states(mesh, state))
        placed = jax.tree.map(place, params, dims)
        (_, got), got_grads = _packed(graph, placed, x, ids, weights, state)
    close((got, got_grads), (want, grads), "sharded: ")


def states(config) -> str | None:
    """A fresh state is all zeros, keeps its shapes through a call, and has the bytes it reports."""
    graph, params = build(config)
    if not causal(graph, params):
        return _refuses_states(graph, params)
    x = inputs(LAST)
    state = fresh(graph, params, x)
    for leaf in jax.tree.leaves(state):
        assert not np.asarray(leaf).any(), "a fresh state must be all zeros"
    z, after = run(graph, params, x, None, state)
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert shapes(state) == shapes(after)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(fresh(graph, params, x[:1])))
    assert mixer.state_bytes(config, WIDTH, CAPACITY, jnp.float32) == held
    y, _ = run(graph, params, x)
    close(z, y, "a fresh state given or not: ")


def extremes(config) -> None:
    """Activations 30 times too large give finite gradients; two runs agree in every bit."""
    graph, params = build(config)
    x = 30 * inputs(LENGTH)
    floats, rest = _partition(fresh(graph, params, x))
    runs = [
        _gradients(graph, (), params, x, floats, rest, inputs(LENGTH, seed=2)) for _ in range(2)
    ]
    for a, b in zip(*map(jax.tree.leaves, runs), strict=True):
        assert np.isfinite(np.asarray(a)).all(), "not finite"
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


CHECKS = (
    shape_and_dtype,
    causality,
    split,
    token_by_token,
    packing,
    bfloat16,
    packing_bfloat16,
    token_by_token_bfloat16,
    reference,
    names,
    sharded,
    states,
    extremes,
)
