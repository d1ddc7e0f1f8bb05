"""Diagonal recurrences as TPU kernels: blocks of time stream past a state that stays in VMEM.

The grid is (rows, parts of the channels, blocks of time), the blocks in order. Within a block eight
tokens, the rows of a vector register, are combined by three steps of doubling, and the state enters
them by one product; channels lie along the lanes and never meet. Reads and writes of whole arrays
are therefore the whole cost: forward x, decays and h once, and for a backward pass one state a
block. The backward walk goes from the last block to the first: it runs each block again into
scratch memory, then walks it back with the slope of the state in VMEM.

A number is a tuple of one array (real) or two (real, imaginary), so that both recurrences share
everything but how a decay is made and multiplied. Lengths need no padding: rows beyond the end
count as padding.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels import setting, tpu
from kernels.linear_scan.rotation import (
    Factor,
    conjugate,
    cos_and_sin,
    one_part,
    times,
    two_parts,
)
from kernels.pallas_tpu_marks import PADDING, of_tokens, turned
from kernels.products import sum_type

Number = tuple[Any, ...]
# Rows of a register, rows that are loaded together (a register of bfloat16), lanes of a block.
TILE, ROWS, LANES, LONGEST = 8, 16, 512, 256


class Form(NamedTuple):
    """What a program is; static."""

    kind: str  # real, complex, or constant (complex, factors without time)
    length: int
    chunk: int
    packed: bool

    @property
    def ragged(self) -> bool:
        return self.length % self.chunk > 0


class Laid(NamedTuple):
    """One device's arrays as the kernels read them; numbers are tuples."""

    marks: Any  # (B, N, 1, C) or None
    x: Number  # (B, T, D)
    gates: Number  # (B, T, D): log decays, phases; constant: (8, D), see `_table`
    state: Any  # (B, S, D), S parts of a number


def linear_scan(
    x: Float[Array, "B T D"],
    log_decay: Float[Array, "B T D"],
    *,
    segments: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B D"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D"]]:
    """The recurrence of `kernels.linear_scan` on TPUs, split over a mesh by rows and channels."""
    _check("linear_scan", x)
    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], x.shape[2]), jnp.float32)

    def local(*, x, log_decay, segments, initial_state):
        (h,), final = _on_device("real", (x,), (log_decay,), segments, initial_state[:, None])
        return h, final[:, 0]

    arguments = dict(x=x, log_decay=log_decay, segments=segments, initial_state=initial_state)
    dims = dict(x="b t d", log_decay="b t d", segments="b t", initial_state="b d")
    return tpu.over_mesh(local, arguments, dims, outputs=("b t d", "b d"))


def complex_linear_scan(
    x_real: Float[Array, "B T D"],
    x_imag: Float[Array, "B T D"],
    log_decay: Float[Array, "..."],
    phase: Float[Array, "..."],
    *,
    segments: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B 2 D"] | None = None,
) -> tuple[tuple[Float[Array, "B T D"], Float[Array, "B T D"]], Float[Array, "B 2 D"]]:
    """The recurrence of `kernels.complex_linear_scan` on TPUs, split as the real one."""
    _check("complex_linear_scan", x_real)
    if initial_state is None:
        initial_state = jnp.zeros((x_real.shape[0], 2, x_real.shape[2]), jnp.float32)
    kind = "constant" if log_decay.ndim == 1 else "complex"

    def local(*, x_real, x_imag, log_decay, phase, segments, initial_state):
        x, gates = (x_real, x_imag), (log_decay, phase)
        h, final = _on_device(kind, x, gates, segments, initial_state)
        return *h, final

    gate = "d" if kind == "constant" else "b t d"
    arguments = dict(x_real=x_real, x_imag=x_imag, log_decay=log_decay, phase=phase)
    arguments |= dict(segments=segments, initial_state=initial_state)
    dims = dict(x_real="b t d", x_imag="b t d", log_decay=gate, phase=gate, segments="b t")
    dims["initial_state"] = "b s d"
    *h, final = tpu.over_mesh(local, arguments, dims, outputs=("b t d", "b t d", "b s d"))
    return (h[0], h[1]), final


def uncovered(function: str, x, *_, **__) -> str:
    """Why a call cannot run here; "" if it can."""
    if x.dtype == jnp.float64 and setting.interpreter() is None:
        return "float64; the nearest dtype is float32"
    return ""


def _check(function: str, x) -> None:
    if reason := uncovered(function, x):
        raise ValueError(f"{function} as pallas_tpu does not cover {reason}; or use xla.")


def _on_device(kind, x, gates, segments, initial_state):
    """One device's rows and channels: (h, final state (B, S, D))."""
    batch, length, _ = x[0].shape
    form = Form(kind, length, chunk_length(length), segments is not None)
    marks = None
    if segments is not None:
        marks = jnp.pad(of_tokens(segments), ((0, 0), (0, -length % form.chunk)))
        marks = marks.reshape(batch, -1, 1, form.chunk)
    accumulator = sum_type(x[0])
    return _walk(form, Laid(marks, x, gates, initial_state.astype(accumulator)))


def chunk_length(length: int) -> int:
    """LONGEST, or a power of two of which a shorter row holds about two; at least ROWS."""
    return min(LONGEST, max(ROWS, 1 << ((length + 1) // 2 - 1).bit_length()))


def _specs(form: Form, laid: Laid, at: Callable = lambda n: n):
    """(grid, blocks of `laid`, the block of a state a block of time); `at` gives a step's block."""
    batch, parts, width = laid.state.shape
    lanes = min(width, LANES)
    tokens = pl.BlockSpec((None, form.chunk, lanes), lambda b, d, n: (b, at(n), d))
    marks = pl.BlockSpec((None, None, 1, form.chunk), lambda b, d, n: (b, at(n), 0, 0))
    table = pl.BlockSpec((TILE, lanes), lambda b, d, n: (0, d))
    return (
        (batch, pl.cdiv(width, lanes), pl.cdiv(form.length, form.chunk)),
        Laid(
            marks=marks if form.packed else None,
            x=tuple(tokens for _ in laid.x),
            gates=(table,) if form.kind == "constant" else tuple(tokens for _ in laid.gates),
            state=pl.BlockSpec((None, parts, lanes), lambda b, d, n: (b, 0, d)),
        ),
        pl.BlockSpec((None, None, parts, lanes), lambda b, d, n: (b, at(n), 0, d)),
    )


def _table(form: Form, laid: Laid) -> Laid:
    """Constant gates as rows: the factor, and its eighth power in two parts; see rotation.py."""
    if form.kind != "constant":
        return laid
    g, phase = (gate.astype(laid.state.dtype) for gate in laid.gates)
    one = one_part(g, phase)
    far = (one_part if g.dtype == jnp.float64 else two_parts)(TILE * g, TILE * phase)
    zero = jnp.zeros_like(g)
    fine = (zero if part is None else part for part in far[2:])
    rows = [one.real, one.imag, far.real, far.imag, *fine, zero, zero]
    return laid._replace(gates=(jnp.stack(rows),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _walk(form: Form, laid: Laid):
    """(h, final state)."""
    return _forward(form, laid)[:2]


def _forward(form, laid, save=False):
    """(h, final state, the states that enter the blocks of time if `save`)."""
    grid, at, entering = _specs(form, laid)
    given = _table(form, laid)
    batch, parts, width = laid.state.shape
    entered = jax.ShapeDtypeStruct((batch, grid[2], parts, width), laid.state.dtype)
    like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*laid.x, laid.state)]
    count = len(like) + save
    found = tpu.call(
        functools.partial(_forward_body, form, jax.tree.structure(given)),
        *jax.tree.leaves(given),
        grid=grid,
        ins=jax.tree.leaves(at),
        outs=[*at.x, at.state, entering][:count],
        out_types=[*like, entered][:count],
        scratch=_marks_scratch(form),
        semantics="ppa",
        name=f"linear_scan_{form.kind}_forward",
    )
    return tuple(found[:parts]), found[parts], found[parts + 1 :]


def _marks_scratch(form):
    return [pltpu.VMEM((form.chunk, 1), jnp.int32)] if form.packed else []


def _save(form, laid):
    h, final, entering = _forward(form, laid, save=True)
    return (h, final), (laid, *entering)


def _backward(form, saved, slopes):
    laid, entering = saved
    dh, dfinal = slopes
    last = pl.cdiv(form.length, form.chunk) - 1
    grid, at, at_entering = _specs(form, laid, at=lambda n: last - n)
    given = _table(form, laid)
    (batch, parts, width), lanes = laid.state.shape, at.state.block_shape[-1]
    constant = form.kind == "constant"
    dgates = [jax.ShapeDtypeStruct(gate.shape, gate.dtype) for gate in laid.gates]
    at_dgates = at.gates
    if constant:
        dgates = [jax.ShapeDtypeStruct((batch, TILE, width), laid.state.dtype)] * 2
        at_dgates = (pl.BlockSpec((None, TILE, lanes), lambda b, d, n: (b, 0, d)),) * 2
    like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in laid.x]
    found = tpu.call(
        functools.partial(_backward_body, form, jax.tree.structure(given)),
        *(*jax.tree.leaves(given._replace(state=entering)), *dh, dfinal),
        grid=grid,
        ins=[*jax.tree.leaves(at._replace(state=at_entering)), *at.x, at.state],
        outs=[*at.x, *at_dgates, at.state],
        out_types=[*like, *dgates, jax.ShapeDtypeStruct(laid.state.shape, laid.state.dtype)],
        scratch=[
            pltpu.VMEM((parts, form.chunk, lanes), laid.state.dtype),
            *_marks_scratch(form),
        ],
        semantics="ppa",
        name=f"linear_scan_{form.kind}_backward",
    )
    dgates = tuple(found[parts : parts + len(dgates)])
    if constant:
        sums = (d.sum((0, 1)) for d in dgates)
        dgates = tuple(d.astype(x.dtype) for d, x in zip(sums, laid.gates, strict=True))
    return (Laid(None, tuple(found[:parts]), dgates, found[-1]),)


_walk.defvjp(_save, _backward)


class Group(NamedTuple):
    """Tokens that are loaded together, inside a kernel: numbers as (tiles, 8, lanes)."""

    factor: Number  # what the state before a token is multiplied by
    x: Number
    padding: Any  # (tiles, 8, 1), or None where there is none
    plain: Any  # (tiles, 1, 1): all factors are the constant one; None if they always are


def _forward_body(form, structure, *refs):
    laid, refs = tpu.unflatten(structure, refs)
    parts = len(laid.x)
    h, state, (*rest,) = refs[:parts], refs[parts], refs[parts + 1 :]
    marks = turned(laid.marks, rest)
    block = pl.program_id(2)

    @pl.when(block == 0)
    def _():
        state[...] = laid.state[...]

    for entering in rest:
        entering[...] = state[...]

    def group(i, carry):
        tokens = _group(form, laid, marks, block, i)
        after, _, carry = _advance(form, laid, tokens, carry)
        _store(h, _rows(i), _where(tokens.padding, 0, after))
        return carry

    _keep(state, jax.lax.fori_loop(0, form.chunk // ROWS, group, _parts(state)))


def _backward_body(form, structure, *refs):
    """With l the slopes of h, w_t = conj(factor_t) l_t arrives at t - 1: l_t = dh_t + w_{t+1}."""
    laid, refs = tpu.unflatten(structure, refs)
    parts, gates = len(laid.x), 1 if form.kind == "real" else 2
    dh, dfinal, dx = refs[:parts], refs[parts], refs[parts + 1 : 2 * parts + 1]
    dgates, dstate, before, *rest = refs[2 * parts + 1 :][:gates], *refs[2 * parts + 1 + gates :]
    marks = turned(laid.marks, rest)
    groups = form.chunk // ROWS
    block = pl.num_programs(2) - 1 - pl.program_id(2)
    read = functools.partial(_group, form, laid, marks, block)
    previous = [before.at[n] for n in range(parts)]

    @pl.when(pl.program_id(2) == 0)
    def _():
        dstate[...] = dfinal[...]
        if form.kind == "constant":
            for ref in dgates:
                ref[...] = jnp.zeros_like(ref)

    def again(i, carry):
        after, edges, carry = _advance(form, laid, read(i), carry)
        _store(previous, _rows(i), _shift(after, edges, back=False))
        return carry

    jax.lax.fori_loop(0, groups, again, _parts(laid.state))

    def group(j, carry):
        i = groups - 1 - j
        rows, tokens = _rows(i), read(i)
        slopes, arriving, carry = _retreat(form, laid, tokens, _load(dh, rows, before), carry)
        turns = _turning(arriving, _load(previous, rows, before))
        _store(dx, rows, _where(tokens.padding, 0, slopes))
        turns = _where(tokens.padding, 0, turns)
        if form.kind == "constant":
            for ref, turn in zip(dgates, turns, strict=True):
                ref[...] += turn.sum(0)
        else:
            _store(dgates, rows, turns)
        return carry

    _keep(dstate, jax.lax.fori_loop(0, groups, group, _parts(dstate)))


def _rows(i):
    return pl.ds(pl.multiple_of(i * ROWS, ROWS), ROWS)


def _parts(ref) -> Number:
    return tuple(ref[n : n + 1] for n in range(ref.shape[0]))


def _keep(ref, number: Number) -> None:
    for n, part in enumerate(number):
        ref[n : n + 1] = part


def _load(refs, rows, like) -> Number:
    return tuple(_as_tiles(ref[rows].astype(like.dtype)) for ref in refs)


def _store(refs, rows, number: Number) -> None:
    for ref, part in zip(refs, number, strict=True):
        ref[rows] = part.reshape(ROWS, -1).astype(ref.dtype)


def _as_tiles(rows):
    return rows.reshape(ROWS // TILE, TILE, rows.shape[1])


def _group(form, laid, marks, block, i) -> Group:
    """The i-th group of tokens of a block of time."""
    rows, dtype = _rows(i), laid.state.dtype
    x = _load(laid.x, rows, laid.state)
    if form.kind == "constant":
        table = laid.gates[0]
        factor = tuple(jnp.broadcast_to(table[n : n + 1], x[0].shape) for n in range(2))
    else:
        factor = _factor(_load(laid.gates, rows, laid.state))
    mark = marks[rows] if form.packed else None
    if form.ragged:
        row = jax.lax.broadcasted_iota(jnp.int32, (ROWS, 1), 0)
        beyond = block * form.chunk + i * ROWS + row >= form.length
        mark = jnp.where(beyond, PADDING, 0 if mark is None else mark)
    if mark is None:
        return Group(factor, x, None, None)
    mark = _as_tiles(mark)
    padding = mark == PADDING
    held = (padding.astype(dtype), jnp.zeros((), dtype))[: len(factor)]
    factor = _where(mark == 0, factor, held)
    return Group(factor, _where(padding, 0, x), padding, mark.max(axis=1, keepdims=True) == 0)


def _factor(gates) -> Number:
    decay = jnp.exp(gates[0])
    if len(gates) == 1:
        return (decay,)
    cos, sin = cos_and_sin(gates[1])
    return decay * cos, decay * sin


def _advance(form, laid, tokens: Group, carry: Number):
    """(h, the states that enter the tiles, the state that leaves the last)."""
    before, local = _doubling(tokens.factor, tokens.x, back=False)
    return _join(form, laid, tokens, before, local, carry, back=False)


def _retreat(form, laid, tokens: Group, dh: Number, carry: Number):
    """(slopes of h, what of them arrives a token earlier, what leaves the first tile)."""
    dh, factor = _where(tokens.padding, 0, dh), _conjugate(tokens.factor)
    after, local = _doubling(factor, _times(factor, dh), back=True)
    arriving, edges, carry = _join(form, laid, tokens, after, local, carry, back=True)
    return _add(dh, _shift(arriving, edges, back=True)), arriving, carry


def _join(form, laid, tokens: Group, factors: Number, local: Number, carry: Number, back: bool):
    """(local + factors x what enters a tile, what enters the tiles, what leaves the last)."""
    count = local[0].shape[0]
    end = slice(0, 1) if back else slice(TILE - 1, TILE)
    tiles, edges = [()] * count, [()] * count
    for n in reversed(range(count)) if back else range(count):
        here, edges[n] = tuple(part[n] for part in local), carry
        tiles[n] = _add(here, _times(tuple(part[n] for part in factors), carry))
        carry = tuple(part[end] for part in tiles[n])
        if form.kind == "constant":
            exact = _eighth(laid, back, edges[n], tuple(part[end] for part in here))
            carry = exact if tokens.plain is None else _where(tokens.plain[n], exact, carry)
    stack = lambda found: tuple(jnp.stack(parts) for parts in zip(*found, strict=True))
    return stack(tiles), stack(edges), carry


def _eighth(laid, back: bool, carry: Number, add: Number) -> Number:
    """Eight tokens on with the constant factor, whose eighth power comes in two parts."""
    factor = Factor(*(laid.gates[0][n : n + 1] for n in range(2, 6)))
    return times(conjugate(factor) if back else factor, (carry[0], carry[1]), (add[0], add[1]))


def _doubling(a: Number, b: Number, back: bool) -> tuple[Number, Number]:
    """(products of a, sums of b with the products of a since), up to each row or down to it."""
    row = jax.lax.broadcasted_iota(jnp.int32, a[0].shape, 1)
    for step in (1, 2, 4):
        inside = row < TILE - step if back else row >= step
        earlier = functools.partial(_roll, shift=TILE - step if back else step)
        b = _add(b, _times(a, _where(inside, tuple(map(earlier, b)), 0)))
        a = _where(inside, _times(a, tuple(map(earlier, a))), a)
    return a, b


def _shift(x: Number, edges: Number, back: bool) -> Number:
    """The number of the row before, or after if `back`; of a tile's row at the edge, its edge."""
    row = jax.lax.broadcasted_iota(jnp.int32, x[0].shape, 1)
    moved = tuple(_roll(part, TILE - 1 if back else 1) for part in x)
    return _where(row == (TILE - 1 if back else 0), edges, moved)


def _roll(x, shift):
    return pltpu.roll(x, shift, 1)


def _turning(arriving: Number, before: Number) -> Number:
    """The slopes of log decay and phase: of conj(arriving) before, the real part and minus i's."""
    if len(arriving) == 1:
        return _times(arriving, before)
    real, imag = _times(_conjugate(arriving), before)
    return real, -imag


def _conjugate(a: Number) -> Number:
    return a if len(a) == 1 else (a[0], -a[1])


def _times(a: Number, b: Number) -> Number:
    if len(a) == 1:
        return (a[0] * b[0],)
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def _add(a: Number, b: Number) -> Number:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _where(mask, a, b) -> Number:
    """Part by part; a number or a plain 0 on either side, and no mask means b."""
    if mask is None:
        return b
    many = len(a if isinstance(a, tuple) else b)
    a, b = (x if isinstance(x, tuple) else (x,) * many for x in (a, b))
    return tuple(jnp.where(mask, x, y) for x, y in zip(a, b, strict=True))
