"""How alike two models' predictions are, how small one is, and how well it bears what is new."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Batch(NamedTuple):
    """Logits (..., V) of the original p and of the other model q on the same tokens.

    `mask` (...) is True where a position counts, so False at padding. `targets` (...) are the true
    next tokens; without them there is no perplexity.
    """

    p: Any
    q: Any
    mask: Any
    targets: Any = None


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """Means over all positions that count; p is the original model, q the other."""

    positions: int
    agreement: float  # share of positions with the same likeliest token: label loyalty
    kl: float  # KL(p || q) in nats
    kl_reverse: float  # KL(q || p) in nats
    loyalty: float  # 1 - sqrt(JSD(p, q)), base 2, in [0, 1]: probability loyalty
    perplexity_ratio: float | None  # perplexity of q over that of p; None without targets


def fidelity(batches: Iterable[Batch | tuple]) -> Fidelity:
    """Means over positions of [argmax p = argmax q], KL(p || q), KL(q || p), 1 - sqrt(JSD(p, q)).

    JSD(p, q) = KL(p || m) / 2 + KL(q || m) / 2 with m = (p + q) / 2 and logarithms of base 2, so
    that it lies in [0, 1] whatever V; computed in float32 (float64 if the logits are) and
    averaged in float64. Only one batch of logits is held at a time. Padding may hold anything;
    where q rules out a token that p allows, the divergence is infinite, and says so.

    Source: arXiv 2109.03228, section 3.1: label loyalty, the accuracy of the student against the
    teacher's labels, and probability loyalty, 1 - sqrt(JSD). Its authors' code takes natural
    logarithms, whose scale ends at 1 - sqrt(log 2) = 0.17, not at 0. There one label is predicted
    for a text; here one token at each position. The survey arXiv 2401.00625 counts loyalty, or
    fidelity, among the metrics of efficiency.
    """
    columns: list[np.ndarray] = []
    with_targets = set()
    for number, item in enumerate(batches):
        batch = Batch(*item)
        mask = _check(batch, number)
        with_targets.add(batch.targets is not None)
        p, q = jnp.asarray(batch.p), jnp.asarray(batch.q)
        targets = jnp.zeros(mask.shape, int) if batch.targets is None else batch.targets
        values = jnp.stack(_compare(p, q, jnp.where(mask, targets, 0)))
        columns.append(np.asarray(values, np.float64)[:, mask])
    counted = np.concatenate(columns, axis=1) if columns else np.zeros((6, 0))
    if not counted.size:
        raise ValueError("no position counts: there is no batch, or every mask is False.")
    if len(with_targets) > 1:
        raise ValueError("some batches have targets and some have none; give all or none.")
    if np.isnan(counted).any():
        raise ValueError("the logits of a position that counts hold NaN.")
    agreement, kl, kl_reverse, loyalty, loss_p, loss_q = counted.mean(axis=1).tolist()
    if with_targets == {False}:
        ratio = None
    elif math.isinf(loss_p):
        raise ValueError("p gives a target the probability 0; there is no ratio of perplexities.")
    else:
        with np.errstate(over="ignore"):  # beyond float64 it is infinite
            ratio = float(np.exp(loss_q - loss_p))
    return Fidelity(counted.shape[1], agreement, kl, kl_reverse, loyalty, ratio)


@jax.jit
def _compare(p: jax.Array, q: jax.Array, targets: jax.Array) -> tuple[jax.Array, ...]:
    """Per position: agreement, both divergences, loyalty, and both losses of the targets."""
    same = jnp.argmax(p, axis=-1) == jnp.argmax(q, axis=-1)
    dtype = jnp.promote_types(jnp.promote_types(p.dtype, q.dtype), jnp.float32)
    log_p, log_q = (jax.nn.log_softmax(logits.astype(dtype), axis=-1) for logits in (p, q))
    losses = [-jnp.take_along_axis(x, targets[..., None], axis=-1)[..., 0] for x in (log_p, log_q)]
    divergence = _jensen_shannon(log_p, log_q) / math.log(2)
    # Rounding alone leaves [0, 1], by a few units in the last place; NaN stays NaN.
    loyalty = 1 - jnp.sqrt(jnp.clip(divergence, 0, 1))
    return same.astype(dtype), _kl(log_p, log_q), _kl(log_q, log_p), loyalty, *losses


def _kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """sum p log(p / q) - p + q, whose every term is at least 0.

    The sum of q - p is 0 but for rounding, and that rounding is as large as the divergence of two
    models that are nearly equal: with it inside, the terms neither cancel nor go below 0.
    """
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    gap = log_p - log_q
    near = p * (jnp.expm1(-gap) + gap)
    terms = jnp.where(jnp.abs(gap) < 0.5, near, p * gap + (q - p))
    # A token that p rules out leaves q alone, though its gap may be infinite or undefined; and a
    # sum may still round below 0 by the last digit of a term.
    return jnp.maximum(jnp.where(p == 0, q, terms).sum(axis=-1), 0.0)


def _jensen_shannon(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """sum p log(p / m) + q log(q / m), halved, in nats; the same bits if p and q change places."""
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    gap = log_p - log_q
    to_p, to_q = p * _over_middle(gap), q * _over_middle(-gap)
    return (jnp.where(p == 0, 0.0, to_p) + jnp.where(q == 0, 0.0, to_q)).sum(axis=-1) / 2


def _over_middle(gap: jax.Array) -> jax.Array:
    """log(p / m) = log 2 - log(1 + exp(-gap)) for gap = log(p / q), exact near gap = 0."""
    near = -jnp.log1p(jnp.expm1(-jnp.clip(gap, -1, 1)) / 2)
    return jnp.where(jnp.abs(gap) < 1, near, math.log(2) - jnp.logaddexp(0.0, -gap))


def _check(batch: Batch, number: int) -> np.ndarray:
    """The mask, if all shapes and the targets that count are legal."""
    p, q = np.shape(batch.p), np.shape(batch.q)
    mask = np.asarray(batch.mask)
    if p != q or len(p) < 1 or mask.shape != p[:-1]:
        raise ValueError(f"batch {number}: logits {p} and {q}, mask {mask.shape} do not match.")
    if mask.dtype != bool:
        raise ValueError(
            f"batch {number}: the mask is {mask.dtype}; give bool, True where it counts."
        )
    if batch.targets is None:
        return mask
    targets = np.asarray(batch.targets)
    if targets.shape != mask.shape:
        raise ValueError(f"batch {number}: targets {targets.shape} for a mask {mask.shape}.")
    wrong = mask & ((targets < 0) | (targets >= p[-1]))
    if wrong.any():
        raise ValueError(
            f"batch {number}: target {targets[wrong][0]} is outside of 0 to {p[-1] - 1}."
        )
    return mask


def compression_ratio(original_bytes: float, compressed_bytes: float) -> float:
    """original_bytes / compressed_bytes: 4 for a model of a quarter of the size."""
    for name, value in (("original", original_bytes), ("compressed", compressed_bytes)):
        if not 0 < value < math.inf:
            raise ValueError(f"the {name} model has {value} bytes; it must have more than 0.")
    return original_bytes / compressed_bytes


def extrapolation(bits_by_length: Mapping[int, float], trained_length: int) -> dict[int, float]:
    """Loss at each longer length over the loss at the trained length: 1 where length costs nothing.

    `bits_by_length` are bits per byte of validation text (any loss in one unit will do) at the
    trained length and at 2, 4, ... times as much. Below 1 where the longer context still helps.
    """
    if trained_length not in bits_by_length:
        raise ValueError(
            f"no loss at the trained length {trained_length}: {_known(bits_by_length)}"
        )
    longer = sorted(length for length in bits_by_length if length > trained_length)
    if not longer:
        raise ValueError(
            f"no length is above the trained {trained_length}: {_known(bits_by_length)}"
        )
    base = _bits(bits_by_length, trained_length)
    return {length: _bits(bits_by_length, length) / base for length in longer}


def noise_growth(bits_by_noise: Mapping[float, float]) -> dict[float, float]:
    """bits(share) / bits(0) - 1 by share of corrupted tokens: 0.1 where the loss grew by 10 %."""
    if 0 not in bits_by_noise or len(bits_by_noise) < 2:
        raise ValueError(f"give the loss at share 0 and at one above: {_known(bits_by_noise)}")
    outside = [share for share in bits_by_noise if not 0 <= share <= 1]
    if outside:
        raise ValueError(f"a share of tokens lies in 0 to 1, not at {outside[0]}.")
    base = _bits(bits_by_noise, 0)
    return {s: _bits(bits_by_noise, s) / base - 1 for s in sorted(bits_by_noise) if s > 0}


def corrupt(
    tokens: Any, share: float, vocabulary: int, key: jax.Array, mask: Any = None
) -> jax.Array:
    """`tokens` with round(share * count) of those that count replaced, each by another of 0..V-1.

    Which ones is uniform over all positions where `mask` is True (all without one), and so is
    what stands there instead, never what stood there before. Only inputs should be corrupted: the
    targets of the loss stay as they were.
    """
    values = np.asarray(tokens)
    counts = np.ones(values.shape, bool) if mask is None else np.asarray(mask)
    if not 0 <= share <= 1:
        raise ValueError(f"share={share} must lie in 0 to 1.")
    if vocabulary < 2:
        raise ValueError(f"vocabulary={vocabulary} leaves no other token; 2 is the least.")
    if counts.shape != values.shape or counts.dtype != bool:
        raise ValueError(f"mask {counts.dtype}{counts.shape} must be bool{values.shape}.")
    wrong = counts & ((values < 0) | (values >= vocabulary))
    if wrong.any():
        raise ValueError(f"token {values[wrong][0]} is outside of 0 to {vocabulary - 1}.")
    which, other = jax.random.split(key)
    scores = jnp.where(counts, jax.random.uniform(which, values.shape), 2.0).ravel()
    place = jnp.argsort(jnp.argsort(scores)).reshape(values.shape)
    steps = jax.random.randint(other, values.shape, 1, vocabulary)
    chosen = place < round(share * int(counts.sum()))
    return jnp.where(chosen, (values + steps) % vocabulary, values)


def _bits(losses: Mapping[Any, float], at: float) -> float:
    value = losses[at]
    if not 0 < value < math.inf:
        raise ValueError(f"the loss at {at} is {value}; it must be above 0 and finite.")
    return value


def _known(losses: Mapping[Any, float]) -> str:
    return f"there is {', '.join(str(at) for at in sorted(losses)) or 'nothing'}."
