"""The diagonal linear recurrence: the public operation, its rules and its checks."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import dispatch
from kernels import segments as packed


def linear_scan(
    x: Float[Array, "B T D"],
    log_decay: Float[Array, "B T D"],
    *,
    segments: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B D"] | None = None,
    impl: str | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D"]]:
    """h_t = exp(log_decay_t) * h_{t-1} + x_t, channel by channel.  Returns (h, h_T).

    The recurrence inside RG-LRU (arXiv:2402.19427, eq. 4), HGRN (arXiv:2311.04823, eq. 3) and
    minGRU (arXiv:2410.01201, section 3.1); gates and input scaling are the caller's.

    log_decay must be <= 0, which cannot be checked under jit; any such gate is safe, -inf included
    in the value (its gradient there is zero). The state is float32 (float64 for float64 inputs), h
    has x's dtype. Differentiable (reverse mode) in x, log_decay and initial_state, through h and
    h_T. A row of padding alone returns its initial state. Raises ValueError on shapes that do not
    fit.
    """
    check_inputs(x, log_decay)
    check_state(initial_state, x)
    packed.check(segments, x.shape[0], x.shape[1])
    run = dispatch.choose("linear_scan", "linear_scan", impl)
    return run(x, log_decay, segments=segments, initial_state=initial_state)


def check_inputs(x: Array, log_decay: Array) -> None:
    """Raise unless x and log_decay are floating arrays of one shape (B, T, D) without a zero."""
    if x.ndim != 3:
        raise ValueError(
            f"x has shape {x.shape}, rank {x.ndim}; it must have rank 3: (batch, time, width)."
        )
    if 0 in x.shape:
        raise ValueError(f"x has shape {x.shape}; every size, time included, must be at least 1.")
    if log_decay.shape != x.shape:
        raise ValueError(f"log_decay has shape {log_decay.shape}; it must be x's shape, {x.shape}.")
    for name, array in (("x", x), ("log_decay", log_decay)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} has dtype {array.dtype}; it must be floating, as float32.")


def check_state(initial_state: Array | None, x: Array) -> None:
    """Raise unless the state is None or a floating array (B, D)."""
    if initial_state is None:
        return
    legal = (x.shape[0], x.shape[2])
    if initial_state.shape != legal:
        raise ValueError(
            f"initial_state has shape {initial_state.shape}; it must be (B, D) = {legal}."
        )
    if not jnp.issubdtype(initial_state.dtype, jnp.floating):
        raise ValueError(
            f"initial_state has dtype {initial_state.dtype}; it must be floating, as float32."
        )
