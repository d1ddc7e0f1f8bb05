"""The contract of `models/mixer.py` as functions of a Config; `test_contract.py` runs them on all.

Each check builds the mixer at a small width and raises AssertionError where the contract is broken.
A check without comparisons may say what it saw, for the table (tests/pages.py).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kernels import dispatch
from models import mixer
from models import weights as named_weights
from parallel import sharding
from parallel.mesh import make_mesh
from tests import precision, subject
from tests.subject import (
    BATCH,
    CAPACITY,
    HALF,
    LENGTH,
    ONE,
    WIDTH,
    cotangents,
    filled,
    floats,
    inputs,
    segments,
    zeros,
)
from tests.tolerance import TOLERANCE, assert_close, rms

BARE = 37  # tokens of the beginning of a row, which end in a chunk
MANY = CAPACITY  # tokens that are read one by one
CUTS = (34, 1, 35)  # pieces of a row, one of them a single token

ERRORS: list[float] = []  # relative RMS errors of the comparisons since it was last cleared


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
    """(B, T, D) in and out, finite; what follows changes no beginning, by no decision either."""
    one = subject.of(config)
    x = inputs(LENGTH)
    whole, _ = one.whole
    assert whole.shape == x.shape and whole.dtype == x.dtype, (whole.shape, whole.dtype)
    assert np.isfinite(np.asarray(whole)).all()
    if one.causal:
        other = np.concatenate([x[:, :BARE], inputs(LENGTH, seed=9)[:, BARE:]], axis=1)
        y, _ = one.row(other, ONE, cotangents(ONE))
        close(y[:, :BARE], np.asarray(whole)[:, :BARE], f"first {BARE} tokens")
        return
    for length in (BARE, 2):
        y, _ = one.run(x[:, :length])
        assert y.shape == (BATCH, length, WIDTH) and np.isfinite(np.asarray(y)).all()


def causality(config) -> None:
    """The gradient of output t is zero at every later input, and not zero at input t.

    So it is where a state came in, but for rounding, and for tokens that a full expert refuses.
    In an encoder other inputs later on change outputs before: else it were a causal one.
    """
    one = subject.of(config)
    x, dy = inputs(LENGTH), cotangents(ONE)
    if not one.causal:
        other = np.concatenate([x[:, :12], inputs(LENGTH, seed=9)[:, 12:]], axis=1)
        first, second = one.whole[0][:, :12], one.row(other, ONE, dy)[0][:, :12]
        assert rms(second, first) > 1e-3, "no output depends on a later input: say causal = True"
        return
    for at in ((0, 15, 16, 31), (32, 63, 64, LENGTH - 1)):  # a state came in nowhere
        _reaches(one.row(x, ONE, _one_hot(dy, at))[1][1], at)
    state = one.fresh()
    x, ids, dy, none = x[:, :HALF], ONE[:, :HALF], dy[:, :HALF], zeros(floats(state))
    (_, state), _ = one.piece(x, ids, state, dy, none)
    for first in range(0, HALF, BATCH):
        at = tuple(min(first + row, HALF - 1) for row in range(BATCH))
        dx = np.asarray(one.piece(x, ids, state, _one_hot(dy, at), none)[1][1])
        for row, last in zip(dx, at, strict=True):
            # Sums over the past and the new tokens together cancel but for rounding.
            later = np.linalg.norm(row[last + 1 :]) / max(np.linalg.norm(row), 1e-30)
            assert later <= TOLERANCE["float32"], "an output depends on a later input"


def _one_hot(dy, at):
    """`dy` at token `at[b]` of row b, zero elsewhere."""
    return np.where((np.arange(dy.shape[1]) == np.asarray(at)[:, None])[..., None], dy, 0)


def _reaches(dx, at) -> None:
    """Gradients (B, T, D) of outputs at tokens `at` reach them and nothing later."""
    for row, last in zip(np.asarray(dx), at, strict=True):
        assert not row[last + 1 :].any(), "an output depends on a later input"
        assert row[last].any(), "an output does not depend on its own input"


def split(config) -> str | None:
    """Reading a row in pieces equals reading it whole: outputs, states and all gradients."""
    one = subject.of(config)
    if not one.causal:
        return _refuses_states(one)
    x, dy, state = inputs(LENGTH), cotangents(ONE), one.fresh()
    (y, state), slopes = one.pieces(x, ONE, state, dy, zeros(floats(state)))
    close((y, slopes[:2]), one.whole, "in pieces: ")
    # From a state that holds something, to one that something follows.
    given = x, ONE, state, dy, jax.tree.map(jnp.cos, floats(state))
    close(one.pieces(*given, CUTS), one.pieces(*given), "in other pieces: ")


def _refuses_states(one) -> str:
    """An encoder says that it keeps no state, whether asked for one or given one."""
    with pytest.raises(ValueError, match="bidirectional"):
        one.fresh()
    with pytest.raises(ValueError, match="bidirectional"):
        one.module(jnp.asarray(inputs(2)), state={})
    return "refuses"


def token_by_token(config, dtype=jnp.float32) -> str | None:
    """Single tokens equal pieces of many, in outputs and in the state after 300 tokens."""
    one = subject.of(config)
    if not one.causal:
        return _refuses_states(one)
    x, state = inputs(MANY, dtype), one.fresh(dtype)
    close(one.steps(x, state), one.read(x, state), "token by token: ", dtype)


def packing(config, dtype=jnp.float32) -> None:
    """Documents packed in a row equal documents alone: outputs, gradients, and what follows.

    So they do in pieces of the row; padding after a document is as if it were not there; and what
    tells documents apart is their order, not their numbers.
    """
    one = subject.of(config)
    _padded(one, dtype)
    ids, x = segments(), inputs(LENGTH, dtype)
    dy, real = cotangents(ids, dtype), (ids != 0)[..., None]
    y, slopes = one.packed if dtype == jnp.float32 else one.row(x, ids, dy)
    y = np.where(real, y, 0)
    close((y, slopes), one.alone(x, dy), "packed: ", dtype)
    if not one.causal:
        return
    state = one.fresh(dtype)
    none = zeros(floats(state))
    (z, after), of_pieces = one.pieces(x, ids, state, dy, none)
    close((np.where(real, z, 0), of_pieces[:2]), (y, slopes), "packed, in pieces: ", dtype)
    # What follows a packed row goes on from the row's last document alone.
    alone, number = inputs(LENGTH, dtype, seed=8), np.zeros_like(ids)
    for row, at, n in subject.documents():  # the last one of a row stays
        number[row], number[row, :n], alone[row, :n] = 0, 1, x[row, at : at + n]
    (_, end), _ = one.pieces(alone, number, state, dy, none)
    x, dy = inputs(HALF, dtype, seed=5), inputs(HALF, dtype, seed=6)
    follow = lambda state: one.piece(x, ONE[:, :HALF], state, dy, none)
    ((got, _), (_, dx, _)), ((want, _), (_, dx_alone, _)) = follow(after), follow(end)
    close((got, dx), (want, dx_alone), "continued", dtype)


def _padded(one, dtype) -> None:
    """A document with padding after it equals the beginning of a longer one, or itself alone.

    What the padding holds reaches no gradient, nor do gradients reach it.
    """
    whole, dy = inputs(LENGTH, dtype), cotangents(ONE, dtype)
    x, ids, dy_x = whole[:, :BARE], filled(ONE[:, :BARE], LENGTH), filled(dy[:, :BARE], LENGTH)
    y, slopes = one.row(filled(x, LENGTH, inputs(LENGTH, seed=8)), ids, dy_x)
    _, (dparams, dx) = one.row(filled(x, LENGTH), ids, dy_x)
    want, _ = one.row(whole, ONE, dy) if one.causal else one.run(x)  # which reads ahead
    want = np.asarray(want)[:, :BARE], (dparams, filled(np.asarray(dx)[:, :BARE], LENGTH))
    close((np.asarray(y)[:, :BARE], slopes), want, "padded: ", dtype)


def without_segments(config) -> None:
    """A row without segments is one document: outputs and gradients.

    So are its beginning alone, and 300 tokens that are read at once with a state.
    """
    one = subject.of(config)
    x = inputs(LENGTH)
    close(one.row(x, None, cotangents(ONE)), one.whole, "without segments: ")
    if one.causal:
        y, _ = one.run(x[:, :BARE])
        close(y, np.asarray(one.whole[0])[:, :BARE], "without segments, its beginning: ")
        x, state = inputs(MANY), one.fresh()
        close(one.run(x, None, state), one.read(x, state), "without segments, many: ")


def bfloat16(config) -> None:
    """bfloat16 activations stay near float32 ones, with float32 weights in both.

    Gains, biases and skips are applied in float32: no weight is rounded before it meets the tokens.
    """
    one = subject.of(config)
    x = inputs(LENGTH, jnp.bfloat16)
    program = subject.run.trace(one.graph, one.params, x).jaxpr
    found = precision.rounded(program, len(jax.tree.leaves(one.params)))
    assert not found, f"weights are applied in bfloat16: {'; '.join(found)}"
    want, _ = one.row(x.astype(np.float32), ONE, cotangents(ONE))
    got, _ = one.run(x)
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
    one = subject.of(config)
    x, ids = inputs(LENGTH), segments()
    got, _ = one.packed
    with jax.enable_x64(True), dispatch.using("ref"):
        wide = jax.tree.map(lambda p: np.asarray(p, np.float64), one.params)
        want, _ = subject.run(one.graph, wide, x.astype(np.float64), ids)
        assert want.dtype == jnp.float64
    got, want = (np.where((ids != 0)[..., None], y, 0) for y in (got, want))
    assert_close(got, want, jnp.float32, "float64 reference")
    ERRORS.append(rms(got, want))


def names(config) -> None:
    """Every weight names every dimension, with names that the sharding table knows."""
    dims = named_weights.dims(subject.of(config).module)
    for name in jax.tree.leaves(dims, is_leaf=lambda node: isinstance(node, tuple)):
        sharding.weight_spec(name)


def sharded(config) -> None:
    """On a mesh of data x fsdp x tensor = 2 x 2 x 2 all is as on one device.

    Outputs and gradients of packed rows; and two tokens after a state that is placed as well.
    """
    one = subject.of(config)
    ids, x = segments(), inputs(LENGTH)
    dy, real = cotangents(ids), (ids != 0)[..., None]
    want, want_slopes = one.packed
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    dims = named_weights.dims(one.module)
    place = lambda p, d: jax.device_put(p, sharding.weight_sharding(mesh, "weight", p.shape, d))
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    with sharding.on(mesh):
        params = jax.tree.map(place, one.params, dims)
        got, slopes = subject.row(one.graph, params, *jax.device_put((x, ids, dy), rows))
    close((got * real, slopes), (want * real, want_slopes), "sharded: ")
    if not one.causal:
        return
    state = one.fresh()
    x, ids, dy, none = x[:, : HALF + 2], ONE[:, :HALF], dy[:, :HALF], zeros(floats(state))
    (_, state), _ = one.piece(x[:, :HALF], ids, state, dy, none)
    two = filled(x[:, HALF:], HALF, x), filled(ids[:, :2], HALF)
    (want, after), _ = one.piece(*two, state, dy, none)
    with sharding.on(mesh):
        held = jax.device_put(state, sharding.shard_states(mesh, state))
        got = subject.run(one.graph, params, jax.device_put(x[:, HALF:], rows), None, held)
    close(got, (want[:, :2], after), "two tokens, sharded: ")


def states(config) -> str | None:
    """A fresh state is all zeros, keeps its shapes through a call, and has the bytes it reports."""
    one = subject.of(config)
    if not one.causal:
        return _refuses_states(one)
    state = one.fresh()
    for leaf in jax.tree.leaves(state):
        assert not np.asarray(leaf).any(), "a fresh state must be all zeros"
    x, dy = inputs(LENGTH), cotangents(ONE)
    given = x[:, :HALF], ONE[:, :HALF], state, dy[:, :HALF], zeros(floats(state))
    (y, after), _ = one.piece(*given)
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert shapes(state) == shapes(after)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(one.fresh(batch=1)))
    assert mixer.state_bytes(config, WIDTH, CAPACITY, jnp.float32) == held
    close(y, one.whole[0][:, :HALF], "a fresh state given or not: ")


def extremes(config) -> None:
    """Activations 30 times too large give finite gradients; two runs agree in every bit."""
    one = subject.of(config)
    x, dy = 30 * inputs(LENGTH), cotangents(ONE)
    runs = [[one.row(x, ONE, dy)] for _ in range(2)]
    if one.causal:
        state = one.fresh()
        given = x[:, :HALF], ONE[:, :HALF], state, dy[:, :HALF]
        end = jax.tree.map(np.ones_like, floats(state))
        for run in runs:
            run.append(one.piece(*given, end))
    for a, b in zip(*map(jax.tree.leaves, runs), strict=True):
        assert np.isfinite(np.asarray(a)).all(), "not finite"
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


CHECKS = (
    shape_and_dtype,
    causality,
    split,
    token_by_token,
    packing,
    without_segments,
    bfloat16,
    packing_bfloat16,
    token_by_token_bfloat16,
    reference,
    names,
    sharded,
    states,
    extremes,
)
