"""The short convolution as a sum of shifted products, which the compiler fuses into one pass.

Its own grouped convolution is two orders of magnitude slower on a CPU. The backward pass computes
the value before the activation again instead of keeping it, so that the input is all that a
training step holds.

`reach` (B, T) says all about boundaries: how many inputs before a token its document holds, at most
W-1, and -1 at padding. A shift by s counts where reach >= s.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import segments as packed
from kernels import vary
from kernels.products import sum_type

# Tokens summed at once in the gradient of the weight.
BLOCK = 16


def short_conv(
    x: Float[Array, "B T D"],
    weight: Float[Array, "W D"],
    bias: Float[Array, " D"] | None = None,
    *,
    segments: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B W-1 D"] | None = None,
    activation: str = "none",
) -> tuple[Float[Array, "B T D"], Float[Array, "B W-1 D"]]:
    """The sum of `kernels.short_conv` over whole rows; a single token needs no shifts."""
    tail_BVD = None if initial_state is None else initial_state.astype(x.dtype)
    x, weight, bias, segments, tail_BVD = vary.together((x, weight, bias, segments, tail_BVD))
    if x.shape[1] == 1:
        return _one_token(x, weight, bias, segments, tail_BVD, activation)
    if segments is None:
        y_BTD = _convolve(activation, x, weight, bias, tail_BVD, None, None)
        tail = _last_inputs(x, weight.shape[0], tail_BVD)
        return y_BTD, tail  # pyright: ignore[reportReturnType]
    reach = _reach(segments, weight.shape[0])
    first = packed.ordinals(segments) == 0
    y_BTD = _convolve(activation, x, weight, bias, tail_BVD, reach, first)
    tail = _packed_last_inputs(x, weight.shape[0], tail_BVD, segments, first)
    return y_BTD, tail  # pyright: ignore[reportReturnType]


def _one_token(x, weight, bias, segments, tail_BVD, activation):
    accumulator = sum_type(x)
    batch, _, channels = x.shape
    if tail_BVD is None:
        tail_BVD = jnp.zeros((batch, weight.shape[0] - 1, channels), x.dtype)
    window_BWD = jnp.concatenate([tail_BVD, x], axis=1)
    y_BD = jnp.sum(window_BWD.astype(accumulator) * weight.astype(accumulator), axis=1)
    if bias is not None:
        y_BD = y_BD + bias.astype(accumulator)
    y_BTD = _activate(y_BD, activation)[:, None].astype(x.dtype)
    if segments is None:
        return y_BTD, window_BWD[:, 1:]
    real_BT1 = packed.is_real(segments)[..., None]
    return jnp.where(real_BT1, y_BTD, 0), jnp.where(real_BT1, window_BWD[:, 1:], tail_BVD)


def _last_inputs(x_BTD, width, tail_BVD):
    length = x_BTD.shape[1]
    if length >= width - 1:
        return x_BTD[:, length - width + 1 :]
    if tail_BVD is None:
        return jnp.pad(x_BTD, ((0, 0), (width - 1 - length, 0), (0, 0)))
    return jnp.concatenate([tail_BVD[:, length:], x_BTD], axis=1)


def _packed_last_inputs(x_BTD, width, tail_BVD, segments, first):
    """The last document's inputs lie before its last token; those of the first reach the tail."""
    length = x_BTD.shape[1]
    real = packed.is_real(segments)
    ordinals = packed.ordinals(segments)
    last = ordinals[:, -1:]
    time = jnp.arange(length, dtype=jnp.int32)
    begin = jnp.min(jnp.where(real, time, length), axis=1, keepdims=True)
    end = jnp.max(jnp.where(real, time, -1), axis=1, keepdims=True)
    # A row of padding alone ends before it begins: all of the tail stays.
    begin = jnp.where(end < 0, 0, begin)
    wanted = end + jnp.arange(2 - width, 1, dtype=jnp.int32)
    inside = jnp.maximum(wanted, 0)
    of_last = (wanted >= begin) & jnp.take_along_axis(real & (ordinals == last), inside, axis=1)
    found_BVD = jnp.take_along_axis(x_BTD, inside[..., None], axis=1)
    found_BVD = jnp.where(of_last[..., None], found_BVD, 0)
    if tail_BVD is None:
        return found_BVD
    older = wanted - begin
    kept_BVD = jnp.take_along_axis(
        tail_BVD, jnp.clip(older + width - 1, 0, width - 2)[..., None], axis=1
    )
    return jnp.where(((last == 0) & (older < 0))[..., None], kept_BVD, found_BVD)


def _reach(segments: Int[Array, "B T"], width: int) -> Int[Array, "B T"]:
    time = jnp.arange(segments.shape[1], dtype=jnp.int32)
    changed = jnp.diff(segments, axis=1, prepend=0) != 0
    begin = jax.lax.cummax(jnp.where(changed, time, 0), axis=1)
    return jnp.where(packed.is_real(segments), jnp.minimum(time - begin, width - 1), -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(activation, x_BTD, weight_WD, bias_D, tail_BVD, reach, first):
    pre_BTD = _preactivation(x_BTD, weight_WD, bias_D, tail_BVD, reach, first)
    y_BTD = _activate(pre_BTD, activation)
    return _where_reached(reach, 0, y_BTD).astype(x_BTD.dtype)


def _forward(activation, *arguments):
    return _convolve(activation, *arguments), arguments


def _backward(activation, arguments, dy_BTD):
    x_BTD, weight_WD, bias_D, tail_BVD, reach, first = arguments
    accumulator = sum_type(x_BTD)
    dpre_BTD = dy_BTD.astype(accumulator)
    if activation == "silu":
        pre_BTD = _preactivation(*arguments)
        gate_BTD = jax.nn.sigmoid(pre_BTD)
        dpre_BTD = dpre_BTD * gate_BTD * (1 + pre_BTD * (1 - gate_BTD))
    dpre_BTD = _where_reached(reach, 0, dpre_BTD)
    taps_WD = weight_WD.astype(accumulator)
    width = weight_WD.shape[0]
    dx_BTD = taps_WD[width - 1] * dpre_BTD
    for shift in range(1, min(width, x_BTD.shape[1])):
        seen_BTD = _where_reached(reach, shift, dpre_BTD)
        dx_BTD = dx_BTD + taps_WD[width - 1 - shift] * _shift(seen_BTD, -shift)
    dtaps_WD, dbias_D = _weight_gradients(dpre_BTD, x_BTD, reach, width)
    dtail_BVD = None
    if tail_BVD is not None:

        def from_tail(taps_WD, tail_BVD):
            return _spread(_head(taps_WD, tail_BVD), reach, first, x_BTD.shape[1])

        _, pullback = jax.vjp(from_tail, taps_WD, tail_BVD.astype(accumulator))
        more_WD, dtail_BVD = pullback(dpre_BTD)
        dtaps_WD = dtaps_WD + more_WD
        dtail_BVD = dtail_BVD.astype(tail_BVD.dtype)
    return (
        dx_BTD.astype(x_BTD.dtype),
        dtaps_WD.astype(weight_WD.dtype),
        None if bias_D is None else dbias_D.astype(bias_D.dtype),
        dtail_BVD,
        None,
        None,
    )


_convolve.defvjp(_forward, _backward)


def _activate(y, activation):
    return y * jax.nn.sigmoid(y) if activation == "silu" else y


def _preactivation(x_BTD, weight_WD, bias_D, tail_BVD, reach, first):
    accumulator = sum_type(x_BTD)
    x_BTD, taps_WD = x_BTD.astype(accumulator), weight_WD.astype(accumulator)
    width, length = weight_WD.shape[0], x_BTD.shape[1]
    y_BTD = taps_WD[width - 1] * x_BTD
    for shift in range(1, min(width, length)):
        seen_BTD = _where_reached(reach, shift, _shift(x_BTD, shift))
        y_BTD = y_BTD + taps_WD[width - 1 - shift] * seen_BTD
    if bias_D is not None:
        y_BTD = y_BTD + bias_D.astype(accumulator)
    if tail_BVD is not None:
        head_BVD = _head(taps_WD, tail_BVD.astype(accumulator))
        y_BTD = y_BTD + _spread(head_BVD, reach, first, length)
    return y_BTD


def _head(taps_WD, tail_BVD):
    """What the tail adds to the first W-1 tokens of its document."""
    width = taps_WD.shape[0]
    added = [
        jnp.sum(taps_WD[: width - 1 - token] * tail_BVD[:, token:], axis=1)
        for token in range(width - 1)
    ]
    return jnp.stack(added, axis=1)


def _spread(head_BVD, reach, first, length):
    """Put the head where its document begins; in a packed row that is behind any padding."""
    tokens = head_BVD.shape[1]
    if reach is None:
        return jnp.pad(head_BVD[:, :length], ((0, 0), (0, max(length - tokens, 0)), (0, 0)))
    spread_BTD = 0.0
    for token in range(tokens):
        here_BT1 = (first & (reach == token))[..., None]
        spread_BTD = spread_BTD + jnp.where(here_BT1, head_BVD[:, token, None], 0)
    return spread_BTD


def _weight_gradients(dpre_BTD, x_BTD, reach, width):
    """Sums over batch and time of dpre_t x_{t-s} for every tap, and of dpre_t.

    Blocks of tokens are added to each other first: a reduction over all of time a tap would read
    the row once a tap, and a CPU does it slowly.
    """
    batch, length, channels = x_BTD.shape
    blocks = -(-length // BLOCK)
    behind = blocks * BLOCK - length
    dpre_BTD = jnp.pad(dpre_BTD, ((0, 0), (0, behind), (0, 0)))
    x_BTD = jnp.pad(x_BTD, ((0, 0), (width - 1, behind), (0, 0)))
    if reach is not None:
        reach = jnp.pad(reach, ((0, 0), (0, behind)), constant_values=-1)

    def add_block(block, sums):
        at = block * BLOCK
        dpre_BCD = jax.lax.dynamic_slice_in_dim(dpre_BTD, at, BLOCK, axis=1)
        x_BSD = jax.lax.dynamic_slice_in_dim(x_BTD, at, BLOCK + width - 1, axis=1)
        x_BSD = x_BSD.astype(dpre_BCD.dtype)
        near = None if reach is None else jax.lax.dynamic_slice_in_dim(reach, at, BLOCK, axis=1)
        products = [
            _where_reached(near, width - 1 - tap, dpre_BCD * x_BSD[:, tap : tap + BLOCK])
            for tap in range(width)
        ]
        return tuple(total + new for total, new in zip(sums, [*products, dpre_BCD], strict=True))

    zeros_BCD = vary.like(jnp.zeros((batch, BLOCK, channels), dpre_BTD.dtype), dpre_BTD)
    sums = jax.lax.fori_loop(0, blocks, add_block, (zeros_BCD,) * (width + 1))
    *taps, bias_D = (jnp.sum(total_BCD, axis=(0, 1)) for total_BCD in sums)
    return jnp.stack(taps), bias_D


def _where_reached(reach, shift, array_BTD):
    """Zero where fewer than `shift` inputs of the document lie before the token."""
    if reach is None:
        return array_BTD
    return jnp.where((reach >= shift)[..., None], array_BTD, 0)


def _shift(array_BTD, steps):
    """Move `steps` tokens later (earlier if negative), with zeros behind."""
    zero = jnp.zeros((), array_BTD.dtype)
    return jax.lax.pad(array_BTD, zero, ((0, 0, 0), (steps, -steps, 0), (0, 0, 0)))
