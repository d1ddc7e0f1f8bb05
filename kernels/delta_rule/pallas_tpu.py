"""The delta rule and `dplr` as TPU kernels: one walk over the chunks each way.

A program owns a row of the batch and a few heads, and takes the chunks in order. The heads' states
stay in VMEM scratch from chunk to chunk; q, k, v and the gates are read once and o is written once.
For a backward pass the forward walk also writes the state that enters each chunk, K V / C numbers a
token, and nothing else: the backward walk goes from the last chunk to the first with the state's
gradient in scratch, and computes scores and inverse again. What happens in a chunk is in
`pallas_tpu_chunk` and `pallas_tpu_low_rank`.

Arrays are (B, H, T, X): the compiler gives the projections before and after a call that layout for
nothing, while heads side by side, (B, T, H X), would be copied. One number a head and token, as
beta, comes as rows of a chunk.

Products of float32 inputs are float32; bfloat16 inputs enter products as they are, and a float32
operand beside them as two bfloat16 parts. States, gates and their sums are float32 always.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels import chunks, setting, tpu
from kernels.delta_rule import pallas_tpu_chunk, pallas_tpu_low_rank
from kernels.products import sum_type

LONGEST, SHORTEST = 64, 16  # of a chunk; two tiles of float32 are the least that a chunk takes
# Lanes of a program's heads: enough work to hide the fixed cost of a step, few enough for VMEM,
# where the backward pass of vector gates keeps every level of the halving.
SCALAR_LANES, VECTOR_LANES = 512, 256
WIDEST = 256  # key or value; wider ones were never compiled


class Plan(NamedTuple):
    """A launch: all that is static."""

    name: str
    forward: Callable  # of one chunk, as `pallas_tpu_chunk.forward`
    backward: Callable
    kinds: tuple[str, ...]  # of the inputs: key, value, vector or row
    chunk: int
    count: int  # chunks
    groups: int  # of a program
    heads: int  # of a group
    scale: float
    narrow: bool  # products as `pallas_tpu_chunk.product` says


def uncovered(function: str, q, k, v, *gates, **_) -> str:
    """Why a call cannot run here; "" if it can. The last of `gates` is log_decay."""
    if jnp.float64 in (q.dtype, v.dtype) and setting.interpreter() is None:
        return "float64 inputs, only float32 and bfloat16"
    heads, widest = v.shape[2] // q.shape[2], max(q.shape[3], v.shape[3])
    if widest > WIDEST:
        return f"keys or values of {widest}, at most {WIDEST}"
    vector = gates[-1] is not None and gates[-1].ndim == 4
    most = (VECTOR_LANES if vector else SCALAR_LANES) // tpu.whole_lanes(widest)
    return f"{heads} heads a key of {widest}, at most {most}" if heads > most else ""


def delta_rule(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "..."] | None = None,
    *,
    segments: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The operation of `kernels.delta_rule` on TPUs, split over a mesh by rows and heads."""
    _check("delta_rule", q, k, v, beta, log_decay)
    vector = log_decay is not None and log_decay.ndim == 4
    arrays = dict(q=q, k=k, v=v, beta=beta, log_decay=log_decay)
    dims = dict(
        q="b t g k",
        k="b t g k",
        v="b t h v",
        beta="b t h",
        log_decay="b t h k" if vector else "b t h",
    )
    return _over_mesh(_delta_rule, arrays, dims, segments, initial_state, scale)


def dplr(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    a: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    log_decay: Float[Array, "B T H K"],
    *,
    segments: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The operation of `kernels.delta_rule.dplr` on TPUs, split over a mesh by rows and heads."""
    _check("dplr", q, k, v, a, b, log_decay)
    arrays = dict(q=q, k=k, v=v, a=a, b=b, log_decay=log_decay)
    dims = {name: "b t h k" for name in arrays} | {"v": "b t h v"}
    return _over_mesh(_dplr, arrays, dims, segments, initial_state, scale)


def _check(function: str, *arrays) -> None:
    if reason := uncovered(function, *arrays):
        raise ValueError(f"pallas_tpu of {function} does not take {reason}; use impl='xla'.")


def _over_mesh(local, arrays, dims, segments, initial_state, scale):
    q, v = arrays["q"], arrays["v"]
    if initial_state is None:
        shape = (v.shape[0], v.shape[2], q.shape[3], v.shape[3])
        initial_state = jnp.zeros(shape, sum_type(v))
    scale = float(q.shape[3] ** -0.5 if scale is None else scale)
    return tpu.over_mesh(
        functools.partial(local, scale=scale),
        arrays | dict(segments=segments, initial_state=initial_state),
        dims | dict(segments="b t", initial_state="b h k v"),
        outputs=("b t h v", "b h k v"),
    )


def _delta_rule(q, k, v, beta, initial_state, *, log_decay=None, segments=None, scale):
    """One device's rows and heads."""
    groups, heads = q.shape[2], v.shape[2] // q.shape[2]
    kinds, gates = ("key", "key", "value", "row"), ()
    if log_decay is not None:
        kinds, gates = (*kinds, "vector" if log_decay.ndim == 4 else "row"), (log_decay,)
    wanted = VECTOR_LANES if "vector" in kinds else SCALAR_LANES
    plan = Plan(
        name="delta_rule",
        forward=pallas_tpu_chunk.forward,
        backward=pallas_tpu_chunk.backward,
        kinds=kinds,
        chunk=_chunk_length(q.shape[1]),
        count=-(-q.shape[1] // _chunk_length(q.shape[1])),
        groups=_groups_taken(groups, heads * tpu.whole_lanes(max(q.shape[3], v.shape[3])), wanted),
        heads=heads,
        scale=scale,
        narrow=all(x.dtype == jnp.bfloat16 for x in (q, k, v)),
    )
    return _laid_out(plan, (q, k, v, beta, *gates), segments, initial_state)


def _dplr(q, k, v, a, b, log_decay, initial_state, *, segments=None, scale):
    """One device's rows and heads."""
    plan = Plan(
        name="dplr",
        forward=pallas_tpu_low_rank.forward,
        backward=pallas_tpu_low_rank.backward,
        kinds=("key", "key", "value", "key", "key", "key"),
        chunk=_chunk_length(q.shape[1]),
        count=-(-q.shape[1] // _chunk_length(q.shape[1])),
        groups=_groups_taken(
            q.shape[2], tpu.whole_lanes(max(q.shape[3], v.shape[3])), VECTOR_LANES
        ),
        heads=1,
        scale=scale,
        narrow=all(x.dtype == jnp.bfloat16 for x in (q, k, v, a, b)),
    )
    return _laid_out(plan, (q, k, v, a, b, log_decay), segments, initial_state)


def _chunk_length(length: int) -> int:
    """At least two chunks from 17 tokens on."""
    return max(SHORTEST, min(LONGEST, chunks.length_for(length, 2 * LONGEST) // 2))


def _groups_taken(groups: int, lanes: int, wanted: int) -> int:
    """Groups of a program: the most that the wanted lanes hold, at least one."""
    return max((n for n in range(1, wanted // lanes + 1) if groups % n == 0), default=1)


def _laid_out(plan: Plan, inputs: tuple, segments, initial_state):
    """Arrays as the kernels read them, and the results as the caller does."""
    wide, length = sum_type(inputs[2]), inputs[0].shape[1]
    by_kind = [
        _as_rows(plan, x.astype(wide)) if kind == "row" else _by_head(plan, x)
        for x, kind in zip(inputs, plan.kinds, strict=True)
    ]
    out, state = _run(plan, tuple(by_kind), _codes(plan, segments), initial_state.astype(wide))
    return jnp.swapaxes(out, 1, 2)[:, :length], state


def _by_head(plan: Plan, x_BTHX):
    """(B, H, T, X), with whole chunks."""
    return jnp.swapaxes(chunks.pad(x_BTHX, plan.chunk), 1, 2)


def _as_rows(plan: Plan, x_BTH):
    """(B, H, N, 1, C)."""
    x_BHT = jnp.swapaxes(chunks.pad(x_BTH, plan.chunk), 1, 2)
    return x_BHT.reshape(*x_BHT.shape[:2], plan.count, 1, plan.chunk)


def _codes(plan: Plan, segments):
    """Documents as `pallas_tpu_chunk.make_marks` takes them, (B, N, 4, 1, C), or None."""
    within = chunks.boundaries(chunks.pad(segments, plan.chunk), plan.chunk)
    if within is None:
        return None
    leaving = within.document[:, plan.chunk - 1 :: plan.chunk]
    rows = [
        jnp.where(within.real, within.document, -2),
        jnp.where(within.real, within.document, -1),
        within.entering,
        jnp.repeat(leaving, plan.chunk, axis=1),
    ]
    codes = jnp.stack(rows, axis=1).astype(jnp.float32)
    return jnp.swapaxes(codes.reshape(-1, 4, plan.count, 1, plan.chunk), 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(plan, inputs, codes, state):
    out, after = _launch_forward(plan, inputs, codes, state, save=False)
    return out, after


def _forward(plan, inputs, codes, state):
    out, after, states = _launch_forward(plan, inputs, codes, state, save=True)
    return (out, after), (inputs, codes, states)


def _backward(plan, saved, cotangents):
    *slopes, d_state = _launch_backward(plan, *saved, *cotangents)
    return tuple(slopes), None, d_state


_run.defvjp(_forward, _backward)


def _launch_forward(plan, inputs, codes, state, *, save):
    specs = _specs(plan, inputs, state, lambda n: n)
    v = inputs[2]
    types = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (v, state)]
    if save:
        shape = (state.shape[0], plan.count, *state.shape[1:])
        types.append(jax.ShapeDtypeStruct(shape, state.dtype))
    more, packed = ([], []) if codes is None else ([codes], [specs["codes"]])
    return tpu.call(
        functools.partial(_forward_body, plan, bool(more)),
        *(*inputs, *more, state),
        grid=_grid(plan, state),
        ins=[*(specs[kind] for kind in plan.kinds), *packed, specs["state"]],
        outs=[specs["value"], specs["state"], specs["states"]][: len(types)],
        out_types=types,
        semantics="ppa",
        scratch=[pltpu.VMEM(_states_of(plan, state), state.dtype)],
        name=f"{plan.name}_forward",
    )


def _launch_backward(plan, inputs, codes, states, d_out, d_after):
    specs = _specs(plan, inputs, d_after, lambda n: plan.count - 1 - n)
    more, packed = ([], []) if codes is None else ([codes], [specs["codes"]])
    by_kind = [specs[kind] for kind in plan.kinds]
    return tpu.call(
        functools.partial(_backward_body, plan, bool(more)),
        *(*inputs, *more, states, d_out, d_after),
        grid=_grid(plan, d_after),
        ins=[*by_kind, *packed, specs["states"], specs["value"], specs["state"]],
        outs=[*by_kind, specs["state"]],
        out_types=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*inputs, d_after)],
        semantics="ppa",
        scratch=[pltpu.VMEM(_states_of(plan, d_after), d_after.dtype)],
        name=f"{plan.name}_backward",
    )


def _grid(plan: Plan, state) -> tuple[int, int, int]:
    """(rows, parts of the heads, chunks)."""
    return state.shape[0], state.shape[1] // (plan.groups * plan.heads), plan.count


def _states_of(plan: Plan, state) -> tuple[int, int, int]:
    """(R, K, V) of a program."""
    return plan.groups * plan.heads, *state.shape[2:]


def _specs(plan: Plan, inputs, state, at: Callable) -> dict[str, pl.BlockSpec]:
    """Blocks by kind of array; `at(n)` is the chunk of step n."""
    heads, key, value = _states_of(plan, state)

    def by_head(count, width):
        shape = (None, count, plan.chunk, width)
        return pl.BlockSpec(shape, lambda b, j, n: (b, j, at(n), 0))

    row = (None, heads, None, 1, plan.chunk)
    codes = (None, None, 4, 1, plan.chunk)
    states = (None, None, heads, key, value)
    return {
        "key": by_head(plan.groups, key),
        "value": by_head(heads, value),
        "vector": by_head(heads, key),
        "row": pl.BlockSpec(row, lambda b, j, n: (b, j, at(n), 0, 0)),
        "codes": pl.BlockSpec(codes, lambda b, j, n: (b, at(n), 0, 0, 0)),
        "state": pl.BlockSpec((None, heads, key, value), lambda b, j, n: (b, j, 0, 0)),
        "states": pl.BlockSpec(states, lambda b, j, n: (b, at(n), j, 0, 0)),
    }


def _take(plan: Plan, packed: bool, refs: tuple) -> tuple[list, pallas_tpu_chunk.Marks, tuple]:
    """A chunk's inputs and marks, and the other refs."""
    count = len(plan.kinds)
    codes = refs[count][...] if packed else None
    marks = pallas_tpu_chunk.make_marks(plan.chunk, codes)
    return [ref[...] for ref in refs[:count]], marks, refs[count + packed :]


def _forward_body(plan: Plan, packed: bool, *refs):
    inputs, marks, (entering, out, leaving, *states, scratch) = _take(plan, packed, refs)

    @pl.when(pl.program_id(2) == 0)
    def _():
        scratch[...] = entering[...]

    s_RKV = scratch[...]
    if states:
        states[0][...] = s_RKV
    after_RKV, o_RCV = plan.forward(plan.scale, plan.narrow, s_RKV, inputs, marks)
    out[...] = o_RCV.astype(out.dtype)
    scratch[...] = after_RKV
    leaving[...] = after_RKV


def _backward_body(plan: Plan, packed: bool, *refs):
    inputs, marks, (states, d_out, d_after, *outs, scratch) = _take(plan, packed, refs)

    @pl.when(pl.program_id(2) == 0)
    def _():
        scratch[...] = d_after[...]

    before_RKV, slopes = plan.backward(
        plan.scale, plan.narrow, states[...], inputs, marks, scratch[...], d_out[...]
    )
    scratch[...] = before_RKV
    for ref, x in zip(outs, (*slopes, before_RKV), strict=True):
        ref[...] = x.astype(ref.dtype)
