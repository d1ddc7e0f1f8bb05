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

from kernels import dispatch, tpu
from kernels import segments as packed
from kernels.linear_scan.rotation import (
    Factor,
    conjugate,
    cos_and_sin,
    one_part,
    times,
    two_parts,
)

Number = tuple[Any, ...]
# Rows of a register, rows that are loaded together (a register of bfloat16), lanes of a block.
TILE, ROWS, LANES, LONGEST = 8, 16, 512, 256
# Marks of tokens that do not simply go on.
START, PADDING = 1, 2


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
    return "float64" if x.dtype == jnp.float64 and dispatch.interpreter() is None else ""


def _on_device(kind, x, gates, segments, initial_state):
    """One device's rows and channels: (h, final state (B, S, D))."""
    batch, length, _ = x[0].shape
    form = Form(kind, length, chunk_length(length), segments is not None)
    marks = None
    if segments is not None:
        start, real = packed.starts(segments), packed.is_real(segments)
        marks = jnp.where(start, START, jnp.where(real, 0, PADDING)).astype(jnp.int32)
        marks = jnp.pad(marks, ((0, 0), (0, -length % form.chunk)))
        marks = marks.reshape(batch, -1, 1, form.chunk)
    accumulator = jnp.promote_types(x[0].dtype, jnp.float32)
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


class Tile(NamedTuple):
    """Eight tokens inside a kernel."""

    rows: slice  # within the group that was loaded with them
    factor: Number  # what the state before a token is multiplied by
    x: Number
    padding: Any  # (8, 1), or None where there is none
    plain: Any  # (1, 1): all factors are the constant one; None if they always are


def _forward_body(form, structure, *refs):
    laid, refs = _unflatten(structure, refs)
    parts = len(laid.x)
    h, state, (*entering,) = refs[:parts], refs[parts], refs[parts + 1 :]
    marks = _turn_marks(form, laid, entering)

    @pl.when(pl.program_id(2) == 0)
    def _():
        state[...] = laid.state[...]

    for ref in entering:
        ref[...] = state[...]
    read = functools.partial(_tiles, form, laid, marks, pl.program_id(2))

    def group(i, carry):
        found = []
        for tile in read(i):
            after, carry = _advance(form, laid, tile, carry)
            found.append(_where(tile.padding, 0, after))
        _store(h, _rows(i), found)
        return carry

    _keep(state, jax.lax.fori_loop(0, form.chunk // ROWS, group, _parts(state)))


def _backward_body(form, structure, *refs):
    """With l the slopes of h, w_t = conj(factor_t) l_t arrives at t - 1: l_t = dh_t + w_{t+1}."""
    laid, refs = _unflatten(structure, refs)
    parts, gates = len(laid.x), 1 if form.kind == "real" else 2
    dh, dfinal, dx = refs[:parts], refs[parts], refs[parts + 1 : 2 * parts + 1]
    dgates, dstate = refs[2 * parts + 1 :][:gates], refs[2 * parts + 1 + gates]
    before, *scratch = refs[2 * parts + 2 + gates :]
    marks = _turn_marks(form, laid, scratch)
    groups = form.chunk // ROWS
    block = pl.num_programs(2) - 1 - pl.program_id(2)
    read = functools.partial(_tiles, form, laid, marks, block)

    @pl.when(pl.program_id(2) == 0)
    def _():
        dstate[...] = dfinal[...]
        if form.kind == "constant":
            for ref in dgates:
                ref[...] = jnp.zeros_like(ref)

    def again(i, carry):
        found = []
        for tile in read(i):
            after, last = _advance(form, laid, tile, carry)
            found.append(_shift(after, carry, back=False))
            carry = last
        _store([before.at[n] for n in range(parts)], _rows(i), found)
        return carry

    jax.lax.fori_loop(0, groups, again, _parts(laid.state))

    def group(j, carry):
        i = groups - 1 - j
        rows = _rows(i)
        given = [ref[rows].astype(dstate.dtype) for ref in dh]
        entered = [before[n, rows] for n in range(parts)]
        slopes, turns = [], []
        for tile in reversed(read(i)):
            slope, arriving, carry = _retreat(form, laid, tile, _cut(given, tile), carry)
            turn = _turning(arriving, _cut(entered, tile))
            slopes.append(_where(tile.padding, 0, slope))
            turns.append(_where(tile.padding, 0, turn))
        _store(dx, rows, slopes[::-1])
        if form.kind == "constant":
            for n, ref in enumerate(dgates):
                ref[...] += sum(turn[n] for turn in turns)
        else:
            _store(dgates, rows, turns[::-1])
        return carry

    _keep(dstate, jax.lax.fori_loop(0, groups, group, _parts(dstate)))


def _unflatten(structure, refs):
    count = structure.num_leaves
    return jax.tree.unflatten(structure, refs[:count]), refs[count:]


def _turn_marks(form, laid, scratch):
    """Marks from lanes to rows, into the last of the scratch refs, which is taken off."""
    if not form.packed:
        return None
    marks = scratch.pop()
    marks[...] = laid.marks[...].T
    return marks


def _rows(i):
    return pl.ds(pl.multiple_of(i * ROWS, ROWS), ROWS)


def _parts(ref) -> Number:
    return tuple(ref[n : n + 1] for n in range(ref.shape[0]))


def _keep(ref, number: Number) -> None:
    for n, part in enumerate(number):
        ref[n : n + 1] = part


def _store(refs, rows, tiles: list[Number]) -> None:
    for n, ref in enumerate(refs):
        ref[rows] = jnp.concatenate([tile[n] for tile in tiles], axis=0).astype(ref.dtype)


def _cut(parts, tile: Tile) -> Number:
    return tuple(part[tile.rows] for part in parts)


def _tiles(form, laid, marks, block, i) -> list[Tile]:
    """The i-th group of tokens of a block of time."""
    rows, dtype = _rows(i), laid.state.dtype
    x = [ref[rows].astype(dtype) for ref in laid.x]
    if form.kind == "constant":
        factor = [jnp.broadcast_to(laid.gates[0][n : n + 1], x[0].shape) for n in range(2)]
    else:
        factor = _factor([ref[rows].astype(dtype) for ref in laid.gates])
    mark = _marks_of(form, marks, block, i)
    tiles = []
    for n in range(ROWS // TILE):
        here = slice(n * TILE, (n + 1) * TILE)
        ours, plain, padding = tuple(part[here] for part in factor), None, None
        if mark is not None:
            plain = jnp.max(mark[here], axis=0, keepdims=True) == 0
            padding = mark[here] == PADDING
            held = (padding.astype(dtype), *(0 for _ in ours[1:]))
            ours = tuple(
                jnp.where(mark[here] == 0, part, other)
                for part, other in zip(ours, held, strict=True)
            )
        tokens = _where(padding, 0, tuple(part[here] for part in x))
        tiles.append(Tile(here, ours, tokens, padding, plain))
    return tiles


def _marks_of(form, marks, block, i):
    """(ROWS, 1), or None where all tokens simply go on."""
    mark = marks[_rows(i)] if form.packed else None
    if form.ragged:
        row = jax.lax.broadcasted_iota(jnp.int32, (ROWS, 1), 0)
        beyond = block * form.chunk + i * ROWS + row >= form.length
        mark = jnp.where(beyond, PADDING, 0 if mark is None else mark)
    return mark


def _factor(gates) -> Number:
    decay = jnp.exp(gates[0])
    if len(gates) == 1:
        return (decay,)
    cos, sin = cos_and_sin(gates[1])
    return decay * cos, decay * sin


def _advance(form, laid, tile: Tile, carry: Number) -> tuple[Number, Number]:
    """(h of eight tokens, h of the last)."""
    all_before, local = _doubling(tile.factor, tile.x, back=False)
    h = _add(local, _times(all_before, carry))
    last = tuple(part[TILE - 1 :] for part in h)
    return h, _exact(form, laid, tile, False, last, tuple(p[TILE - 1 :] for p in local), carry)


def _retreat(form, laid, tile: Tile, dh: Number, carry: Number):
    """(slopes of eight tokens' h, what of them arrives a token earlier, the first of these)."""
    factor = _conjugate(tile.factor)
    dh = _where(tile.padding, 0, dh)
    all_after, local = _doubling(factor, _times(factor, dh), back=True)
    arriving = _add(local, _times(all_after, carry))
    first = tuple(part[:1] for part in arriving)
    slope = _add(dh, _shift(arriving, carry, back=True))
    first = _exact(form, laid, tile, True, first, tuple(p[:1] for p in local), carry)
    return slope, arriving, first


def _exact(form, laid, tile: Tile, back: bool, rounded: Number, local: Number, carry: Number):
    """The state eight tokens on; the eighth power of a constant factor has two parts."""
    if form.kind != "constant":
        return rounded
    eighth = Factor(*(laid.gates[0][n : n + 1] for n in range(2, 6)))
    exact = times(conjugate(eighth) if back else eighth, carry, local)
    if tile.plain is None:
        return exact
    return tuple(jnp.where(tile.plain, e, r) for e, r in zip(exact, rounded, strict=True))


def _doubling(a: Number, b: Number, back: bool) -> tuple[Number, Number]:
    """(products of a, sums of b with the products of a since), up to each row or down to it."""
    row = jax.lax.broadcasted_iota(jnp.int32, a[0].shape, 0)
    for step in (1, 2, 4):
        inside = row < TILE - step if back else row >= step
        earlier = functools.partial(_roll, shift=TILE - step if back else step)
        b = _add(b, _times(a, _where(inside, tuple(map(earlier, b)), 0)))
        a = _where(inside, _times(a, tuple(map(earlier, a))), a)
    return a, b


def _shift(x: Number, edge: Number, back: bool) -> Number:
    """The number of the row before, or after if `back`; of the row at the edge, `edge`."""
    row = jax.lax.broadcasted_iota(jnp.int32, x[0].shape, 0)
    at_edge = row == (TILE - 1 if back else 0)
    moved = tuple(_roll(part, TILE - 1 if back else 1) for part in x)
    return tuple(jnp.where(at_edge, e, m) for e, m in zip(edge, moved, strict=True))


def _roll(x, shift):
    return pltpu.roll(x, shift, 0)


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
