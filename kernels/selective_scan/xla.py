"""The selective scan as a loop in place that keeps one state a chunk, with its own reverse loop.

A token's state is N times as large as its input, so what costs is one exponential and a few
multiply-adds a number of the state: the loop over tokens works on states that fit a cache, (N, D)
with the channels along the vector unit, and lets each of them be overwritten by the next. The
backward pass takes the chunks in reverse, runs each again from its saved state and walks back.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import chunks, vary
from kernels import segments as packed
from kernels.products import sum_type


class Inputs(NamedTuple):
    """Arrays (B, T, ...) that the loop reads a token at a time."""

    x: Array
    dt: Array
    b: Array
    c: Array


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
    """The recurrence of `kernels.selective_scan`; padding takes steps of size zero."""
    accumulator = sum_type(x)
    batch, length, width = x.shape
    if initial_state is None:
        initial_state = jnp.zeros((batch, width, A.shape[1]), accumulator)
    inputs, start_BT1 = Inputs(x, dt, Bm, Cm), None
    if segments is not None:
        real_BT1 = packed.is_real(segments)[..., None]
        inputs = Inputs(*(jnp.where(real_BT1, part, 0) for part in inputs))
        start_BT1 = packed.starts(segments)[..., None]
    a_ND = A.T.astype(accumulator)
    h_BND = jnp.swapaxes(initial_state, 1, 2).astype(accumulator)
    chunk = _chunk(length)
    if length == 1:
        h_BND, y_BD = _step(a_ND, h_BND, _row(inputs, 0, accumulator), _on(start_BT1, 0))
        y_BTD = y_BD[:, None]
    else:
        padded = (chunks.pad(inputs, chunk), chunks.pad(start_BT1, chunk))
        y_BTD, h_BND = recur(chunk, a_ND, h_BND, *padded)
        y_BTD = y_BTD[:, :length]
    if D is not None:
        y_BTD += D.astype(accumulator) * inputs.x.astype(accumulator)
    return y_BTD.astype(x.dtype), jnp.swapaxes(h_BND, 1, 2)


def _chunk(length: int) -> int:
    """About the root of the length: the states at all chunks and within one weigh the same."""
    return min(max(1 << (length.bit_length() // 2), 8), 128)


def _step(a_ND, h_BND, row: Inputs, on_B11) -> tuple[Array, Array]:
    """(the state after a token, what the token reads of it)."""
    x_BD, dt_BD, b_BN, c_BN = row
    decay_BND = on_B11 * jnp.exp(dt_BD[:, None] * a_ND)
    h_BND = decay_BND * h_BND + (dt_BD * x_BD)[:, None] * b_BN[..., None]
    # A dot product: for a plain sum XLA's CPU compiler computes every exponential a second time.
    return h_BND, jnp.einsum("bnd,bn->bd", h_BND, c_BN)


def recur(chunk: int, a_ND, h_BND, inputs: Inputs, start_BT1) -> Any:
    """(what all tokens read, the last state), for a whole number of chunks."""
    return _recur(chunk, *vary.together((a_ND, h_BND, inputs, start_BT1)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recur(chunk, a_ND, h_BND, inputs, start_BT1):
    return _forward(chunk, a_ND, h_BND, inputs, start_BT1, save=False)[0]


def _forward(chunk, a_ND, h_BND, inputs, start_BT1, save=True):
    def token(t, carry):
        h_BND, y_BTD = carry
        row = _row(inputs, t, h_BND.dtype)
        h_BND, y_BD = _step(a_ND, h_BND, row, _on(start_BT1, t))
        return h_BND, _put(y_BTD, y_BD, t)

    def run(carry, n):
        return jax.lax.fori_loop(n * chunk, (n + 1) * chunk, token, carry), carry[
            0
        ] if save else None

    y_BTD = jnp.zeros_like(inputs.x, dtype=h_BND.dtype)
    count = inputs.x.shape[1] // chunk
    (h_BND, y_BTD), h_NBND = jax.lax.scan(run, (h_BND, y_BTD), jnp.arange(count))
    return (y_BTD, h_BND), (a_ND, inputs, start_BT1, h_NBND)


def _backward(chunk, saved, cotangents):
    """With l_t the slope of h_t: l_t = dy_t c_t + decay_{t+1} l_{t+1}; see `_step_back`."""
    a_ND, inputs, start_BT1, h_NBND = saved
    dy_BTD, dh_BND = cotangents
    accumulator = dh_BND.dtype
    count = inputs.x.shape[1] // chunk

    def run(carry, at):
        slope_BND, da_BND, dinputs, before_CBND = carry
        n, h_BND = at

        def again(i, carry):
            h_BND, before_CBND = carry
            before_CBND = jax.lax.dynamic_update_index_in_dim(before_CBND, h_BND, i, 0)
            t = n * chunk + i
            h_BND, _ = _step(a_ND, h_BND, _row(inputs, t, accumulator), _on(start_BT1, t))
            return h_BND, before_CBND

        h_BND, before_CBND = jax.lax.fori_loop(0, chunk, again, (h_BND, before_CBND))

        def token(j, carry):
            h_BND, slope_BND, da_BND, dinputs = carry
            i = chunk - 1 - j
            t = n * chunk + i
            before_BND = jax.lax.dynamic_index_in_dim(before_CBND, i, 0, keepdims=False)
            dy_BD = _at(dy_BTD, t)
            row, on_B11 = _row(inputs, t, accumulator), _on(start_BT1, t)
            slope_BND, drow, da_now_BND = _step_back(
                a_ND, before_BND, h_BND, row, on_B11, slope_BND, dy_BD
            )
            dinputs = Inputs(*(_put(d, part, t) for d, part in zip(dinputs, drow, strict=True)))
            return before_BND, slope_BND, da_BND + da_now_BND, dinputs

        carry = (h_BND, slope_BND, da_BND, dinputs)
        _, slope_BND, da_BND, dinputs = jax.lax.fori_loop(0, chunk, token, carry)
        return (slope_BND, da_BND, dinputs, before_CBND), None

    before_CBND = jnp.zeros_like(dh_BND, shape=(chunk, *dh_BND.shape))
    start = (dh_BND, jnp.zeros_like(dh_BND), jax.tree.map(jnp.zeros_like, inputs), before_CBND)
    at = (jnp.arange(count), h_NBND)
    (dh_BND, da_BND, dinputs, _), _ = jax.lax.scan(run, start, at, reverse=True)
    return da_BND.sum(0), dh_BND, dinputs, None


_recur.defvjp(_forward, _backward)


def _step_back(a_ND, before_BND, h_BND, row: Inputs, on_B11, slope_BND, dy_BD):
    """(the slope of the state before, of the row, of a) from what later tokens make of `slope`."""
    x_BD, dt_BD, b_BN, c_BN = row
    slope_BND = slope_BND + dy_BD[:, None] * c_BN[..., None]
    dc_BN = jnp.einsum("bnd,bd->bn", h_BND, dy_BD)
    db_BN = jnp.einsum("bnd,bd->bn", slope_BND, dt_BD * x_BD)
    dwritten_BD = jnp.einsum("bnd,bn->bd", slope_BND, b_BN)
    slope_BND = on_B11 * jnp.exp(dt_BD[:, None] * a_ND) * slope_BND
    dexponent_BND = slope_BND * before_BND
    # Added by name: as a reduction or a batched product this takes longer than all the rest.
    ddecay_BD = sum(dexponent_BND[:, n] * a_ND[n] for n in range(a_ND.shape[0]))
    drow = Inputs(dwritten_BD * dt_BD, dwritten_BD * x_BD + ddecay_BD, db_BN, dc_BN)
    return slope_BND, drow, dexponent_BND * dt_BD[:, None]


def _row(inputs: Inputs, t, accumulator) -> Inputs:
    return Inputs(*(_at(part, t).astype(accumulator) for part in inputs))


def _on(start_BT1, t):
    """What the state before token t counts: nothing where a document starts."""
    return True if start_BT1 is None else ~_at(start_BT1, t)[..., None]


def _at(array, t):
    return jax.lax.dynamic_slice_in_dim(array, t, 1, axis=1)[:, 0]


def _put(array, value, t):
    return jax.lax.dynamic_update_slice_in_dim(array, value[:, None].astype(array.dtype), t, axis=1)
