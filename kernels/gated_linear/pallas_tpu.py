"""Gated linear attention as TPU kernels: a walk over chunks with the state in VMEM.

The grid is (rows, parts of heads, parts that share their q and k, chunks), the chunks in order. The
block of the state is the same for all chunks, so it stays in VMEM from a row's first chunk to its
last and is written once, as the final state. A chunk reads q, k, v and its gates once and writes o;
for a backward pass it also writes the state that it entered with. The backward walk goes from the
last chunk to the first with the state's gradient in VMEM, reads those states, and computes
everything else again.

Arrays are (B, H, T, K): the compiler gives the projections before and after a call that layout for
nothing, while heads side by side, (B, T, H K), would be copied. In VMEM a program's heads are put
side by side. pallas_tpu_scalar.py and pallas_tpu_vector.py hold a chunk's mathematics.
"""

import functools
import types
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from kernels import chunks, setting, tpu
from kernels.gated_linear import pallas_tpu_scalar, pallas_tpu_vector
from kernels.gated_linear.pallas_tpu_chunk import (
    Form,
    beside,
    mask,
    own_write,
    own_write_backward,
    part,
)
from kernels.products import sum_type

LONGEST, SHORTEST = 128, 32  # of a chunk
LARGEST = 1 << 18  # key dim times value dim


class Room(NamedTuple):
    """What fits into 16 MiB of VMEM beside a chunk of 128; heads are padded to 128 lanes."""

    lanes: int  # sought: enough work to hide the fixed cost of a step
    block: int  # bytes of one row of a block; twice as many leave room for half the chunk
    state: int  # bytes of one head's state, if it were of q's type; so too


# Backward, vector gates keep every level of the halving.
SCALAR, VECTOR = Room(512, 1 << 12, 1 << 18), Room(256, 1 << 10, 1 << 17)


def gated_linear(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "..."],
    *,
    bonus: Float[Array, "H K"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The operation of `kernels.gated_linear` on TPUs, split over a mesh by rows and heads."""
    if reason := uncovered("gated_linear", q, k, v, log_decay):
        raise ValueError(f"gated_linear as pallas_tpu does not cover {reason}; or use xla.")
    accumulator = sum_type(v)
    (batch, _, heads, value), key = v.shape, q.shape[3]
    if log_decay.ndim == 1:
        log_decay = jnp.broadcast_to(log_decay.astype(accumulator), v.shape[:3])
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, key, value), accumulator)
    arguments = dict(q=q, k=k, v=v, log_decay=log_decay, bonus=bonus, segments=segments)
    dims = dict(
        q="b t g k",
        k="b t g k",
        v="b t h v",
        log_decay="b t h k" if log_decay.ndim == 4 else "b t h",
        bonus="h k",
        segments="b t",
        initial_state="b h k v",
    )
    local = functools.partial(_on_device, scale=float(key**-0.5 if scale is None else scale))
    arguments["initial_state"] = initial_state
    return tpu.over_mesh(local, arguments, dims, outputs=("b t h v", "b h k v"))


def uncovered(function: str, q, k, v, log_decay, **_) -> str:
    """Why a call cannot run here; "" if it can."""
    if v.dtype == jnp.float64 and setting.interpreter() is None:
        return "float64; the nearest dtype is float32"
    (heads, value), key = v.shape[2:], q.shape[3]
    room = VECTOR if log_decay.ndim == 4 else SCALAR
    count = heads_together(q.shape[2], heads, key, value, room)
    most = min(LARGEST, room.state * LONGEST // SHORTEST // q.dtype.itemsize)
    widest = room.block * LONGEST // SHORTEST // q.dtype.itemsize
    if key * value > most or longest_chunk(count, key, value, q.dtype, room) < SHORTEST:
        return (
            f"key dim {key} and value dim {value}: a head does not fit into VMEM; up to a product "
            f"of {most} does, each at most {widest}"
        )
    return ""


class Laid(NamedTuple):
    """One device's arrays as the kernels read them: P programs of R heads, X lanes together."""

    marks: Int[Array, "B N 3 C"]
    q: Float[Array, "B G T K"]
    k: Float[Array, "B G T K"]
    v: Float[Array, "B H T V"]
    gates: Float[Array, "B H T K"] | Float[Array, "B P N R C"]  # vectors; scalars
    bonus: Float[Array, "P 1 X"]
    state: Float[Array, "B P K X"] | Float[Array, "B P V X"]  # the latter for vector gates


def _on_device(*, q, k, v, log_decay, bonus, segments, initial_state, scale):
    """One device's rows and heads: lay the arrays out, run, and lay the results back."""
    (batch, length, groups, key), (heads, value) = q.shape, v.shape[2:]
    vector, accumulator = log_decay.ndim == 4, sum_type(v)
    room = VECTOR if vector else SCALAR
    count = heads_together(groups, heads, key, value, room)
    shared = max(count * groups // heads, 1)
    form = Form(shared, count, key, value, scale, lag=0 if bonus is None else 1)
    chunk = chunk_length(length, longest_chunk(count, key, value, q.dtype, room))
    *tokens, gates = (chunks.pad(x, chunk) for x in (q, k, v, log_decay))
    if vector:
        gates = gates.swapaxes(1, 2)
    else:
        gates = gates.astype(accumulator)
        gates = rearrange(gates, "b (n c) (p r) -> b p n r c", c=chunk, r=count)
    if bonus is None:
        bonus = jnp.zeros((heads, key))
    split, together = "b (p r) k v", "b p v (r k)" if vector else "b p k (r v)"
    laid = Laid(
        _marks(segments, batch, length, chunk),
        *(x.swapaxes(1, 2) for x in tokens),
        gates,
        rearrange(bonus.astype(accumulator), "(p r) k -> p 1 (r k)", r=count),
        rearrange(initial_state.astype(accumulator), f"{split} -> {together}", r=count),
    )
    out, final = _walk(form, laid)
    final = rearrange(final, f"{together} -> {split}", r=count)
    return out.swapaxes(1, 2)[:, :length], final


def heads_together(groups: int, heads: int, key: int, value: int, room: Room) -> int:
    """The most heads a program that keep to `room.lanes`."""
    return tpu.heads_together(groups, heads, max(key, value), room.lanes)


def longest_chunk(heads: int, key: int, value: int, dtype, room: Room) -> int:
    """128, or half as long for twice the bytes that leave room for 128; a power of two or 0."""
    block = heads * tpu.whole_lanes(max(key, value)) * dtype.itemsize
    state = key * value * dtype.itemsize
    fitting = min(1, room.block / block, room.state / state)
    return 1 << int(LONGEST * fitting).bit_length() >> 1


def chunk_length(length: int, longest: int) -> int:
    """`longest`, or a power of two of which a shorter row holds about two; at least 8."""
    return min(longest, max(8, 1 << ((length + 1) // 2 - 1).bit_length()))


def _marks(segments, batch: int, length: int, chunk: int) -> Int[Array, "B N 3 C"]:
    """Each token's document or -1 at padding, and its chunk's entering and leaving document."""
    padded = length + -length % chunk
    if segments is None:
        one = jnp.zeros((batch, padded), jnp.int32)
        within = chunks.Boundaries(one + jnp.arange(padded) < length, one, one)
    else:
        within = chunks.boundaries(chunks.pad(segments, chunk), chunk)
    leaving = jnp.repeat(within.document[:, chunk - 1 :: chunk], chunk, axis=1)
    document = jnp.where(within.real, within.document, -1)
    marks = jnp.stack([document, within.entering, leaving], axis=1)
    return jnp.swapaxes(marks.reshape(batch, 3, -1, chunk), 1, 2)


class Blocks(NamedTuple):
    """The grid, and the block of each array for one program at one step."""

    grid: tuple[int, ...]
    laid: Laid
    entering: pl.BlockSpec  # the state that enters a chunk
    dq: pl.BlockSpec  # one array for each of the parts that share q
    d_bonus: pl.BlockSpec  # one a row


def _blocks(form: Form, laid: Laid, at: Callable = lambda n: n) -> Blocks:
    """`at` gives the chunk of a step."""
    batch, count, _, chunk = laid.marks.shape
    shared = laid.q.shape[1] // form.groups
    programs = laid.state.shape[1]
    parts = programs // shared
    whole = (None, None, *laid.state.shape[2:])

    def block(shape, index):
        return pl.BlockSpec(shape, lambda b, s, r, n: index(b, s, r, s * parts + r, at(n)))

    def by_head(heads, width, index):
        return block((None, heads, chunk, width), lambda b, s, r, p, n: (b, index(s, p), n, 0))

    q = by_head(form.groups, form.key, lambda s, p: s)
    gates = by_head(form.heads, form.key, lambda s, p: p)
    if laid.gates.ndim == 5:
        gates = block((None, None, None, form.heads, chunk), lambda b, s, r, p, n: (b, p, n, 0, 0))
    bonus = (None, 1, form.heads * form.key)
    return Blocks(
        grid=(batch, shared, parts, count),
        laid=Laid(
            marks=block((None, None, 3, chunk), lambda b, s, r, p, n: (b, n, 0, 0)),
            q=q,
            k=q,
            v=by_head(form.heads, form.value, lambda s, p: p),
            gates=gates,
            bonus=block(bonus, lambda b, s, r, p, n: (p, 0, 0)),
            state=block(whole, lambda b, s, r, p, n: (b, p, 0, 0)),
        ),
        entering=block((None, *whole), lambda b, s, r, p, n: (b, n, p, 0, 0)),
        dq=block((None, *q.block_shape), lambda b, s, r, p, n: (b, r, s, n, 0)),
        d_bonus=block((None, *bonus), lambda b, s, r, p, n: (b, p, 0, 0)),
    )


def _type(x: jax.Array, *shape: int, dtype=None) -> jax.ShapeDtypeStruct:
    """x's type, with another shape or dtype."""
    return jax.ShapeDtypeStruct(shape or x.shape, dtype or x.dtype)


def _mathematics(laid: Laid) -> types.ModuleType:
    return pallas_tpu_scalar if laid.gates.ndim == 5 else pallas_tpu_vector


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _walk(form: Form, laid: Laid):
    """(o, final state)."""
    return _forward(form, laid)


def _forward(form, laid, save=False):
    """(o, final state), and if `save` the state that enters each chunk."""
    at, state = _blocks(form, laid), laid.state
    entering = _type(state, state.shape[0], at.grid[3], *state.shape[1:])
    outputs = slice(3 if save else 2)
    return tpu.call(
        functools.partial(_forward_body, form, _mathematics(laid)),
        *laid,
        grid=at.grid,
        ins=[*at.laid],
        outs=[at.laid.v, at.laid.state, at.entering][outputs],
        out_types=[_type(laid.v), _type(state), entering][outputs],
        semantics="pppa",
        name="gated_linear_forward",
    )


def _forward_body(form, mathematics, *refs):
    laid, (o, state, *entering) = Laid(*refs[:7]), refs[7:]

    @pl.when(pl.program_id(3) == 0)
    def _():
        state[...] = laid.state[...]

    for ref in entering:
        ref[...] = state[...]
    seen = mask(laid.marks[...], form.lag, state.dtype)
    *tokens, gates = (_read(ref) for ref in laid[1:5])
    out, state[...] = mathematics.forward(form, seen, *tokens, gates, state[...])
    if form.lag:
        out += own_write(form, seen, *tokens, laid.bonus[...])
    _write(o, out)


def _read(ref) -> jax.Array:
    """A chunk's matrix; of an array by head, the lanes of its heads side by side."""
    return beside([*ref[...]]) if len(ref.shape) == 3 else ref[...]


def _write(ref, x: jax.Array) -> None:
    """The inverse of `_read`."""
    if len(ref.shape) == 2:
        ref[...] = x.astype(ref.dtype)
    else:
        for h in range(ref.shape[0]):
            ref[h] = part(x, ref.shape[2], h).astype(ref.dtype)


def _save(form, laid):
    out, final, entering = _forward(form, laid, save=True)
    return (out, final), (laid, entering)


def _backward(form, saved, slopes):
    laid, entering = saved
    last = laid.marks.shape[1] - 1
    at = _blocks(form, laid, at=lambda n: last - n)
    batch, _, parts, _ = at.grid
    wide = entering.dtype if parts > 1 else laid.q.dtype
    dq = _type(laid.q, batch, parts, *laid.q.shape[1:], dtype=wide)
    d_bonus = _type(laid.bonus, batch, *laid.bonus.shape)
    dq, dk, dv, d_gates, d_bonus, d_state = tpu.call(
        functools.partial(_backward_body, form, _mathematics(laid)),
        *(*laid[:-1], entering, *slopes),
        grid=at.grid,
        ins=[*at.laid[:-1], at.entering, at.laid.v, at.laid.state],
        outs=[at.dq, at.dq, at.laid.v, at.laid.gates, at.d_bonus, at.laid.state],
        out_types=[dq, dq, _type(laid.v), _type(laid.gates), d_bonus, _type(laid.state)],
        semantics="pppa",
        name="gated_linear_backward",
    )
    dq, dk = (x.sum(axis=1).astype(laid.q.dtype) for x in (dq, dk))
    return (Laid(None, dq, dk, dv, d_gates, d_bonus.sum(axis=0), d_state),)


def _backward_body(form, mathematics, *refs):
    laid, (do, d_final), (*d_laid, d_bonus, d_state) = Laid(*refs[:7]), refs[7:9], refs[9:]

    @pl.when(pl.program_id(3) == 0)
    def _():
        d_state[...] = d_final[...]
        d_bonus[...] = jnp.zeros_like(d_bonus)

    seen = mask(laid.marks[...], form.lag, d_state.dtype)
    *tokens, gates, slope = (_read(ref) for ref in (*laid[1:5], do))
    *gradients, d_state[...] = mathematics.backward(
        form, seen, *tokens, gates, laid.state[...], slope, d_state[...]
    )
    if form.lag:
        *own, du = own_write_backward(form, seen, *tokens, laid.bonus[...], slope)
        gradients[:3] = [x + y for x, y in zip(gradients[:3], own, strict=True)]
        d_bonus[...] += du
    for ref, gradient in zip(d_laid, gradients, strict=True):
        _write(ref, gradient)


_walk.defvjp(_save, _backward)
