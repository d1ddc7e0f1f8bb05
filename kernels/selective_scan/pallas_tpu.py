"""The selective scan as TPU kernels: tokens one after another, the state (N, D) in registers.

The grid is (rows, blocks of channels, blocks of time), the last in order. Channels lie along the
lanes and the N numbers of a channel along the rows of a register, eight to a tile, so a token is a
few products of whole registers: its x and dt are a row, repeated downwards, its Bm and Cm a column,
repeated across. The columns of a block are spread once, into scratch memory, for all its channels,
which pass one part after another, a state of few registers at a time. Sums over N of eight tokens
are taken together. HBM holds no state but one a block, written for the backward pass alone. Decays
are powers of two: exp(dt A) = 2^(dt A log2 e).

The backward walk goes from the last block to the first. It runs a part again, keeps the state
before each of its tokens in scratch memory, and walks back with the state's slope in registers. The
slopes of Bm and Cm are sums over channels: they grow in scratch memory a lane at a time, the lanes
are added once a block, and XLA adds up the blocks of channels.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels import segments as packed
from kernels import setting, tpu
from kernels.pallas_tpu_marks import PADDING, START, of_tokens, turned
from kernels.products import sum_type

# Rows of a register (of bfloat16: ROWS) and its lanes.
TILE, ROWS, LANE = 8, 16, 128
# The longest block of time, and the most columns of it, times N; bytes of VMEM for a program.
LONGEST, COLUMNS, ROOM = 128, 4096, 12 << 20
MOST_STATE = 256
OCTAVES = math.log2(math.e)


class Form(NamedTuple):
    """What a program is; static."""

    length: int
    chunk: int
    packed: bool

    @property
    def ragged(self) -> bool:
        return self.length % self.chunk > 0


class Pass(NamedTuple):
    """How much a pass keeps in VMEM."""

    numbers: int  # of a state that are worked on together: what a few registers hold
    tokens: tuple[int, int]  # blocks like x, like dt
    states: int  # blocks like the state
    rows: int  # buffers of a part's tokens
    columns: int  # buffers of spread columns
    before: int  # buffers of the states before all tokens


FORWARD = Pass(8192, tokens=(2, 1), states=4, rows=3, columns=2, before=0)
BACKWARD = Pass(4096, tokens=(3, 2), states=6, rows=4, columns=4, before=1)


class Laid(NamedTuple):
    """One device's arrays as the kernels read them; P is LANE, of which C are tokens."""

    marks: Any  # (B, M, 1, C) for M blocks of time, or None
    x: Any  # (B, T, D)
    dt: Any  # (B, T, D)
    a: Any  # (N, D) in octaves: A log2 e; N a multiple of TILE
    b: Any  # (B, M, N, P)
    c: Any  # (B, M, N, P)
    skip: Any  # (1, D)
    state: Any  # (B, N, D)


def selective_scan(
    x: Float[Array, "B T D"],
    dt: Float[Array, "B T D"],
    A: Float[Array, "D N"],
    Bm: Float[Array, "B T N"],
    Cm: Float[Array, "B T N"],
    D: Float[Array, " D"] | None = None,
    *,
    segments: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B D N"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """The recurrence of `kernels.selective_scan` on TPUs, split over a mesh by row and channel."""
    if reason := uncovered("selective_scan", x, dt, A):
        raise ValueError(f"selective_scan as pallas_tpu does not cover {reason}; or use xla.")
    accumulator = sum_type(x)
    batch, _, width = x.shape
    if initial_state is None:
        initial_state = jnp.zeros((batch, width, A.shape[1]), accumulator)
    if D is None:
        D = jnp.zeros(width, accumulator)
    arguments = dict(x=x, dt=dt, A=A, Bm=Bm, Cm=Cm, D=D, segments=segments)
    arguments["initial_state"] = initial_state
    dims = dict(x="b t d", dt="b t d", A="d n", Bm="b t n", Cm="b t n", D="d", segments="b t")
    dims["initial_state"] = "b d n"
    return tpu.over_mesh(_on_device, arguments, dims, outputs=("b t d", "b d n"))


def uncovered(function: str, x, dt, A, *_, **__) -> str:
    """Why a call cannot run here; "" if it can."""
    if x.dtype == jnp.float64 and setting.interpreter() is None:
        return "float64; the nearest dtype is float32"
    if A.shape[1] > MOST_STATE:
        return f"a state of {A.shape[1]} numbers a channel; the most is {MOST_STATE}"
    return ""


def _on_device(*, x, dt, A, Bm, Cm, D, segments, initial_state):
    """One device's rows and channels: lay the arrays out, run, and lay the results back."""
    accumulator = sum_type(x)
    (_, length, width), state = x.shape, A.shape[1]
    form = Form(length, chunk_length(length, state), segments is not None)
    marks = None
    if segments is not None:
        real = packed.is_real(segments)
        marks = _blocks_of_time(form, of_tokens(segments)[..., None])
        Bm, Cm = (jnp.where(real[..., None], part, 0) for part in (Bm, Cm))
    wide = width if width <= LANE else width + -width % LANE
    deep = state + -state % TILE

    def columns(array):
        blocks = _blocks_of_time(form, array.astype(accumulator))
        return _widen(_widen(blocks, LANE, 3), deep, 2)

    def states(array):
        return _widen(_widen(jnp.swapaxes(array.astype(accumulator), -1, -2), deep, -2), wide, -1)

    laid = Laid(
        marks=marks,
        x=_widen(x, wide, 2),
        dt=_widen(dt, wide, 2),
        a=states(A) * OCTAVES,
        b=columns(Bm),
        c=columns(Cm),
        skip=_widen(D.astype(accumulator), wide, 0)[None],
        state=states(initial_state),
    )
    y, final = _walk(form, laid)
    return y[..., :width], jnp.swapaxes(final[:, :state, :width], 1, 2)


def chunk_length(length: int, state: int) -> int:
    """Up to LONGEST and COLUMNS, or a power of two of which a shorter row holds about two."""
    longest = min(LONGEST, 1 << (COLUMNS // state).bit_length() - 1)  # a power of two
    return max(ROWS, min(longest, 1 << ((length + 1) // 2 - 1).bit_length()))


def _lanes(width: int, most: int, unit: int = LANE) -> int:
    """All of a narrow array's lanes, or at most `most` in units that divide it evenly."""
    if width < unit:
        return width
    return max(n for n in range(unit, max(most, unit) + 1, unit) if width % n == 0)


def _sizes(form: Form, laid: Laid, kind: Pass) -> tuple[int, int]:
    """(channels that are worked on together, channels of a block): as many as VMEM has room for."""
    state, width = laid.a.shape
    size = laid.state.dtype.itemsize
    part = _lanes(width, kind.numbers // state)
    fixed = kind.columns * state * LANE + (kind.rows + kind.before * state) * part
    tokens = kind.tokens[0] * laid.x.dtype.itemsize + kind.tokens[1] * laid.dt.dtype.itemsize
    channel = 2 * (form.chunk * tokens + kind.states * state * size)
    return part, _lanes(width, (ROOM - form.chunk * fixed * size) // channel, part)


def _widen(array: Array, size: int, axis: int) -> Array:
    """Zeros at the end of an axis, up to `size`."""
    missing = [(0, 0)] * array.ndim
    missing[axis] = (0, size - array.shape[axis])
    return jnp.pad(array, missing) if missing[axis][1] else array


def _blocks_of_time(form: Form, array: Array) -> Array:
    """(B, T, K) to (B, M, K, C): tokens along the lanes, zeros after the last."""
    batch, length, size = array.shape
    array = jnp.pad(array, ((0, 0), (0, -length % form.chunk), (0, 0)))
    return jnp.swapaxes(array.reshape(batch, -1, form.chunk, size), 2, 3)


class Blocks(NamedTuple):
    """The grid, and the block of each array for one program at one step."""

    part: int  # channels that are worked on together
    grid: tuple[int, ...]
    laid: Laid
    entering: pl.BlockSpec  # the state that enters a block of time
    columns: pl.BlockSpec  # slopes of b or c by a block of channels
    da: pl.BlockSpec  # one a row
    dskip: pl.BlockSpec


def _blocks(form: Form, laid: Laid, kind: Pass, at: Callable = lambda m: m) -> Blocks:
    """`at` gives the block of time of a step."""
    batch, state, width = laid.state.shape
    part, lanes = _sizes(form, laid, kind)
    tokens = pl.BlockSpec((None, form.chunk, lanes), lambda b, d, m: (b, at(m), d))
    columns = pl.BlockSpec((None, None, state, LANE), lambda b, d, m: (b, at(m), 0, 0))
    marks = pl.BlockSpec((None, None, 1, form.chunk), lambda b, d, m: (b, at(m), 0, 0))
    carried = pl.BlockSpec((None, state, lanes), lambda b, d, m: (b, 0, d))
    return Blocks(
        part=part,
        grid=(batch, width // lanes, pl.cdiv(form.length, form.chunk)),
        laid=Laid(
            marks=marks if form.packed else None,
            x=tokens,
            dt=tokens,
            a=pl.BlockSpec((state, lanes), lambda b, d, m: (0, d)),
            b=columns,
            c=columns,
            skip=pl.BlockSpec((1, lanes), lambda b, d, m: (0, d)),
            state=carried,
        ),
        entering=pl.BlockSpec((None, None, state, lanes), lambda b, d, m: (b, at(m), 0, d)),
        columns=pl.BlockSpec((None, None, None, state, LANE), lambda b, d, m: (b, d, at(m), 0, 0)),
        da=carried,
        dskip=pl.BlockSpec((None, TILE, lanes), lambda b, d, m: (b, 0, d)),
    )


def _like(x: jax.Array, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape or x.shape, x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _walk(form: Form, laid: Laid):
    """(y, final state)."""
    return _forward(form, laid)


def _forward(form, laid, save=False):
    """(y, final state), and if `save` the states that enter the blocks of time."""
    at, state = _blocks(form, laid, FORWARD), laid.state
    entering = _like(state, state.shape[0], at.grid[2], *state.shape[1:])
    return tpu.call(
        functools.partial(_forward_body, form, at.part, jax.tree.structure(laid)),
        *jax.tree.leaves(laid),
        grid=at.grid,
        ins=jax.tree.leaves(at.laid),
        outs=[at.laid.x, at.laid.state, at.entering][: 2 + save],
        out_types=[_like(laid.x), _like(state), entering][: 2 + save],
        scratch=_scratch(form, laid, at.part, tokens=3, columns=2),
        semantics="ppa",
        name="selective_scan_forward",
    )


def _scratch(form: Form, laid: Laid, part: int, tokens: int, columns: int) -> list:
    """Buffers of a part's tokens, of columns spread over the lanes of a register, and of marks."""
    state, dtype = laid.state.shape[1], laid.state.dtype
    rows = pltpu.VMEM((form.chunk, part), dtype)
    spread = pltpu.VMEM((form.chunk, state, min(part, LANE)), dtype)
    marks = pltpu.VMEM((form.chunk, 1), jnp.int32)
    return [rows] * tokens + [spread] * columns + [marks] * form.packed


def _save(form, laid):
    y, final, entering = _forward(form, laid, save=True)
    return (y, final), (laid, entering)


def _backward(form, saved, slopes):
    laid, entering = saved
    last = pl.cdiv(form.length, form.chunk) - 1
    at = _blocks(form, laid, BACKWARD, at=lambda m: last - m)
    batch, state, width = laid.state.shape
    columns = _like(laid.b, batch, at.grid[1], *laid.b.shape[1:])
    dx, ddt, da, db, dc, dskip, dstate = tpu.call(
        functools.partial(_backward_body, form, at.part, jax.tree.structure(laid)),
        *(*jax.tree.leaves(laid._replace(state=entering)), *slopes),
        grid=at.grid,
        ins=[*jax.tree.leaves(at.laid._replace(state=at.entering)), at.laid.x, at.laid.state],
        outs=[at.laid.x, at.laid.dt, at.da, at.columns, at.columns, at.dskip, at.laid.state],
        out_types=[
            _like(laid.x),
            _like(laid.dt),
            _like(laid.state),
            columns,
            columns,
            _like(laid.state, batch, TILE, width),
            _like(laid.state),
        ],
        scratch=[
            pltpu.VMEM((form.chunk, state, at.part), laid.state.dtype),
            *_scratch(form, laid, at.part, tokens=4, columns=4),
        ],
        semantics="ppa",
        name="selective_scan_backward",
    )
    dskip = dskip.sum((0, 1))[None]
    return (Laid(None, dx, ddt, da.sum(0) / OCTAVES, db.sum(1), dc.sum(1), dskip, dstate),)


_walk.defvjp(_save, _backward)


class Part(NamedTuple):
    """What tokens of one part of the channels read, inside a kernel; one row or column a token."""

    a: list  # (8, part) for eight of N
    x: Any  # refs (C, part): the token, 0 at padding
    dt: Any  # the same
    written: Any  # dt x
    b: Any  # refs (C, N, LANE)
    c: Any
    marks: Any  # ref (C, 1), or None

    def column(self, ref, t: "Token") -> list:
        """A token's column as tiles, in every lane of the part."""
        wide = self.x.shape[1] // LANE or 1
        return [jnp.concatenate([tile] * wide, axis=1) for tile in _tiles(ref[t.at])]


class Token(NamedTuple):
    """One of eight tokens that are loaded together."""

    group: Any
    row: Any  # static on a device

    @property
    def at(self):
        return self.group * TILE + self.row

    def down(self, ref):
        """The token's row in every row of a tile."""
        if isinstance(self.row, int):
            row = ref[_rows(self.group)][self.row : self.row + 1]
        else:
            row = ref[pl.ds(self.at, 1)]
        return jnp.broadcast_to(row, (TILE, ref.shape[1]))


def _forward_body(form, width, structure, *refs):
    laid, (y, state, *rest) = tpu.unflatten(structure, refs)
    marks = turned(laid.marks, rest)
    *entering, x, dt, written, b, c = rest
    _spread(form, laid, b, c)
    block = pl.program_id(2)

    @pl.when(block == 0)
    def _():
        state[...] = laid.state[...]

    for ref in entering:
        ref[...] = state[...]

    def channels(p, _):
        lanes = _lanes_of(p, width)
        part = Part(_tiles(laid.a[:, lanes]), x, dt, written, b, c, marks)
        _stage(form, laid, part, block, lanes)

        def group(i, h):
            def token(t, h):
                h = _step(part, t, h)
                return h, _fold(h, part.column(c, t))

            h, partial = _each(token, i, h)
            rows = _rows(i)
            x[rows] = laid.skip[:, lanes] * x[rows] + _gather(partial)
            return h

        h = jax.lax.fori_loop(0, form.chunk // TILE, group, _tiles(state[:, lanes]))
        state[:, lanes] = jnp.concatenate(h)
        y[:, lanes] = x[...].astype(y.dtype)
        return _

    jax.lax.fori_loop(0, y.shape[1] // width, channels, 0)


def _backward_body(form, width, structure, *refs):
    laid, refs = tpu.unflatten(structure, refs)
    dy, dfinal, dx, ddt, da, db, dc, dskip, dstate, before, *rest = refs
    marks = turned(laid.marks, rest)
    x, dt, written, slopes, b, c, db_lanes, dc_lanes = rest
    _spread(form, laid, b, c)
    db_lanes[...], dc_lanes[...] = jnp.zeros_like(db_lanes), jnp.zeros_like(dc_lanes)
    groups = form.chunk // TILE
    block = pl.num_programs(2) - 1 - pl.program_id(2)

    @pl.when(pl.program_id(2) == 0)
    def _():
        dstate[...] = dfinal[...]
        da[...], dskip[...] = jnp.zeros_like(da), jnp.zeros_like(dskip)

    def channels(p, _):
        lanes = _lanes_of(p, width)
        part = Part(_tiles(laid.a[:, lanes]), x, dt, written, b, c, marks)
        padding = _stage(form, laid, part, block, lanes)
        slopes[...] = _without(padding, dy[:, lanes].astype(slopes.dtype))

        def again(i, h):
            def token(t, h):
                before[t.at] = jnp.concatenate(h)
                return _step(part, t, h), ()

            return _each(token, i, h)[0]

        h = jax.lax.fori_loop(0, groups, again, _tiles(laid.state[:, lanes]))

        def group(j, carry):
            i = groups - 1 - j

            def token(t, carry):
                entered = _tiles(before[t.at])
                carry, sums, columns = _step_back(part, t, t.down(slopes), entered, carry)
                db_lanes[t.at] += columns[0]
                dc_lanes[t.at] += columns[1]
                return carry, sums

            carry, sums = _each(token, i, carry, reverse=True)
            rows = _rows(i)
            x_TD, dt_TD, slopes_TD = x[rows], dt[rows], slopes[rows]
            written_TD, exponents_TD = (_gather(partial) for partial in zip(*sums, strict=True))
            x[rows] = laid.skip[:, lanes] * slopes_TD + written_TD * dt_TD
            dt[rows] = written_TD * x_TD + exponents_TD / OCTAVES
            dskip[:, lanes] += slopes_TD * x_TD
            return carry

        carry = (h, _tiles(dstate[:, lanes]), _tiles(da[:, lanes]))
        slope, total = jax.lax.fori_loop(0, groups, group, carry)[1:]
        dstate[:, lanes], da[:, lanes] = jnp.concatenate(slope), jnp.concatenate(total)
        dx[:, lanes] = x[...].astype(dx.dtype)
        ddt[:, lanes] = _without(padding, dt[...]).astype(ddt.dtype)
        return _

    jax.lax.fori_loop(0, dx.shape[1] // width, channels, 0)
    _add_lanes(form, db_lanes, db)
    _add_lanes(form, dc_lanes, dc)


def _each(work, group, carry, reverse: bool = False):
    """(carry, [out]) of `work(token, carry) -> (carry, out)` for the eight tokens of a group.

    Unrolled, so that one token's work hides another's latency; the interpreter, which compiles a
    loop several times faster, gets a loop.
    """
    if setting.interpreter() is not None:
        # Counted down here: the simulator of memories runs every scan forward.
        steps = jnp.arange(TILE, dtype=jnp.int32)
        swapped = lambda carry, row: work(Token(group, row), carry)
        carry, found = jax.lax.scan(swapped, carry, TILE - 1 - steps if reverse else steps)
        outs = [jax.tree.map(lambda out, n=n: out[n], found) for n in range(TILE)]
        return carry, outs[::-1] if reverse else outs
    outs = [None] * TILE
    for r in reversed(range(TILE)) if reverse else range(TILE):
        carry, outs[r] = work(Token(group, r), carry)
    return carry, outs


def _rows(i):
    return pl.ds(pl.multiple_of(i * TILE, TILE), TILE)


def _lanes_of(p, width: int):
    return pl.ds(pl.multiple_of(p * width, width), width)


def _tiles(array) -> list:
    """The rows of an array, eight at a time."""
    return [array[n : n + TILE] for n in range(0, array.shape[0], TILE)]


def _without(padding, rows):
    return rows if padding is None else jnp.where(padding, 0, rows)


def _stage(form, laid, part: Part, block, lanes):
    """Fill the buffers of a part's tokens; says where there is padding (C, 1), None if nowhere."""
    mark = part.marks[...] if form.packed else None
    if form.ragged:
        row = jax.lax.broadcasted_iota(jnp.int32, (form.chunk, 1), 0)
        beyond = block * form.chunk + row >= form.length
        mark = jnp.where(beyond, PADDING, 0 if mark is None else mark)
    padding = None if mark is None else mark == PADDING
    x, dt = (ref[:, lanes].astype(part.x.dtype) for ref in (laid.x, laid.dt))
    part.x[...], part.dt[...] = _without(padding, x), _without(padding, dt)
    part.written[...] = part.dt[...] * part.x[...]
    return padding


def _spread(form, laid, *spread) -> None:
    """Every column of b and of c repeated over the lanes of a register."""

    def group(i, _):
        def token(t, _):
            for source, ref in zip((laid.b, laid.c), spread, strict=True):
                at = jnp.full(source.shape, t.at, jnp.int32)
                column = jnp.take_along_axis(source[...], at, axis=1, mode="promise_in_bounds")
                ref[t.at] = column[:, : ref.shape[2]]
            return _, ()

        return _each(token, i, _)[0]

    jax.lax.fori_loop(0, form.chunk // TILE, group, 0)


def _add_lanes(form, lanes, total) -> None:
    """The reverse: the sums over the lanes, each token's as a column."""
    total[...] = jnp.zeros_like(total)
    lane = jax.lax.broadcasted_iota(jnp.int32, total.shape, 1)

    def group(i, _):
        def token(t, _):
            sums = jnp.sum(lanes[t.at], axis=1, keepdims=True)
            total[...] += jnp.where(lane == t.at, sums, 0)
            return _, ()

        return _each(token, i, _)[0]

    jax.lax.fori_loop(0, form.chunk // TILE, group, 0)


def _decay(part: Part, t: Token) -> list:
    """What passes from token to token, either way: exp(dt A), but nothing into a document."""
    dt_8D = t.down(part.dt)
    decay = [jnp.exp2(dt_8D * a_8D) for a_8D in part.a]
    if part.marks is None:
        return decay
    start = t.down(part.marks) == START
    return [jnp.where(start, 0, tile) for tile in decay]


def _step(part: Part, t: Token, h: list) -> list:
    """The state after token t."""
    written_8D = t.down(part.written)
    parts = zip(_decay(part, t), h, part.column(part.b, t), strict=True)
    return [decay * tile + written_8D * b for decay, tile, b in parts]


def _step_back(part: Part, t: Token, dy_8D, before: list, carry):
    """(carry of the token before, parts of sums over N for dt and x, over the lanes for b and c).

    The carry is (the state after the token, its slope, the sum so far for A).
    """
    h, slope, da = carry
    slope = [tile + dy_8D * c for tile, c in zip(slope, part.column(part.c, t), strict=True)]
    dc = _narrow([tile * dy_8D for tile in h])
    written_8D = t.down(part.written)
    db = _narrow([tile * written_8D for tile in slope])
    written = _fold(slope, part.column(part.b, t))
    slope = [tile * decay for tile, decay in zip(slope, _decay(part, t), strict=True)]
    exponent = [tile * entered for tile, entered in zip(slope, before, strict=True)]
    dt_8D = t.down(part.dt)
    da = [total + tile * dt_8D for total, tile in zip(da, exponent, strict=True)]
    return (before, slope, da), (written, _fold(exponent, part.a)), (db, dc)


def _fold(left: list, right: list):
    """Rows of one tile that add up to the sum over N of the products."""
    return functools.reduce(operator.add, [x * y for x, y in zip(left, right, strict=True)])


def _narrow(tiles: list):
    """Lanes that lie a register apart, added up; the tiles as one array."""
    array = jnp.concatenate(tiles)
    return functools.reduce(
        operator.add, [array[:, n : n + LANE] for n in range(0, array.shape[1], LANE)]
    )


def _gather(partial):
    """Row r is the sum of the rows of partial r, eight sums at once.

    Two tiles become one, which holds for each of them the sums of rows that lie half a tile apart;
    then the same with quarters and eighths.
    """
    found = list(partial)
    row = jax.lax.broadcasted_iota(jnp.int32, found[0].shape, 0)
    for step in (4, 2, 1):
        found = [
            jnp.where(
                (row & step) == 0, a + pltpu.roll(a, TILE - step, 0), b + pltpu.roll(b, step, 0)
            )
            for a, b in zip(found[:step], found[step:], strict=True)
        ]
    return found[0]
