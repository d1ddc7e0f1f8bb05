"""A mixer under test, and the few programs that all checks of the contract run.

Compiling is what a check costs, so programs are few: forward and backward of a whole row without a
state and of half a row with one. A shorter read is filled up with padding that holds random
numbers, so that a mixer which reads them is found.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from configs import schema

WIDTH, BATCH = 64, 4
LENGTH, HALF = 70, 35  # tokens of a row, and of a piece of it
CAPACITY = 300  # tokens that a state has room for
# Rows of (document, tokens), 0 for padding: boundaries on the edges of chunks and off them, single
# tokens, padding at both ends. The middle of each row is inside a document: a state goes on there,
# in row 2 through so short a rest that what a convolution keeps is older. A number may come back.
ROWS = (
    ((1, 16), (2, 16), (1, 1), (2, 37)),
    ((0, 3), (1, 16), (2, 1), (3, 37), (0, 13)),
    ((1, 33), (2, 4), (3, 1), (5, 32)),
    ((0, 5), (1, 1), (2, 1), (3, 1), (4, 16), (6, 37), (0, 9)),
)
ONE = np.ones((BATCH, LENGTH), np.int32)  # segments where every row is one document


def inputs(length: int, dtype=jnp.float32, seed: int = 1, batch: int = BATCH):
    """Unit normal activations (B, T, D)."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(batch, length, WIDTH)).astype(dtype)


def segments():
    """ROWS as an array (B, T)."""
    rows = [np.concatenate([np.full(count, number) for number, count in row]) for row in ROWS]
    return np.stack(rows).astype(np.int32)


def documents() -> list[tuple[int, int, int]]:
    """(row, start, tokens) of the documents of ROWS."""
    found = []
    for row, parts in enumerate(ROWS):
        at = 0
        for number, length in parts:
            found += [(row, at, length)] if number else []
            at += length
    return found


def cotangents(ids, dtype=jnp.float32):
    """Of outputs (B, T, D): zero at padding, whose outputs are nobody's."""
    return inputs(ids.shape[1], dtype, seed=2) * (ids != 0)[..., None].astype(dtype)


def filled(values, length: int, padding=None):
    """`values` (B, T, ...) with more tokens after them: those of `padding`, or zeros."""
    more = np.zeros if padding is None else lambda shape: padding[:, : shape[1]]
    shape = (len(values), length - values.shape[1], *values.shape[2:])
    return np.concatenate([values, more(shape).astype(values.dtype)], axis=1)


def floats(state):
    """`state` with None in place of what is no floating array."""
    return _partition(state)[0]


def zeros(tree):
    """Zeros like the arrays of `tree`."""
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree)


class Subject:
    """The mixer of a Config: `graph`, `params` (a nested dict), and calls of it."""

    def __init__(self, config):
        def make():
            self.graph, weights = nnx.split(config.build(WIDTH, nnx.Rngs(0)))
            return nnx.to_pure_dict(weights)

        self.params = jax.jit(make)()

    @property
    def module(self):
        return nnx.merge(self.graph, self.params)

    @property
    def causal(self) -> bool:
        """Whether it serves language models; else it reads whole documents and has no state."""
        return self.module.causal

    def fresh(self, dtype=jnp.float32, batch: int = BATCH):
        """The state before the first token."""
        return self.module.init_state(batch, CAPACITY, dtype)

    def run(self, x, ids=None, state=None):
        """(y, the state after) of a call without gradients."""
        return run(self.graph, self.params, x, ids, state)

    def row(self, x, ids, dy):
        """A call without a state, as in training: y, and the gradients of weights and x."""
        return row(self.graph, self.params, x, ids, dy)

    def piece(self, x, ids, state, dy, dstate):
        """A call with a state: (y, the state after), and the gradients of weights, x and state."""
        return _piece(self.graph, self.params, x, ids, state, dy, dstate)

    def steps(self, x, state):
        """(y, the state after) of calls with one token each."""
        return _steps(self.graph, self.params, x, state)

    def pieces(self, x, ids, state, dy, dstate, counts=(HALF, HALF)):
        """`piece` over `counts` tokens of a row, one after the other, as if it were one call."""
        junk, edges = inputs(HALF, seed=7), np.cumsum(counts)[:-1]
        cut = lambda array, padding=None: [
            filled(part, HALF, padding) for part in np.split(array, edges, axis=1)
        ]
        given = list(zip(cut(x, junk), cut(ids), cut(dy), strict=True))
        states, last = [state], None
        for x, ids, dy in given[:-1]:
            (_, after), _ = self.piece(x, ids, states[-1], dy, zeros(dstate))
            states.append(after)
        y, dx, dparams = [], [], []
        for (x, ids, dy), state, count in reversed(list(zip(given, states, counts, strict=True))):
            (out, after), (of_weights, of_x, dstate) = self.piece(x, ids, state, dy, dstate)
            y, dx = [out[:, :count], *y], [of_x[:, :count], *dx]
            dparams.append(of_weights)
            last = after if last is None else last
        join = lambda parts: np.concatenate(parts, axis=1)
        return (join(y), last), (_sum(dparams), join(dx), dstate)

    def read(self, x, state):
        """(y, the state after) of one document, by `piece` over as many tokens as it takes."""
        y, junk, none = [], inputs(HALF, seed=7), zeros(floats(state))
        for first in range(0, x.shape[1], HALF):
            part = x[:, first : first + HALF]
            ids = filled(ONE[:, : part.shape[1]], HALF)
            given = filled(part, HALF, junk)
            (out, state), _ = self.piece(given, ids, state, np.zeros_like(given), none)
            y.append(out[:, : part.shape[1]])
        return np.concatenate(y, axis=1), state

    @functools.cached_property
    def whole(self):
        """`row` of `inputs` as one document."""
        return self.row(inputs(LENGTH), ONE, cotangents(ONE))

    @functools.cached_property
    def packed(self):
        """`row` of `inputs` as the documents of ROWS."""
        return self.row(inputs(LENGTH), segments(), cotangents(segments()))

    def alone(self, x, dy):
        """y, and the gradients of weights and x, of ROWS with each document in its own row."""
        y, dx, dparams = np.zeros_like(x), np.zeros_like(x), []
        every = documents()
        for first in range(0, len(every), BATCH):
            some = every[first : first + BATCH]
            given, ids = inputs(LENGTH, seed=8).astype(x.dtype), np.zeros_like(ONE)
            slopes = np.zeros_like(x)
            for i, (row, at, n) in enumerate(some):
                given[i, :n], ids[i, :n] = x[row, at : at + n], 1
                slopes[i, :n] = dy[row, at : at + n]
            out, (of_weights, of_x) = jax.device_get(self.row(given, ids, slopes))
            for i, (row, at, n) in enumerate(some):
                y[row, at : at + n], dx[row, at : at + n] = out[i, :n], of_x[i, :n]
            dparams.append(of_weights)
        return y, (_sum(dparams), dx)


_BUILT: dict[str, Subject] = {}


def of(config) -> Subject:
    """The subject of a config: its checks share one."""
    key = schema.fingerprint(config)
    if key not in _BUILT:
        _BUILT[key] = Subject(config)
    return _BUILT[key]


@functools.partial(jax.jit, static_argnums=0)
def run(graph, params, x, ids=None, state=None):
    """`Subject.run` with weights that may have another place or dtype."""
    return nnx.merge(graph, params)(x, segments=ids, state=state)


@functools.partial(jax.jit, static_argnums=0)
def row(graph, params, x, ids, dy):
    """`Subject.row` with weights that may have another place."""
    call = lambda params, x: nnx.merge(graph, params)(x, segments=ids)[0]
    y, pull = jax.vjp(call, params, x)
    return y, pull(dy)


@functools.partial(jax.jit, static_argnums=0)
def _piece(graph, params, x, ids, state, dy, dstate):
    given, rest = _partition(state)

    def call(params, x, given):
        y, after = nnx.merge(graph, params)(x, segments=ids, state=_join(given, rest))
        return (y, floats(after)), after

    (y, _), pull, after = jax.vjp(call, params, x, given, has_aux=True)
    return (y, after), pull((dy, dstate))


@functools.partial(jax.jit, static_argnums=0)
def _steps(graph, params, x, state):
    def step(state, token):
        y, state = nnx.merge(graph, params)(token[:, None], state=state)
        return state, y[:, 0]

    state, y = jax.lax.scan(step, state, x.swapaxes(0, 1))
    return y.swapaxes(0, 1), state


def _partition(state):
    """Floating leaves and the others, each with None in place of the rest."""
    is_float = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)
    floating = jax.tree.map(lambda leaf: leaf if is_float(leaf) else None, state)
    rest = jax.tree.map(lambda leaf: None if is_float(leaf) else leaf, state)
    return floating, rest


def _join(floating, rest):
    none = lambda leaf: leaf is None
    return jax.tree.map(lambda a, b: b if a is None else a, floating, rest, is_leaf=none)


def _sum(trees):
    return jax.tree.map(lambda *leaves: sum(np.asarray(leaf) for leaf in leaves), *trees)
