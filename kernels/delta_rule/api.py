"""The (gated) delta rule and its relative with two free vectors: rules and checks."""

from jaxtyping import Array, Float, Int

from kernels import checks, dispatch
from kernels import segments as packed
from kernels.gated_linear.api import check_gate, check_heads, check_state


def delta_rule(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H K"] | Float[Array, "B T H"] | None = None,
    *,
    segments: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    scale: float | None = None,
    impl: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """S' = diag(exp g_t) S_{t-1}; S_t = S' + beta_t k_t (v_t - S'^T k_t)^T; o_t = scale q_t^T S_t.

    Returns (o, S_T). H is a multiple of G: the heads of a group share q and k. No gate is DeltaNet
    (arXiv:2406.06484, eq. 4), a scalar gate Gated DeltaNet (arXiv:2412.06464, eq. 10), a vector
    gate Kimi Delta Attention (arXiv:2510.26692, eq. 1).

    Keys are taken as they come: normalise them before the call. With beta |k|^2 above 2 the
    recurrence itself grows without bound. log_decay must be <= 0 and beta finite, which cannot be
    checked under jit. Any finite gate is safe, forward and backward: nothing divides by a decay.
    scale=None is K**-0.5. The state is float32 (float64 for float64 inputs), the output has v's
    dtype. Differentiable (reverse mode) in every array but segments. Raises ValueError on shapes
    that do not fit.
    """
    check_heads(q, k, v)
    if beta.shape != v.shape[:3]:
        raise ValueError(f"beta has shape {beta.shape}; it must be v's (B, T, H), {v.shape[:3]}.")
    if log_decay is not None:
        check_gate(log_decay, q, v, constant=False)
    check_state(initial_state, q, v)
    packed.check(segments, q.shape[0], q.shape[1])
    run = dispatch.choose("delta_rule", "delta_rule", impl)
    return run(
        q, k, v, beta, log_decay, segments=segments, initial_state=initial_state, scale=scale
    )


def dplr(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    a: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    log_decay: Float[Array, "B T H K"],
    *,
    segments: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    scale: float | None = None,
    impl: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """S_t = diag(exp g_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T;  o_t = scale q_t^T S_t.

    Returns (o, S_T). The transition is diagonal plus low rank: RWKV-7 (arXiv:2503.14456) has
    a = -kappa and b = kappa eta, Comba (arXiv:2506.02475) erases with another strength than it
    writes. a reads the state before the gate closes, so `delta_rule` is a = exp(g) k, b = -beta k
    and the written key beta k.

    With |b^T a| large the recurrence itself grows without bound. log_decay must be <= 0, which
    cannot be checked under jit. Any finite gate is safe, forward and backward: nothing divides by a
    decay. scale=None is K**-0.5. The state is float32 (float64 for float64 inputs), the output has
    v's dtype. Differentiable (reverse mode) in every array but segments. Raises ValueError on
    shapes that do not fit.
    """
    check_heads(q, k, v)
    if v.shape[2] != q.shape[2]:
        raise ValueError(
            f"v has {v.shape[2]} heads and q and k have {q.shape[2]}; "
            f"dplr shares none, so v must have {q.shape[2]}."
        )
    for name, array in (("a", a), ("b", b), ("log_decay", log_decay)):
        checks.like(name, array, "q", q)
    check_gate(log_decay, q, v, constant=False)
    check_state(initial_state, q, v)
    packed.check(segments, q.shape[0], q.shape[1])
    run = dispatch.choose("delta_rule", "dplr", impl)
    return run(
        q, k, v, a, b, log_decay, segments=segments, initial_state=initial_state, scale=scale
    )
