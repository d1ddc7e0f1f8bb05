"""The selective scan: the public operation, its rules and its checks."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import dispatch
from kernels import segments as packed


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
    impl: str | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """h_t = exp(dt_t A) * h_{t-1} + dt_t x_t Bm_t;  y_t = h_t Cm_t + D x_t.  Returns (y, h_T).

    h_t (D, N) holds N numbers a channel; Bm_t and Cm_t (N,) are shared by all channels, dt_t (D,)
    by all numbers of a channel. Mamba (arXiv:2312.00752, eq. 2), with A by zero-order hold (eq. 4)
    and, as in its own programs, B by Euler's step. The step sizes are used as they are: softplus,
    gate and projections are the caller's.

    dt must be >= 0 and A <= 0, which cannot be checked under jit; any such decay is safe, however
    strong. The state is float32 (float64 for float64 inputs), y has x's dtype. Differentiable
    (reverse mode) in every array, through y and h_T; no form keeps the states of all tokens. A row
    of padding alone returns its initial state. Raises ValueError on shapes that do not fit.
    """
    _check_inputs(x, dt, A, Bm, Cm, D)
    batch, length, width = x.shape
    if initial_state is not None:
        _check("initial_state", initial_state, (batch, width, A.shape[1]), "(B, D, N)")
    packed.check(segments, batch, length)
    run = dispatch.choose("selective_scan", "selective_scan", impl)
    return run(x, dt, A, Bm, Cm, D, segments=segments, initial_state=initial_state)


def _check_inputs(x, dt, A, Bm, Cm, D):
    for name, array, rank, letters in (
        ("x", x, 3, "(batch, time, width)"),
        ("A", A, 2, "(width, state)"),
    ):
        if array.ndim != rank:
            raise ValueError(
                f"{name} has shape {array.shape}, rank {array.ndim}; "
                f"it must have rank {rank}: {letters}."
            )
        if 0 in array.shape:
            raise ValueError(
                f"{name} has shape {array.shape}; every size, time included, must be at least 1."
            )
    batch, length, width = x.shape
    state = A.shape[1]
    _check("x", x, x.shape, "(B, T, D)")
    _check("dt", dt, x.shape, "x's shape (B, T, D)")
    _check("A", A, (width, state), "(D, N)")
    _check("Bm", Bm, (batch, length, state), "(B, T, N)")
    _check("Cm", Cm, (batch, length, state), "(B, T, N)")
    if D is not None:
        _check("D", D, (width,), "(D,)")


def _check(name, array, legal, letters):
    """Raise unless `array` is a floating array of the shape `legal`."""
    if array.shape != legal:
        raise ValueError(f"{name} has shape {array.shape}; it must be {letters} = {legal}.")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} has dtype {array.dtype}; it must be floating, as float32.")
