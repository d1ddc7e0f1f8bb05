"""Attention as TPU kernels: flash attention over a list of the visible pairs of blocks.

The grid is (rows, groups of key heads, parts of their query heads, pairs): for each pair of a block
of queries and a block of keys that holds a visible score, scalar-prefetched lists name the two
blocks, so nothing that the causal mask or the window hides is read or computed. Scores lie with
keys down and queries across: all that belongs to a query (maximum, sum, log-sum-exp) is then a row
that is broadcast over sublanes, and sums over keys need no work across lanes.

The forward pass walks the keys of one block of queries after another and keeps its output,
transposed, and its running maximum and sum in VMEM. Out go the output and, for a backward pass, the
logarithm of each query's sum. The backward pass is one kernel: it walks the queries of one block of
keys after another, with dk and dv of that block in VMEM and, there too, dq of all queries that are
not done; each score is formed once and serves all three. Where dq would not fit, the queries are
split over several calls.

Arrays are (B, H, T, K): the compiler gives the projections before and after a call that layout for
nothing, while heads side by side, (B, T, H K), would be copied. What belongs to single tokens
travels as rows, (C,) to a block.
"""

import functools
import math
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels import chunks, setting, tpu
from kernels import segments as packed
from kernels.attention import scores
from kernels.attention.pallas_tpu_schedule import (
    CLOSES,
    CUT,
    FIRST,
    LAST,
    LEAST,
    OPENS,
    Rule,
    Walk,
    backward_walk,
    block_length,
    forward_walk,
)
from kernels.products import exact_product, sum_type

VMEM = 64 << 20  # what a kernel may ask for; a v4 has 16 MiB and no more


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    *,
    segments: Int[Array, "B T"] | None = None,
    causal: bool = True,
    window: int = 0,
    sinks: Float[Array, " H"] | None = None,
    softcap: float = 0.0,
    log_forget: Float[Array, "B T H"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B T H V"]:
    """The operation of `kernels.attention` on TPUs, split over a mesh by rows and heads."""
    if reason := uncovered("attention", q, k, v):
        raise ValueError(
            f"attention as pallas_tpu is given {reason}; it takes float32, bfloat16 (or use xla)."
        )
    arguments = dict(q=q, k=k, v=v, segments=segments, sinks=sinks, log_forget=log_forget)
    dims = dict(
        q="b t h k",
        k="b t g k",
        v="b t g v",
        segments="b t",
        sinks="h",
        log_forget="b t h",
    )
    scale = float(q.shape[3] ** -0.5 if scale is None else scale)
    rule = Rule(q.shape[1], causal, window, scale, softcap)
    local = functools.partial(_on_device, rule=rule)
    return tpu.over_mesh(local, arguments, dims, outputs=("b t h v",))


def uncovered(function: str, q, k, v, **_) -> str:
    """Why a call cannot run here; "" if it can."""
    if jnp.float64 in (q.dtype, k.dtype, v.dtype) and setting.interpreter() is None:
        return "float64"
    return ""


class Room(NamedTuple):
    """What a program may take of the VMEM of the generation at hand."""

    block: int  # tokens
    lanes: int  # of its heads, each padded to 128; at least one
    open_bytes: int  # for the gradients of queries that are not done


def room() -> Room:
    """A fraction of the 16 MiB of a v4, of the 64 MiB and more of the others."""
    return Room(256, 256, 4 << 20) if setting.target() == "v4" else Room(512, 512, 32 << 20)


class Form(NamedTuple):
    """A program's share: its heads and the tokens of a block; static."""

    groups: int
    heads: int
    key: int
    value: int
    block: int

    def group(self, h: Any) -> Any:
        """Whose key and value head h reads, among the program's groups."""
        return jax.lax.div(h * np.int32(self.groups), np.int32(self.heads))


class Laid(NamedTuple):
    """One device's arrays as the kernels read them: P programs of R heads."""

    q: Float[Array, "B H T K"]
    k: Float[Array, "B G T K"]
    v: Float[Array, "B G T V"]
    marks: Int[Array, "B N 3 C"] | None  # the first and last key that a query sees; a key's place
    sinks: Float[Array, "P R 1"] | None
    sums: Float[Array, "B P N 2R C"] | None  # of gates: all heads' high parts, then the low ones


def _on_device(*, q, k, v, segments=None, sinks=None, log_forget=None, rule: Rule):
    """One device's rows and heads: lay the arrays out, run, and lay the result back."""
    (length, heads, key), (groups, value) = q.shape[1:], v.shape[2:]
    common = jnp.result_type(q, k, v)
    wide = jnp.promote_types(common, jnp.float32)
    form = choose_form(
        groups, heads, key, value, min(block_length(length, rule.window), room().block)
    )
    sums = None
    if log_forget is not None:
        parts = scores.forget_sums(log_forget.astype(wide), segments)
        sums = jnp.concatenate([_per_token(form, x) for x in parts], axis=3)
    laid = Laid(
        *(chunks.pad(x.astype(common), form.block).swapaxes(1, 2) for x in (q, k, v)),
        None if segments is None else _marks(form.block, rule, segments),
        None if sinks is None else sinks.astype(wide).reshape(-1, form.heads, 1),
        sums,
    )
    return _flash(form, rule, laid).swapaxes(1, 2)[:, :length].astype(v.dtype)


def choose_form(groups: int, heads: int, key: int, value: int, block: int) -> Form:
    """The most heads a program that keep to `room`; a head that is wider has shorter blocks."""
    widest, lanes = max(key, value), room().lanes
    count = tpu.heads_together(groups, heads, widest, lanes)
    while block > LEAST and block * count * tpu.whole_lanes(widest) > 1024 * lanes:
        block //= 2
    return Form(max(count * groups // heads, 1), count, key, value, block)


def _per_token(form: Form, x_BTH: Array) -> Float[Array, "B P N R C"]:
    """One number a head and token, as rows of a program's heads for each block."""
    x_BTH = chunks.pad(x_BTH, form.block)
    batch, _, heads = x_BTH.shape
    split = x_BTH.reshape(batch, -1, form.block, heads // form.heads, form.heads)
    return split.transpose(0, 3, 1, 4, 2)


def _from_rows(x_BPNRC: Array) -> Float[Array, "B T H"]:
    """The inverse of `_per_token`."""
    batch, programs, count, heads, block = x_BPNRC.shape
    return x_BPNRC.transpose(0, 2, 4, 1, 3).reshape(batch, count * block, programs * heads)


def _marks(block: int, rule: Rule, segments) -> Int[Array, "B N 3 C"]:
    """Rows (first key seen, last key seen, own place or -1 at padding); padding sees nothing."""
    batch, length = segments.shape
    place = jnp.arange(length, dtype=jnp.int32)
    document, real = packed.ordinals(segments), packed.is_real(segments)
    new = jnp.diff(document, axis=1, prepend=-1) > 0
    first = jax.lax.cummax(jnp.where(new, place, 0), axis=1)
    last = jnp.broadcast_to(place, segments.shape)
    if not rule.causal:
        ends = jnp.pad(new[:, 1:], ((0, 0), (0, 1)), constant_values=True)
        last = jax.lax.cummin(jnp.where(ends, place, length), axis=1, reverse=True)
    if rule.window:
        first = jnp.maximum(first, place - rule.window + 1)
    rows = [jnp.where(real, x, fill) for x, fill in ((first, length), (last, -1), (place, -1))]
    missing = -length % block
    padded = [
        jnp.pad(x, ((0, 0), (0, missing)), constant_values=fill)
        for x, fill in zip(rows, (length, -1, -1), strict=True)
    ]
    return jnp.stack(padded, axis=1).reshape(batch, 3, -1, block).swapaxes(1, 2)


Part = tuple[Any, pl.BlockSpec] | None  # an array or its type, and its blocks; None is left out


def _launch(
    name: str,
    body: Callable,
    block: int,
    grid: tuple[int, int, int],
    walk: Walk,
    ins: dict[str, Part],
    outs: dict[str, Part],
    scratch: dict[str, tuple[tuple[int, ...], Any] | None],
) -> dict[str, Array]:
    """Run `body(refs, n, marks, i, j)` for every pair, the n-th; the outputs by name."""
    given = {name: part for name, part in ins.items() if part is not None}
    made = {name: part for name, part in outs.items() if part is not None}
    kept = {name: part for name, part in scratch.items() if part is not None}
    names = [*given, *made, *kept]

    def run(queries, keys, marks, *refs):
        n, refs = pl.program_id(3), refs[len(walk.lists) - 3 :]
        absent = dict.fromkeys([*ins, *outs, *scratch])
        named = types.SimpleNamespace(**absent | dict(zip(names, refs, strict=True)))
        body(named, n, marks[n], queries[n], keys[n])

    need = sum(math.prod(s) * np.dtype(d).itemsize for s, d in kept.values()) + 32 * block**2
    for x, spec in (*given.values(), *made.values()):
        need += 2 * math.prod(n or 1 for n in spec.block_shape) * x.dtype.itemsize
    found = tpu.call(
        run,
        *(x for x, _ in given.values()),
        grid=(*grid, len(walk.queries)),
        ins=[spec for _, spec in given.values()],
        outs=[spec for _, spec in made.values()],
        out_types=[x for x, _ in made.values()],
        semantics="pppa",
        scratch=[pltpu.VMEM(s, d) for s, d in kept.values()],
        lists=walk.lists,
        vmem=min(VMEM, 3 * need // 2) if need > 10 << 20 else 0,
        name=name,
    )
    return dict(zip(made, found, strict=True))


def _grid(form: Form, laid: Laid) -> tuple[int, int, int]:
    """(rows, blocks of groups, parts of such a block's heads)."""
    shared, programs = laid.k.shape[1] // form.groups, laid.q.shape[1] // form.heads
    return laid.q.shape[0], shared, programs // shared


class Place(NamedTuple):
    """Where a program is, for index maps."""

    row: Any
    group: Any  # block of groups
    part: Any  # of the group's heads
    head: Any  # block of heads, among all
    query: Any  # block of the pair
    key: Any
    opened: Any = None  # of the backward walk
    closed: Any = None


def _cutter(parts: int) -> Callable:
    """The function (shape of a block, Place -> its index) -> spec."""

    def cut(shape, index):
        def index_map(b, s, r, n, queries, keys, marks, *lists):
            lists = queries, keys, *lists
            return index(Place(b, s, r, s * parts + r, *(x[n] for x in lists)))

        return pl.BlockSpec(shape, index_map)

    return cut


def _given(form: Form, laid: Laid, walk: Walk, cut: Callable) -> dict[str, Part]:
    """The arrays that both passes read, and their blocks."""
    size, heads, groups = form.block, form.heads, form.groups

    def part(x, shape, index):
        return None if x is None else (x, cut(shape, index))

    queries, keys = (None, heads, size, form.key), (None, groups, size, form.key)
    marks, sums = (None, None, 3, size), (None, None, None, 2 * heads, size)
    live = None
    if laid.marks is not None:
        spec = cut((None, 1, len(walk.queries)), lambda at: (at.row, 0, 0))
        in_scalars = pl.BlockSpec(spec.block_shape, spec.index_map, memory_space=pltpu.SMEM)
        live = _live(laid.marks, walk), in_scalars
    return {
        "live": live,
        "q": part(laid.q, queries, lambda at: (at.row, at.head, at.query, 0)),
        "k": part(laid.k, keys, lambda at: (at.row, at.group, at.key, 0)),
        "v": part(laid.v, (*keys[:3], form.value), lambda at: (at.row, at.group, at.key, 0)),
        "q_marks": part(laid.marks, marks, lambda at: (at.row, at.query, 0, 0)),
        "k_marks": part(laid.marks, marks, lambda at: (at.row, at.key, 0, 0)),
        "sinks": part(laid.sinks, (None, heads, 1), lambda at: (at.head, 0, 0)),
        "q_sums": part(laid.sums, sums, lambda at: (at.row, at.head, at.query, 0, 0)),
        "k_sums": part(laid.sums, sums, lambda at: (at.row, at.head, at.key, 0, 0)),
    }


def _live(marks_BN3C, walk: Walk) -> Int[Array, "B 1 n"]:
    """1 where a pair of blocks may hold a visible score: documents may hide whole pairs."""
    first, last, place = (marks_BN3C[:, :, n] for n in range(3))
    lowest = jnp.where(place < 0, jnp.iinfo(jnp.int32).max, place).min(axis=2)
    i, j = walk.queries, walk.keys
    seen = (last.max(axis=2)[:, i] >= lowest[:, j]) & (
        first.min(axis=2)[:, i] <= place.max(axis=2)[:, j]
    )
    return seen.astype(jnp.int32)[:, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _flash(form: Form, rule: Rule, laid: Laid) -> Array:
    return _forward(form, rule, laid, save=False)["o"]


def _save(form, rule, laid):
    found = _forward(form, rule, laid, save=True)
    return found["o"], (laid, found["o"], found["stats"])


def _forward(form, rule, laid, save):
    """The output (B, H, T, V), and if `save` each query's log-sum-exp and whether it is unsure."""
    batch, shared, parts = grid = _grid(form, laid)
    cut, size, wide = _cutter(parts), form.block, sum_type(laid.q)
    length, programs, walk = laid.q.shape[2], shared * parts, forward_walk(rule, size)
    o = jax.ShapeDtypeStruct((*laid.q.shape[:3], form.value), laid.v.dtype)
    stats = jax.ShapeDtypeStruct((batch, programs, length // size, 2 * form.heads, size), wide)
    o_block = (None, form.heads, size, form.value)
    stats_block = (None, None, None, 2 * form.heads, size)
    return _launch(
        "attention_forward",
        functools.partial(_forward_body, form, rule),
        size,
        grid,
        walk,
        _given(form, laid, walk, cut),
        {
            "o": (o, cut(o_block, lambda at: (at.row, at.head, at.query, 0))),
            "stats": (stats, cut(stats_block, lambda at: (at.row, at.head, at.query, 0, 0)))
            if save
            else None,
        },
        {
            "top": ((form.heads, size), wide),
            "sum": ((form.heads, size), wide),
            "acc": ((form.heads, form.value, size), wide),
        },
    )


def _forward_body(form: Form, rule: Rule, refs, n, marks, i, j):
    """One pair of blocks into the running maximum, sum and (transposed) output of its queries."""
    unit, wide = _unit(rule, refs), refs.top.dtype

    @pl.when(marks & FIRST != 0)
    def _():
        start_H1 = jnp.full((form.heads, 1), jnp.finfo(wide).min, wide)
        if refs.sinks is not None:
            start_H1 = refs.sinks[...] / unit
        refs.top[...] = jnp.broadcast_to(start_H1, refs.top.shape)
        refs.sum[...] = jnp.full(refs.sum.shape, 0 if refs.sinks is None else 1, wide)
        refs.acc[...] = jnp.zeros(refs.acc.shape, wide)

    def step(masked):
        seen_SC = _seen(form, rule, refs, i, j) if masked else None

        def visit(h):
            row, g = pl.ds(h, 1), form.group(h)
            _, s_SC = _scores(form, rule, refs, h)
            if masked:
                s_SC = jnp.where(seen_SC, s_SC, -jnp.inf)
            before_1C = refs.top[row]
            top_1C = jnp.maximum(before_1C, s_SC.max(axis=0, keepdims=True))
            # Scaled after the subtraction: the top key's power is then 1 to the last bit.
            p_SC = jnp.exp(unit * (s_SC - top_1C))
            keep_1C = jnp.exp(unit * (before_1C - top_1C))
            refs.top[row] = top_1C
            refs.sum[row] = keep_1C * refs.sum[row] + p_SC.sum(axis=0, keepdims=True)
            read_VC = exact_product("sv,sc->vc", refs.v[g], p_SC, refs.v.dtype)
            refs.acc[h] = keep_1C * refs.acc[h] + read_VC

        jax.lax.fori_loop(0, form.heads, lambda h, _: visit(h.astype(jnp.int32)), None)

    _take(refs, n, marks, step)

    @pl.when(marks & LAST != 0)
    def _():
        sum_HC = jnp.where(refs.sum[...] > 0, refs.sum[...], 1)
        for h in range(form.heads):
            o_VC = refs.acc[h] / sum_HC[h : h + 1]
            refs.o[h] = o_VC.T.astype(refs.o.dtype)
        if refs.stats is not None:
            mixed_HC = sum_HC != 1
            if refs.sinks is not None:
                mixed_HC |= refs.top[...] <= refs.sinks[...] / unit
            refs.stats[: form.heads] = unit * refs.top[...] + jnp.log(sum_HC)
            refs.stats[form.heads :] = mixed_HC.astype(wide)


def _backward(form, rule, saved, d_out):
    laid, out, stats = saved
    heads, itemsize = form.heads, stats.dtype.itemsize
    count = laid.q.shape[2] // form.block
    most = max(1, room().open_bytes // (form.block * heads * form.key * itemsize))
    all_at_once = backward_walk(rule, form.block, 0, count).ring <= most
    each = count if all_at_once else math.ceil(count / math.ceil(count / most))
    given = out, d_out.astype(laid.q.dtype), stats
    calls = [
        _backward_call(form, rule, laid, given, first, min(each, count - first))
        for first in range(0, count, each)
    ]
    dq = jnp.concatenate([call["dq"] for call in calls], axis=2)
    dk, dv = (
        sum(call[name] for call in calls).sum(axis=1).astype(dq.dtype) for name in ("dk", "dv")
    )
    d_sinks, d_sums = None, None
    if laid.sinks is not None:
        delta = jnp.concatenate([call["delta"] for call in calls], axis=2)
        lse_BTH, delta_BTH = _from_rows(stats[..., :heads, :]), _from_rows(delta)
        d_sinks = scores.sink_slopes(laid.sinks.reshape(-1), lse_BTH, delta_BTH)
        d_sinks = d_sinks.reshape(laid.sinks.shape)
    if laid.sums is not None:
        d_high = jnp.concatenate([call["dq_sums"] for call in calls], axis=2)
        d_high += sum(call["dk_sums"] for call in calls)
        d_sums = jnp.concatenate([d_high, jnp.zeros_like(d_high)], axis=3)
    return (Laid(dq, dk, dv, None, d_sinks, d_sums),)


def _backward_call(form, rule, laid, given, first, count):
    """The gradients by name that `count` blocks of queries from `first` on give rise to."""
    walk = backward_walk(rule, form.block, first, count)
    start, stop = int(walk.keys.min()), int(walk.keys.max()) + 1
    batch, shared, parts = grid = _grid(form, laid)
    out, d_out, stats = given
    cut, size, wide = _cutter(parts), form.block, stats.dtype
    groups, heads, key, value = form[:4]
    whole = count * size == laid.q.shape[2] and parts == 1

    def rows(blocks, index):
        shape = (batch, shared * parts, blocks, heads, size)
        at = cut((None, None, None, heads, size), lambda at: (at.row, at.head, index(at), 0, 0))
        return jax.ShapeDtypeStruct(shape, wide), at

    def of_keys(width):
        shape = (batch, parts, shared * groups, (stop - start) * size, width)
        at = cut(
            (None, None, groups, size, width),
            lambda at: (at.row, at.part, at.group, at.key - start, 0),
        )
        return jax.ShapeDtypeStruct(shape, laid.k.dtype if whole else wide), at

    values, stats_block = (None, heads, size, value), (None, None, None, 2 * heads, size)
    dq = jax.ShapeDtypeStruct((*laid.q.shape[:2], count * size, key), laid.q.dtype)
    dq_block = cut((None, heads, size, key), lambda at: (at.row, at.head, at.closed - first, 0))
    forgets = laid.sums is not None
    found = _launch(
        "attention_backward",
        functools.partial(_backward_body, form, rule, first),
        size,
        grid,
        walk,
        _given(form, laid, walk, cut)
        | {
            "o": (out, cut(values, lambda at: (at.row, at.head, at.opened, 0))),
            "do": (d_out, cut(values, lambda at: (at.row, at.head, at.query, 0))),
            "stats": (stats, cut(stats_block, lambda at: (at.row, at.head, at.query, 0, 0))),
        },
        {
            "dq": (dq, dq_block),
            "dk": of_keys(key),
            "dv": of_keys(value),
            "dq_sums": rows(count, lambda at: at.closed - first) if forgets else None,
            "dk_sums": rows(stop - start, lambda at: at.key - start) if forgets else None,
            "delta": rows(count, lambda at: at.opened - first) if laid.sinks is not None else None,
        },
        {
            "open_dq": ((walk.ring, heads, key, size), wide),
            "open_delta": ((walk.ring, heads, size), wide),
            "sum_dk": ((groups, size, key), wide),
            "sum_dv": ((groups, size, value), wide),
            "open_dq_sums": ((walk.ring, heads, size), wide) if forgets else None,
            "sum_dk_sums": ((heads, size), wide) if forgets else None,
        },
    )
    return _of_all_keys(found, size, start, laid.q.shape[2] // size - stop)


def _of_all_keys(found: dict[str, Array], size: int, before: int, after: int) -> dict[str, Array]:
    """The gradients with zeros for the blocks of keys before and after those that were walked."""
    for name, axis, unit in (("dk", 3, size), ("dv", 3, size), ("dk_sums", 2, 1)):
        if name in found:
            widths = [(0, 0)] * found[name].ndim
            widths[axis] = (before * unit, after * unit)
            found[name] = jnp.pad(found[name], widths)
    return found


def _backward_body(form: Form, rule: Rule, first: int, refs, n, marks, i, j):
    """One pair of blocks into the gradients of its keys and of its queries."""
    unit = _unit(rule, refs)
    slot = jax.lax.rem(i - first, np.int32(refs.open_dq.shape[0]))

    @pl.when(marks & FIRST != 0)
    def _():
        for ref in (refs.sum_dk, refs.sum_dv, refs.sum_dk_sums):
            if ref is not None:
                ref[...] = jnp.zeros(ref.shape, ref.dtype)

    @pl.when(marks & OPENS != 0)
    def _():
        _open(form, refs, slot)

    def step(masked):
        seen_SC = _seen(form, rule, refs, i, j) if masked else None

        def visit(h):
            row, g, dtype = pl.ds(h, 1), form.group(h), refs.q.dtype
            a_SC, s_SC = _scores(form, rule, refs, h)
            s_SC = unit * s_SC - refs.stats[row]
            if masked:
                s_SC = jnp.where(seen_SC, s_SC, -jnp.inf)
            p_SC = jnp.exp(s_SC)
            dp_SC = exact_product("sv,cv->sc", refs.v[g], refs.do[h], dtype)
            mixed_1C = refs.stats[pl.ds(form.heads + h, 1)]
            ds_SC = p_SC * (dp_SC - refs.open_delta[slot, row]) * mixed_1C
            if refs.dq_sums is not None:
                refs.open_dq_sums[slot, row] += ds_SC.sum(axis=0, keepdims=True)
                refs.sum_dk_sums[row] -= _turned(ds_SC.sum(axis=1, keepdims=True))
            if rule.softcap:
                ds_SC *= scores.slope(rule.scale * a_SC, rule.softcap)
            refs.open_dq[slot, h] += exact_product("sk,sc->kc", refs.k[g], ds_SC, dtype)
            refs.sum_dk[g] += exact_product("sc,ck->sk", ds_SC, refs.q[h], dtype)
            refs.sum_dv[g] += exact_product("sc,cv->sv", p_SC, refs.do[h], dtype)

        jax.lax.fori_loop(0, form.heads, lambda h, _: visit(h.astype(jnp.int32)), None)

    _take(refs, n, marks, step)

    @pl.when(marks & LAST != 0)
    def _():
        refs.dk[...] = (rule.scale * refs.sum_dk[...]).astype(refs.dk.dtype)
        refs.dv[...] = refs.sum_dv[...].astype(refs.dv.dtype)
        if refs.dk_sums is not None:
            refs.dk_sums[...] = refs.sum_dk_sums[...]

    @pl.when(marks & CLOSES != 0)
    def _():
        for h in range(form.heads):
            refs.dq[h] = (rule.scale * refs.open_dq[slot, h].T).astype(refs.dq.dtype)
        if refs.dq_sums is not None:
            refs.dq_sums[...] = refs.open_dq_sums[slot]


def _open(form: Form, refs, slot) -> None:
    """Begin with a block of queries: no gradients yet, and the sums over V of o do."""
    for ref in (refs.open_dq, refs.open_dq_sums):
        if ref is not None:
            ref[slot] = jnp.zeros(ref.shape[1:], ref.dtype)
    for h in range(form.heads):
        product_CV = refs.o[h].astype(refs.open_delta.dtype) * refs.do[h]
        refs.open_delta[slot, h : h + 1] = product_CV.T.sum(axis=0, keepdims=True)
    if refs.delta is not None:
        refs.delta[...] = refs.open_delta[slot]


_flash.defvjp(_save, _backward)


def _take(refs, n, marks, step: Callable[[bool], None]) -> None:
    """`step(masked)`; where rows are packed, documents may end anywhere, or hide the whole pair."""
    if refs.live is None:
        jax.lax.cond(marks & CUT != 0, lambda: step(True), lambda: step(False))
    else:
        pl.when(refs.live[0, n] != 0)(lambda: step(True))


def _seen(form: Form, rule: Rule, refs, i, j) -> jax.Array:
    """Who sees whom in the pair of block i of queries and block j of keys, (S, C)."""
    if refs.q_marks is not None:
        place_S1 = refs.k_marks[...].T[:, 2:3]
        return (refs.q_marks[0:1] <= place_S1) & (place_S1 <= refs.q_marks[1:2])
    shape = form.block, form.block
    key_SC = j * form.block + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    query_SC = i * form.block + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    seen_SC = key_SC <= query_SC if rule.causal else key_SC < rule.length
    if rule.window:
        seen_SC &= query_SC - key_SC < rule.window
    return seen_SC


def _unit(rule: Rule, refs) -> float:
    """What the scores of `_scores` still have to be multiplied by."""
    return rule.scale if not rule.softcap and refs.q_sums is None else 1.0


def _scores(form: Form, rule: Rule, refs, h) -> tuple[jax.Array, jax.Array]:
    """A head's products (S, C), and its scores, in units of `_unit`."""
    a_SC = exact_product("sk,ck->sc", refs.k[form.group(h)], refs.q[h], refs.q.dtype)
    if not rule.softcap and refs.q_sums is None:
        return a_SC, a_SC
    s_SC = rule.scale * a_SC
    if rule.softcap:
        s_SC = scores.capped(s_SC, rule.softcap)
    if refs.q_sums is not None:
        high_SC, low_SC = (
            refs.q_sums[pl.ds(row, 1)] - _turned(refs.k_sums[pl.ds(row, 1)])
            for row in (h, form.heads + h)
        )
        s_SC += high_SC + low_SC
    return a_SC, s_SC


def _turned(x: jax.Array) -> jax.Array:
    """A row as a column, or a column as a row; a TPU turns whole tiles."""
    if x.shape[0] == 1:
        return jnp.broadcast_to(x, (8, x.shape[1])).T[:, :1]
    return jnp.broadcast_to(x, (x.shape[0], 8)).T[:1]
