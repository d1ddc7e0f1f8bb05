"""Diagonal state spaces with several modes a channel: their scans by chunks, and where they start.

The modes of all tokens, (B, T, D, N), are N times the activations, too much to keep. So tokens are
read `CHUNK` at a time and the insides of a chunk are computed again in the backward pass: memory is
one chunk's modes and one state (B, D, N) a chunk.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Int

from kernels import segments as boundaries
from kernels.linear_scan import complex_linear_scan, linear_scan
from models import mixer

CHUNK = 64


def complex_modes(
    x: Float[Array, "B T D"],
    log_decay: Float[Array, "D N"],
    phase: Float[Array, "D N"],
    read: Float[Array, "2 D N"],
    *,
    segments: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B 2 DN"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B 2 DN"]]:
    """h_t = exp(log_decay + i phase) h_{t-1} + x_t;  y_t = Re sum_n read_n h_tn.  Returns (y, h_T).

    Each mode n of channel d is driven by x_t of that channel; `read` and states are real parts,
    then imaginary parts. A mode's input weight belongs into `read`. y is wide.
    """
    decay_DN, phase_DN = log_decay.reshape(-1), phase.reshape(-1)

    def step(x_BCD, segments, state):
        x_BCM = _spread(x_BCD, log_decay.shape[1])
        (real, imag), last = complex_linear_scan(
            x_BCM,
            jnp.zeros_like(x_BCM),
            decay_DN,
            phase_DN,
            segments=segments,
            initial_state=state,
        )
        return _gather(real, read[0]) - _gather(imag, read[1]), last

    if initial_state is None:
        shape = (x.shape[0], 2, log_decay.size)
        initial_state = jnp.zeros(shape, mixer.wide(x.dtype))
    return _by_chunks(step, x.astype(mixer.wide(x.dtype)), segments, initial_state)


def real_modes(
    x: Float[Array, "B T D"],
    log_decay: Float[Array, "D N"],
    read: Float[Array, "D N"],
    *,
    segments: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B DN"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B DN"]]:
    """`complex_modes` without phases, its state (B, D N): real numbers throughout."""

    def step(x_BCD, segments, state):
        x_BCM = _spread(x_BCD, log_decay.shape[1])
        decay_BCM = jnp.broadcast_to(log_decay.reshape(-1), x_BCM.shape)
        h_BCM, last = linear_scan(x_BCM, decay_BCM, segments=segments, initial_state=state)
        return _gather(h_BCM, read), last

    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], log_decay.size), mixer.wide(x.dtype))
    return _by_chunks(step, x.astype(mixer.wide(x.dtype)), segments, initial_state)


def _spread(x_BCD, count):
    """Every channel `count` times, (B, C, D * count)."""
    return jnp.repeat(x_BCD, count, axis=2)


def _gather(h_BCM, read_DN):
    """sum_n read[d, n] h[d, n] of modes (B, C, D * N)."""
    h_BCDN = h_BCM.reshape(*h_BCM.shape[:2], *read_DN.shape)
    return jnp.einsum("bcdn,dn->bcd", h_BCDN, read_DN)


def _by_chunks(
    step: Callable[..., tuple[Array, Any]], x_BTD: Array, segments: Array | None, state: Any
) -> tuple[Array, Any]:
    """`step(x, segments, state) -> (y, state)` over chunks of tokens, then over what is left."""
    batch, length, channels = x_BTD.shape
    count = (length - 1) // CHUNK
    if count == 0:
        return step(x_BTD, segments, state)
    numbers = None if segments is None else boundaries.numbered(segments)

    def take(state, given):
        x_BCD, numbers, entering = given
        if numbers is not None:
            first, _ = mixer.first_and_last(numbers)
            state = mixer.keep_rows((first == entering) | (first == 0), state)
        y_BCD, state = step(x_BCD, numbers, state)
        return state, y_BCD

    def cut(rows):
        whole = rows[:, : count * CHUNK].reshape(batch, count, CHUNK, *rows.shape[2:])
        return whole.swapaxes(0, 1)

    entering = rest = None
    if numbers is not None:
        # The document that enters a chunk is that of the token before it: padding inherits it.
        last = 1 + boundaries.ordinals(numbers)[:, CHUNK - 1 : count * CHUNK : CHUNK].T
        entering = jnp.concatenate([jnp.ones_like(last[:1]), last[:-1]])
        rest = (numbers[:, count * CHUNK :], last[-1])
    chunks = (cut(x_BTD), None if numbers is None else cut(numbers), entering)
    state, y_NBCD = jax.lax.scan(jax.checkpoint(take), state, chunks)
    y_BTD = y_NBCD.swapaxes(0, 1).reshape(batch, -1, channels)
    state, tail = take(state, (x_BTD[:, count * CHUNK :], *(rest or (None, None))))
    return jnp.concatenate([y_BTD, tail], axis=1), state


def normal_legs(
    size: int,
) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"], Complex[np.ndarray, "size N"]]:
    """Rates and frequencies of the eigenvalues -rate + i frequency of normal HiPPO-LegS; vectors.

    The normal part of HiPPO-LegS, -1/2 on the diagonal and skew elsewhere (arXiv 2206.11893,
    section 4.2; 2208.04933, appendix B). Of `size`, which is even, half are given, those with
    positive frequency: the others are their conjugates.
    """
    root = np.sqrt(2 * np.arange(size) + 1.0)
    skew = np.triu(np.outer(root, root) / 2, 1)
    frequency, vectors = np.linalg.eigh(-1j * (skew - skew.T))
    half = size // 2
    return np.full(half, 0.5), frequency[half:], vectors[:, half:]


def log_steps(low: float, high: float) -> Callable[..., Array]:
    """log of a step size that is log-uniform in [low, high]."""
    if not 0 < low <= high:
        raise ValueError(
            f"dt_min={low} must be > 0 and at most dt_max={high}; usual: 0.001 and 0.1."
        )
    low, high = np.log(low), np.log(high)
    return lambda key, shape: jax.random.uniform(key, shape, minval=low, maxval=high)


def rows(values: np.ndarray) -> Callable[..., Array]:
    """Every row (or entry of the last axis) starts at the same `values`."""
    return lambda key, shape: jnp.broadcast_to(jnp.asarray(values, jnp.float32), shape)


def times(a: Float[Array, "2 ..."], b: Float[Array, "2 ..."]) -> Float[Array, "2 ..."]:
    """The product of complex numbers held as real and imaginary parts."""
    return jnp.stack([a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]])


def zero_order_hold(
    dt: Array, rate: Array, frequency: Array, turn: Array | None = None
) -> tuple[Array, Array, Array]:
    """log|abar|, arg abar and bbar of h' = a h + x, a = -rate + i frequency.

    abar = exp(dt a), bbar = (abar - 1) / a (arXiv 2206.11893, eq. 3). `dt` broadcasts; `turn` is
    the step of the frequency where that has one of its own.
    """
    log_decay, phase = -dt * rate, (dt if turn is None else turn) * frequency
    # exp(z) - 1 without the loss of digits where z is small.
    real = jnp.expm1(log_decay) - 2 * jnp.exp(log_decay) * jnp.square(jnp.sin(phase / 2))
    grown = jnp.stack([real, jnp.exp(log_decay) * jnp.sin(phase)])
    inverse = jnp.stack([-rate, -frequency]) / (jnp.square(rate) + jnp.square(frequency))
    return log_decay, phase, times(grown, inverse)


def bilinear(dt: Array, rate: Array, frequency: Array) -> tuple[Array, Array, Array]:
    """As `zero_order_hold`: abar = (1 + dt a / 2) / (1 - dt a / 2), bbar = dt / (1 - dt a / 2)."""
    r, f = dt * rate / 2, dt * frequency / 2
    size = jnp.square(1 + r) + jnp.square(f)
    log_decay = jnp.log1p(-4 * r / size) / 2
    phase = jnp.arctan2(f, 1 - r) + jnp.arctan2(f, 1 + r)
    return log_decay, phase, jnp.stack([dt * (1 + r), dt * f]) / size
