"""The selective scan: the public operation, its rules and its checks."""

from jaxtyping import Array, Float, Int

from kernels import checks, dispatch
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
    checks.shaped("initial_state", initial_state, "(B, D, N)", (batch, width, A.shape[1]))
    packed.check(segments, batch, length)
    run = dispatch.choose("selective_scan", "selective_scan", impl)
    return run(x, dt, A, Bm, Cm, D, segments=segments, initial_state=initial_state)


def _check_inputs(x, dt, A, Bm, Cm, D):
    checks.whole("x", x, "(batch, time, width)")
    checks.whole("A", A, "(width, state)")
    batch, length, width = x.shape
    state = A.shape[1]
    checks.shaped("dt", dt, "x's shape (B, T, D)", x.shape)
    checks.shaped("A", A, "(D, N)", (width, state))
    checks.shaped("Bm", Bm, "(B, T, N)", (batch, length, state))
    checks.shaped("Cm", Cm, "(B, T, N)", (batch, length, state))
    checks.shaped("D", D, "(D,)", (width,))
