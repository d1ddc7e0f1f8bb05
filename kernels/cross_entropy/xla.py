"""Cross-entropy in chunks of time, the gradients formed while a chunk's logits are at hand."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import vary
from kernels.products import product, sum_type

CHUNK_BYTES = 8 << 20
CHUNK_ROWS = 128
CHUNKS = 16


def cross_entropy(
    x: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    softcap: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """Without derivatives 2 B T D V FLOPs; with them 6 B T D V, all spent in the forward pass.

    The gradients of the sum are linear in its cotangent, a scalar, so the backward pass only
    scales them. Between the passes they take the memory of x and of a float32 head.
    """
    chunk = chunk_length(x.shape[0], x.shape[1], head.shape[1])
    return _loss(*vary.together((x, head, targets, weights)), softcap, chunk)


def chunk_length(batch: int, length: int, vocabulary: int) -> int:
    """Positions a chunk: about CHUNK_BYTES of float32 logits, the chunks equal.

    More where that would give chunks of fewer than CHUNK_ROWS rows, which read and write d_head
    more often than they multiply, or more than CHUNKS of them, each of which may end in an
    all-reduce of d_head.
    """
    rows = max(CHUNK_BYTES // (4 * vocabulary), CHUNK_ROWS)
    fitting = max(rows // batch, math.ceil(length / CHUNKS), 1)
    return math.ceil(length / math.ceil(length / fitting))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _loss(x, head, targets, weights, softcap, chunk):
    def step(carry, given):
        x_BCD, targets_BC = given
        nll_BC, _, _ = _softmax(_logits(x_BCD, head, softcap), targets_BC)
        return carry, (nll_BC,)

    _, (nll,) = _over_chunks(step, None, (x, targets), chunk)
    return jnp.sum(weights.astype(nll.dtype) * nll), nll


def _forward(x, head, targets, weights, softcap, chunk):
    """The loss, and as residuals the gradients of `total` for a cotangent of 1."""

    def step(d_head, given):
        x_BCD, targets_BC, weights_BC = given
        logits_BCV = _logits(x_BCD, head, softcap)
        nll_BC, power_BCV, sum_BC = _softmax(logits_BCV, targets_BC)
        weights_BC = weights_BC.astype(sum_BC.dtype)
        here_BCV = jnp.arange(head.shape[1]) == targets_BC[..., None]
        d_logits_BCV = power_BCV * (weights_BC / sum_BC)[..., None]
        d_logits_BCV -= jnp.where(here_BCV, weights_BC[..., None], 0)
        if softcap:
            d_logits_BCV *= 1 - jnp.square(logits_BCV / softcap)
        d_x_BCD = product("bcv,dv->bcd", d_logits_BCV.astype(head.dtype), head)
        d_head += product("bcd,bcv->dv", x_BCD, d_logits_BCV.astype(x.dtype))
        return d_head, (nll_BC, d_x_BCD.astype(x.dtype))

    d_head = vary.like(jnp.zeros(head.shape, sum_type(x, head)), x)
    d_head, (nll, d_x) = _over_chunks(step, d_head, (x, targets, weights), chunk)
    total = jnp.sum(weights.astype(nll.dtype) * nll)
    like_head = jnp.zeros((), head.dtype)
    return (total, nll), (d_x, d_head, nll.astype(weights.dtype), like_head)


def _backward(softcap, chunk, residuals, cotangents):
    d_x, d_head, d_weights, like_head = residuals
    d_total, _ = cotangents
    scaled = [(d_total * d).astype(d.dtype) for d in (d_x, d_head, d_weights)]
    return scaled[0], scaled[1].astype(like_head.dtype), None, scaled[2]


_loss.defvjp(_forward, _backward)


def _logits(x_BCD: Array, head: Array, softcap: float) -> Array:
    logits_BCV = product("bcd,dv->bcv", x_BCD, head)
    return softcap * jnp.tanh(logits_BCV / softcap) if softcap else logits_BCV


def _softmax(logits_BCV: Array, targets_BC: Array) -> tuple[Array, Array, Array]:
    """(nll, e, sum of e) with e = exp(logits - max): one exponential a logit, used twice."""
    top_BC1 = jnp.max(logits_BCV, axis=-1, keepdims=True)
    power_BCV = jnp.exp(logits_BCV - top_BC1)
    sum_BC = jnp.sum(power_BCV, axis=-1)
    chosen_BC1 = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)
    nll_BC = jnp.log(sum_BC) + (top_BC1 - chosen_BC1)[..., 0]
    return nll_BC, power_BCV, sum_BC


def _over_chunks(step, carry, arrays: tuple, chunk: int):
    """`lax.scan` of `step` over chunks of axis 1, padded with zeros; (carry, outputs (B, T, ...)).

    The batch axis stays where it is, so that arrays sharded over it stay so.
    """
    batch, length = arrays[0].shape[:2]
    count = math.ceil(length / chunk)
    if count == 1:
        return step(carry, arrays)

    def split(array):
        pad = [(0, 0), (0, count * chunk - length)] + [(0, 0)] * (array.ndim - 2)
        parts = jnp.pad(array, pad).reshape(batch, count, chunk, *array.shape[2:])
        return jnp.moveaxis(parts, 1, 0)

    def join(parts):
        array = jnp.moveaxis(parts, 0, 1).reshape(batch, count * chunk, *parts.shape[3:])
        return array[:, :length]

    carry, outputs = jax.lax.scan(step, carry, jax.tree.map(split, arrays))
    return carry, jax.tree.map(join, outputs)
