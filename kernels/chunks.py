"""A recurrence taken a chunk of tokens at a time: the loop, its backward pass and its masks.

`scan` reads chunks out of (B, T, ...) arrays where they lie and writes outputs and gradients in
place, so neither pass copies or transposes a whole sequence. Backward it keeps one carry a chunk
and runs each chunk again: memory is the carries, not the chunks' insides.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

from kernels import segments as packed
from kernels import vary


class Boundaries(NamedTuple):
    """What each token must know of the documents around it, all (B, T)."""

    real: Bool[Array, "B T"]
    document: Int[Array, "B T"]  # the token's document, numbered by order in the row
    entering: Int[Array, "B T"]  # the document of the state that enters the token's chunk


class Masks(NamedTuple):
    """One chunk's masks; their first axis is 1 where nothing depends on the row."""

    real: Bool[Array, "B C"]
    pair: Bool[Array, "B C S"]  # position S writes what position C reads
    read: Bool[Array, "B C"]  # the position reads the entering state
    write: Bool[Array, "B C"]  # the position writes the leaving state
    keep: Bool[Array, " B"]  # the entering state survives the chunk


def length_for(length: int, longest: int) -> int:
    """The chunk's length: `longest`, or the power of two that holds a shorter sequence."""
    return min(longest, 1 << (length - 1).bit_length())


def pad(tree: PyTree, chunk: int) -> PyTree:
    """Pad axis 1 of every array with zeros to a multiple of `chunk`."""

    def lengthen(x):
        missing = -x.shape[1] % chunk
        return jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2)) if missing else x

    return jax.tree.map(lengthen, tree)


def boundaries(segments: Int[Array, "B T"] | None, chunk: int) -> Boundaries | None:
    """Read the packed rows once for all chunks; `segments` is padded to whole chunks."""
    if segments is None:
        return None
    document = packed.ordinals(segments)
    leaving = document[:, chunk - 1 :: chunk]
    entering = jnp.pad(leaving[:, :-1], ((0, 0), (1, 0)))
    return Boundaries(packed.is_real(segments), document, jnp.repeat(entering, chunk, axis=1))


def masks(within: Boundaries | None, chunk: int) -> Masks:
    """The masks of one chunk, from its slice of `boundaries`."""
    causal = jnp.tril(jnp.ones((1, chunk, chunk), bool))
    if within is None:
        every = jnp.ones((1, chunk), bool)
        return Masks(every, causal, every, every, every[:, 0])
    real, document, entering = within
    pair = causal & (document[:, :, None] == document[:, None, :])
    return Masks(
        real=real,
        pair=pair & real[:, :, None] & real[:, None, :],
        read=real & (document == entering),
        write=real & (document == document[:, -1:]),
        keep=document[:, -1] == entering[:, -1],
    )


def scan(body: Callable, chunk: int, carry: PyTree, inputs: PyTree, fixed: PyTree) -> Any:
    """Run `body(carry, inputs, fixed) -> (carry, out)` over chunks of axis 1; (carry, out) of all.

    `inputs` and `fixed` are pytrees of (B, T, ...) arrays, T a multiple of `chunk`; `out` is one
    (B, T, ...) array. Differentiable (reverse mode) in `carry` and `inputs`, not in `fixed`, and
    `body` must not close over traced values. Works inside `jax.shard_map`, where everything comes
    to vary over every axis that anything varies over.
    """
    return _scan(body, chunk, *vary.together((carry, inputs, fixed)))


def scan_by_groups(
    body: Callable, chunk: int, groups: int, s_BHKV: Array, inputs: PyTree, fixed: PyTree
) -> tuple[Array, Array]:
    """`scan` of a body whose state is (B, G, K, H/G, V): the heads of a group side by side."""
    batch, heads, key_dim, value_dim = s_BHKV.shape
    s_BGRKV = s_BHKV.reshape(batch, groups, heads // groups, key_dim, value_dim)
    s_BGKRV, out = scan(body, chunk, jnp.swapaxes(s_BGRKV, 2, 3), inputs, fixed)
    return jnp.swapaxes(s_BGKRV, 2, 3).reshape(s_BHKV.shape), out


def one_token(
    o_BHV: Array, after_BHKV: Array, segments: Array | None, before_BHKV: Array, dtype
) -> tuple[Array, Array]:
    """(output (B, 1, H, V), state) of a single token; padding leaves the state as it was."""
    if segments is not None:
        real = packed.is_real(segments)[..., None]
        after_BHKV = jnp.where(real[..., None], after_BHKV, before_BHKV)
        o_BHV = jnp.where(real, o_BHV, 0)
    return o_BHV[:, None].astype(dtype), after_BHKV


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(body, chunk, carry, inputs, fixed):
    result, _ = _forward(body, chunk, carry, inputs, fixed, save=False)
    return result


def _forward(body, chunk, carry, inputs, fixed, save=True):
    count = jax.tree.leaves(inputs)[0].shape[1] // chunk
    first = _cut((inputs, fixed), 0, chunk)
    one = jax.eval_shape(body, carry, *first)[1]
    out = jnp.zeros((one.shape[0], count * chunk, *one.shape[2:]), one.dtype)
    out = vary.like(out, carry)

    def step(state, n):
        carry, out = state
        after, part = body(carry, *_cut((inputs, fixed), n, chunk))
        return (after, _put(out, part, n, chunk)), (carry if save else None)

    result, carries = jax.lax.scan(step, (carry, out), jnp.arange(count))
    return result, (carries, inputs, fixed)


def _backward(body, chunk, saved, cotangents):
    carries, inputs, fixed = saved
    d_carry, d_out = cotangents
    count = d_out.shape[1] // chunk

    def step(state, at):
        d_carry, d_inputs = state
        n, carry = at
        part, constant, d_part = _cut((inputs, fixed, d_out), n, chunk)
        _, pull = jax.vjp(lambda carry, part: body(carry, part, constant), carry, part)
        d_carry, d_part = pull((d_carry, d_part))
        return (d_carry, _put(d_inputs, d_part, n, chunk)), None

    start = vary.like((d_carry, jax.tree.map(jnp.zeros_like, inputs)), carries)
    (d_carry, d_inputs), _ = jax.lax.scan(step, start, (jnp.arange(count), carries), reverse=True)
    return d_carry, d_inputs, None


def _cut(tree, n, chunk):
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, n * chunk, chunk, axis=1), tree)


def _put(tree, parts, n, chunk):
    return jax.tree.map(
        lambda x, part: jax.lax.dynamic_update_slice_in_dim(x, part, n * chunk, axis=1), tree, parts
    )


_scan.defvjp(_forward, _backward)
