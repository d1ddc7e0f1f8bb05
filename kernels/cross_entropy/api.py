"""Cross-entropy fused with the output head: the public operation, its rules and its checks."""

from jaxtyping import Array, Float, Int

from kernels import checks, dispatch


def cross_entropy(
    x: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    softcap: float = 0.0,
    impl: str | None = None,
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """z = x head;  nll = logsumexp(z) - z[target];  total = sum(weights * nll).  Returns both.

    With softcap > 0 the logits are softcap * tanh(z / softcap) (Gemma 2, arXiv:2408.00118,
    section 2). In nats; total is a sum, so the mean is total / sum(weights). Both are float32
    (float64 for float64 inputs).

    `total` is differentiable (reverse mode) in x, head and weights; `nll` is a report and carries
    no gradient. A target must lie in [0, V) also where its weight is 0, which cannot be checked
    under jit: beyond V gives NaN. The logits never exist at once. Differentiating `total` costs
    the three matrix products of a plain loss, the gradients being formed in the forward pass; the
    TPU kernel keeps nothing of the logits and takes five.
    Raises ValueError on shapes and dtypes that do not fit and on a negative softcap.
    """
    check_inputs(x, head)
    check_tokens(targets, weights, x)
    if not softcap >= 0:
        raise ValueError(f"softcap is {softcap}; it must be 0 (off) or positive, as 30.0.")
    run = dispatch.choose("cross_entropy", "cross_entropy", impl)
    return run(x, head, targets, weights, softcap=float(softcap))


def check_inputs(x: Array, head: Array) -> None:
    """Raise unless x is floating (B, T, D) and head floating (D, V), without a zero size."""
    checks.whole("x", x, "(batch, time, width)")
    checks.whole("head", head, "(width, vocabulary)")
    if head.shape[0] != x.shape[2]:
        raise ValueError(
            f"head has shape {head.shape}; its first size must be x's width, {x.shape[2]}."
        )


def check_tokens(targets: Array, weights: Array, x: Array) -> None:
    """Raise unless targets are integers and weights floating, both (B, T) like x."""
    legal = x.shape[:2]
    for name, array in (("targets", targets), ("weights", weights)):
        if array.shape != legal:
            raise ValueError(
                f"{name} has shape {array.shape}; it must be x's (batch, time), {legal}."
            )
    checks.integer("targets", targets)
    checks.floating("weights", weights)
