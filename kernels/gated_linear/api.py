"""Gated linear attention: the public operation, its rules and its checks."""

from jaxtyping import Array, Float, Int

from kernels import checks, dispatch
from kernels import segments as packed


def gated_linear(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H K"] | Float[Array, "B T H"] | Float[Array, " H"],
    *,
    bonus: Float[Array, "H K"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    scale: float | None = None,
    impl: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """S_t = diag(exp g_t) S_{t-1} + k_t v_t^T;  o_t = scale q_t^T S_t.  Returns (o, S_T).

    H is a multiple of G: the heads of a group share q and k. The gate g is a vector a head
    (GLA, arXiv:2312.06635, eq. 3), a scalar a head (Mamba-2, arXiv:2405.21060, eq. 16, where
    q, k, v are C, B and dt x) or a constant a head (RetNet, arXiv:2307.08621, eq. 5).

    With a bonus u a token reads before its gate and its write act, and weighs its own write by u:
    o_t = scale q_t^T (S_{t-1} + diag(u) k_t v_t^T) (RWKV-5 and 6, arXiv:2404.05892, section 4).

    log_decay must be <= 0, which cannot be checked under jit; a positive gate gives wrong or
    infinite numbers. Any finite gate is safe, forward and backward: nothing divides by a decay.
    scale=None is K**-0.5. The state is float32 (float64 for float64 inputs), the output has v's
    dtype. Differentiable (reverse mode) in every array but segments. Raises ValueError on shapes
    that do not fit.
    """
    check_heads(q, k, v)
    check_gate(log_decay, q, v, constant=True)
    check_state(initial_state, q, v)
    checks.shaped("bonus", bonus, "(H, K)", (v.shape[2], q.shape[3]))
    packed.check(segments, q.shape[0], q.shape[1])
    run = dispatch.choose("gated_linear", "gated_linear", impl)
    return run(
        *(q, k, v, log_decay),
        bonus=bonus,
        segments=segments,
        initial_state=initial_state,
        scale=scale,
    )


def check_heads(q: Array, k: Array, v: Array) -> None:
    """Raise unless q and k are (B, T, G, K), v is (B, T, H, V), T >= 1 and G divides H."""
    for name, array in (("q", q), ("k", k), ("v", v)):
        checks.rank(name, array, "(batch, time, heads, dim)")
    if k.shape != q.shape:
        raise ValueError(f"k has shape {k.shape}; it must be q's shape, {q.shape}.")
    if v.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"v has (batch, time) {v.shape[:2]}; it must be q's and k's {q.shape[:2]}."
        )
    if 0 in q.shape or 0 in v.shape:
        raise ValueError(
            f"q has shape {q.shape} and v {v.shape}; every size, time included, must be at least 1."
        )
    groups, heads = q.shape[2], v.shape[2]
    if heads % groups:
        nearest = max(round(heads / groups), 1) * groups
        raise ValueError(
            f"v has {heads} heads and q and k have {groups}; v's must be a multiple of theirs; "
            f"the nearest is {nearest}."
        )


def check_gate(log_decay: Array, q: Array, v: Array, *, constant: bool) -> None:
    """Raise unless log_decay is (B, T, H, K), (B, T, H) or, where `constant` allows it, (H,)."""
    batch, length, heads = v.shape[:3]
    legal = [(batch, length, heads, q.shape[3]), (batch, length, heads)]
    if constant:
        legal.append((heads,))
    if log_decay.shape not in legal:
        listed = ", ".join(str(shape) for shape in legal[:-1])
        raise ValueError(
            f"log_decay has shape {log_decay.shape}; it must be {listed} or {legal[-1]}."
        )
    checks.floating("log_decay", log_decay)


def check_state(initial_state: Array | None, q: Array, v: Array) -> None:
    """Raise unless the state is None or a floating (B, H, K, V)."""
    legal = (v.shape[0], v.shape[2], q.shape[3], v.shape[3])
    checks.shaped("initial_state", initial_state, "(B, H, K, V)", legal)
