"""What makes a score of a product, for every implementation: the soft cap and the sums of gates."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels import segments as packed


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def capped(score: Float[Array, "..."], limit: float) -> Float[Array, "..."]:
    """limit tanh(score / limit)."""
    return limit * jnp.tanh(score / limit)


def slope(score: Float[Array, "..."], limit: float) -> Float[Array, "..."]:
    """The derivative of `capped`; 1 - tanh^2 would lose its digits where the cap is near."""
    power = jnp.exp(-2 / limit * jnp.abs(score))
    return 4 * power / jnp.square(1 + power)


@capped.defjvp
def _capped_jvp(limit, primals, tangents):
    (score,), (d_score,) = primals, tangents
    return capped(score, limit), slope(score, limit) * d_score


def sink_slopes(
    sinks: Float[Array, " H"], lse: Float[Array, "B T H"], delta: Float[Array, "B T H"]
) -> Float[Array, " H"]:
    """Each sink's gradient: minus the sum over queries of its share exp(sink - lse) times delta.

    delta is the inner product of a query's output and its cotangent; lse the logarithm of the sum
    of all powers, the sink's included.
    """
    return -jnp.sum(jnp.exp(sinks - lse) * delta, axis=(0, 1))


def forget_sums(
    log_forget: Float[Array, "B T H"], segments: Int[Array, "B T"] | None
) -> tuple[Float[Array, "B T H"], Float[Array, "B T H"]]:
    """(high, low): the sum of log_forget from the start of each document, high + low, unrounded.

    The sum over s < i <= t is (high_t - high_s) + (low_t - low_s), to the digits of that sum, not
    to those of the sums from the start. Padding adds nothing. The gradient is taken from the
    cotangent of `high` alone: `low` is its rounding error.
    """
    if segments is None:
        first = jnp.zeros((*log_forget.shape[:2], 1), bool)
    else:
        log_forget = jnp.where(packed.is_real(segments)[..., None], log_forget, 0)
        first = packed.starts(segments)[..., None]
    return _sums(log_forget, first)


@jax.custom_vjp
def _sums(g_BTH, first_BT1):
    return _running(g_BTH, first_BT1)


def _forward(g_BTH, first_BT1):
    return _running(g_BTH, first_BT1), first_BT1


def _backward(first_BT1, cotangents):
    last_BT1 = jnp.pad(first_BT1[:, 1:], ((0, 0), (0, 1), (0, 0)))
    return _running(cotangents[0], last_BT1, reverse=True)[0], None


_sums.defvjp(_forward, _backward)


def _running(
    x_BTH: Float[Array, "B T H"], restart_BT1: Bool[Array, "B T 1"], reverse: bool = False
) -> tuple[Array, Array]:
    """Inclusive sums that start anew at `restart`, each as a number and its rounding error.

    In log2(T) rounds a token's sum comes to cover twice as many tokens.
    """
    length = x_BTH.shape[1]

    def double(n, parts):
        shift = jnp.left_shift(1, n)

        def shifted(x):
            both = [x, jnp.zeros_like(x)] if reverse else [jnp.zeros_like(x), x]
            start = shift if reverse else length - shift
            return jax.lax.dynamic_slice_in_dim(jnp.concatenate(both, axis=1), start, length, 1)

        return _join(jax.tree.map(shifted, parts), parts)

    parts = x_BTH, x_BTH - x_BTH, restart_BT1  # a zero that varies over a mesh as x does
    return jax.lax.fori_loop(0, (length - 1).bit_length(), double, parts)[:2]


def _join(before: Sequence[Array], after: Sequence[Array]) -> tuple[Array, Array, Array]:
    """The sum (high, low, restarted) of two parts that lie one after the other."""
    high, low = _add(before[0], after[0])
    high, low = _add(high, low + (before[1] + after[1]))
    alone = after[2]
    return jnp.where(alone, after[0], high), jnp.where(alone, after[1], low), before[2] | alone


def _add(a: Array, b: Array) -> tuple[Array, Array]:
    """(a + b rounded, what the rounding lost); Knuth's two-sum."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)
