"""The diagonal linear recurrences: the public operations, their rules and their checks."""

from jaxtyping import Array, Float, Int

from kernels import checks, dispatch
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
    checks.whole("x", x, "(batch, time, width)")
    checks.like("log_decay", log_decay, "x", x)
    checks.shaped("initial_state", initial_state, "(B, D)", (x.shape[0], x.shape[2]))
    packed.check(segments, x.shape[0], x.shape[1])
    run = dispatch.choose("linear_scan", "linear_scan", impl)
    return run(x, log_decay, segments=segments, initial_state=initial_state)


def complex_linear_scan(
    x_real: Float[Array, "B T D"],
    x_imag: Float[Array, "B T D"],
    log_decay: Float[Array, "B T D"] | Float[Array, " D"],
    phase: Float[Array, "B T D"] | Float[Array, " D"],
    *,
    segments: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B 2 D"] | None = None,
    impl: str | None = None,
) -> tuple[tuple[Float[Array, "B T D"], Float[Array, "B T D"]], Float[Array, "B 2 D"]]:
    """h_t = exp(log_decay_t + i phase_t) h_{t-1} + x_t, channel by channel, h and x complex.

    Returns ((real h, imaginary h), h_T): real arrays throughout, as TPU kernels know no complex
    numbers; a state holds its real part at [:, 0] and its imaginary part at [:, 1].

    The recurrence of LRU (arXiv:2303.06349, eq. 6), S5 (arXiv:2208.04933, eq. 6) and S4D
    (arXiv:2206.11893, eq. 3), whose factors are constant: log_decay and phase (D,), with
    exp(step * A) = exp(step * Re A + i step * Im A). They are held to more than float32's digits,
    so that thousands of steps do not drift. Factors (B, T, D) are for steps that depend on the
    data. Input matrices, input scaling and the projection of h to real numbers are the caller's.

    log_decay must be <= 0, which cannot be checked under jit; -inf forgets and has gradient zero.
    Phases are radians a step; from a thousand on they lose digits. The state is float32 (float64
    for float64 inputs), h has x_real's dtype. Differentiable (reverse mode) in every array, through
    h and h_T. A row of padding alone returns its initial state. Raises ValueError on shapes that do
    not fit.
    """
    checks.whole("x_real", x_real, "(batch, time, width)")
    checks.like("x_imag", x_imag, "x_real", x_real)
    legal = (x_real.shape, x_real.shape[2:])
    if log_decay.shape not in legal:
        raise ValueError(
            f"log_decay has shape {log_decay.shape}; it must be x_real's shape, {legal[0]}, or, "
            f"constant over time, {legal[1]}."
        )
    checks.floating("log_decay", log_decay)
    checks.like("phase", phase, "log_decay", log_decay)
    state = (x_real.shape[0], 2, x_real.shape[2])
    checks.shaped("initial_state", initial_state, "(B, 2, D)", state)
    packed.check(segments, x_real.shape[0], x_real.shape[1])
    run = dispatch.choose("linear_scan", "complex_linear_scan", impl)
    return run(x_real, x_imag, log_decay, phase, segments=segments, initial_state=initial_state)
