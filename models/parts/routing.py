"""What mixtures of experts share: the rows of each expert, what it makes of them, what is reported.

Choices are (B, T, J), the J experts of each token; the number E, one more than the last expert,
says none: padding and dropped choices. Routers compute in `mixer.wide`, where ties are rare.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from kernels import segments as boundaries
from kernels.grouped_matmul import grouped_matmul
from models import auxiliary, mixer, weights


def check(experts: int, top_k: int) -> None:
    """ValueError unless a token can have `top_k` different experts of `experts`."""
    if experts < 2:
        raise ValueError(f"experts={experts} is no mixture. Use at least 2.")
    if not 1 <= top_k <= experts:
        near = min(max(top_k, 1), experts)
        raise ValueError(f"top_k={top_k} is not from 1 to experts={experts}. Use {near}.")


def hidden_units(hidden: int, width: int, numerator: int, denominator: int) -> int:
    """`hidden`, or for 0 this fraction of the width rounded up to a multiple of 16."""
    if hidden < 0:
        raise ValueError(
            f"hidden={hidden} is negative. Use 0 (in proportion to the width) or more."
        )
    return hidden or -(-numerator * width // (16 * denominator)) * 16


def logits(x: Float[Array, "B T D"], w: nnx.Param) -> Float[Array, "B T E"]:
    """x w in the wide dtype and full precision: a rounded router would choose other experts."""
    wide = mixer.wide(x.dtype)
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("btd,de->bte", x.astype(wide), w[...].astype(wide), precision=highest)


def real(segments: Int[Array, "B T"] | None, x: Float[Array, "B T D"]) -> Bool[Array, "B T"]:
    """True where a token is no padding."""
    return jnp.ones(x.shape[:2], bool) if segments is None else boundaries.is_real(segments)


def choose(
    scores_BTE: Float[Array, "B T E"], top_k: int, real_BT: Bool[Array, "B T"]
) -> tuple[Float[Array, "B T J"], Int[Array, "B T J"]]:
    """The highest scores of each token and their experts; padding chooses none."""
    score_BTJ, expert_BTJ = jax.lax.top_k(scores_BTE, top_k)
    expert_BTJ = jnp.where(real_BT[..., None], expert_BTJ, scores_BTE.shape[-1])
    return score_BTJ, expert_BTJ.astype(jnp.int32)


def hot(expert_BTJ: Int[Array, "B T J"], experts: int) -> Int[Array, "B T E"]:
    """1 where a token chose an expert."""
    chosen_BTJE = expert_BTJ[..., None] == jnp.arange(experts)
    return jnp.sum(chosen_BTJE, axis=2, dtype=jnp.int32)


class Plan(NamedTuple):
    """The choices sorted by expert: `order` lists them, `inverse` is where each one went."""

    order: Int[Array, " M"]
    inverse: Int[Array, " M"]
    sizes: Int[Array, " E"]


def plan(expert_BTJ: Int[Array, "B T J"], experts: int) -> Plan:
    """Choices of none come last, beyond all groups."""
    expert_M = expert_BTJ.reshape(-1)
    order = jnp.argsort(expert_M, stable=True).astype(jnp.int32)
    index = jnp.arange(order.size, dtype=jnp.int32)
    inverse = jnp.zeros_like(order).at[order].set(index, unique_indices=True)
    return Plan(order, inverse, hot(expert_BTJ, experts).sum((0, 1)))


@jax.custom_vjp
def spread(x_ND: Float[Array, "N D"], plan: Plan) -> Float[Array, "M D"]:
    """Row x_n once for each of its M / N choices, in the order of the plan."""
    return x_ND[plan.order // (plan.order.size // x_ND.shape[0])]


def _spread_backward(residuals, dy_MD):
    """A gather and a sum of M / N neighbours: no scatter, so that equal runs have equal bits."""
    plan, rows = residuals
    return dy_MD[plan.inverse].reshape(rows, -1, dy_MD.shape[1]).sum(1), None


spread.defvjp(lambda x, plan: (spread(x, plan), (plan, x.shape[0])), _spread_backward)


@jax.custom_vjp
def restore(y_MD: Float[Array, "M D"], plan: Plan) -> Float[Array, "M D"]:
    """Rows in the order of the choices again."""
    return y_MD[plan.inverse]


restore.defvjp(lambda y, plan: (restore(y, plan), plan), lambda plan, dy: (dy[plan.order], None))


def weighted(
    y_MD: Float[Array, "M D"], weight_BTJ: Float[Array, "B T J"], plan: Plan
) -> Float[Array, "B T D"]:
    """y_t = sum_j weight_tj y_(t,j) of sorted rows y."""
    y_BTJD = restore(y_MD, plan).reshape(*weight_BTJ.shape, -1)
    return jnp.einsum("btj,btjd->btd", weight_BTJ.astype(y_MD.dtype), y_BTJD)


class Experts(nnx.Module):
    """y_t = sum_j weight_tj f_e(x_t), e = expert_tj, f_e(x) = act(x W_e) V_e.

    Where `gated`, f_e(x) = (act(x G_e) * x W_e) V_e (SwiGLU with silu). `share` is the share of
    the experts that a token has on average.
    """

    def __init__(
        self,
        experts: int,
        width: int,
        hidden: int,
        rngs: nnx.Rngs,
        *,
        activation: Callable[[jax.Array], jax.Array],
        gated: bool,
        share: float,
    ):
        def inward():
            shape, dims = (experts, width, hidden), ("experts", "embed", "channels")
            return weights.weight(rngs, weights.fan_in(width), shape, dims, share)

        self.up = inward()
        self.gate = inward() if gated else None
        shape, dims = (experts, hidden, width), ("experts", "channels", "embed")
        self.down = weights.weight(rngs, weights.fan_in(hidden), shape, dims, share)
        self.activation = activation

    def __call__(
        self,
        x: Float[Array, "B T D"],
        expert_BTJ: Int[Array, "B T J"],
        weight_BTJ: Float[Array, "B T J"],
    ) -> Float[Array, "B T D"]:
        """Each token through the experts that it chose."""
        by_expert = plan(expert_BTJ, self.up.shape[0])
        rows = spread(x.reshape(-1, x.shape[-1]), by_expert)
        return weighted(self.rows(rows, by_expert.sizes), weight_BTJ, by_expert)

    def rows(self, x_MD: Float[Array, "M D"], sizes: Int[Array, " E"]) -> Float[Array, "M D"]:
        """f_e of rows sorted by expert, sizes[e] rows for e; zero beyond them."""
        dtype = x_MD.dtype
        hidden = grouped_matmul(x_MD, self.up[...].astype(dtype), sizes)
        if self.gate is None:
            hidden = self.activation(hidden)
        else:
            gate = grouped_matmul(x_MD, self.gate[...].astype(dtype), sizes)
            hidden = self.activation(gate) * hidden
        return grouped_matmul(hidden, self.down[...].astype(dtype), sizes)


def mean(value_BT: Float[Array, "B T *rest"], real_BT: Bool[Array, "B T"]) -> Float[Array, "*rest"]:
    """The mean over real tokens; 0 where there is none."""
    real_BT = real_BT.reshape(*real_BT.shape, *(1,) * (value_BT.ndim - 2))
    total = jnp.sum(jnp.where(real_BT, value_BT, 0), axis=(0, 1))
    return total / jnp.maximum(jnp.sum(real_BT), 1).astype(total.dtype)


def balance(
    probs_BTE: Float[Array, "B T E"],
    expert_BTJ: Int[Array, "B T J"],
    real_BT: Bool[Array, "B T"],
) -> Float[Array, ""]:
    """E sum_e f_e P_e, 1 when even (arXiv 2101.03961, eq. 4).

    f_e is the share of the choices that were e, P_e the mean probability of e.
    """
    experts = probs_BTE.shape[-1]
    hot_BTE = hot(expert_BTJ, experts).astype(probs_BTE.dtype)
    share_E = mean(hot_BTE, real_BT) / expert_BTJ.shape[2]
    return experts * jnp.sum(share_E * mean(probs_BTE, real_BT))


def z(logits_BTE: Float[Array, "B T E"], real_BT: Bool[Array, "B T"]) -> Float[Array, ""]:
    """The mean of logsumexp(logits)^2: keeps them small (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return mean(jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1)), real_BT)


def measure(
    probs_BTE: Float[Array, "B T E"],
    hot_BTE: Int[Array, "B T E"],
    real_BT: Bool[Array, "B T"],
    dropped: Float[Array, ""] | None = None,
) -> None:
    """Report how even the load is, the share of choices dropped, and the router's entropy in nats.

    load_max is the largest share of the choices times E, load_cv the coefficient of variation.
    """
    dtype = probs_BTE.dtype
    load_E = hot_BTE.sum((0, 1)).astype(dtype)
    load_E = load_E / jnp.maximum(load_E.mean(), jnp.finfo(dtype).tiny)
    log_BTE = jnp.log(jnp.maximum(probs_BTE, jnp.finfo(dtype).tiny))
    auxiliary.metric("load_max", load_E.max())
    auxiliary.metric("load_cv", load_E.std())
    auxiliary.metric("dropped", jnp.zeros((), dtype) if dropped is None else dropped)
    auxiliary.metric("entropy", mean(-jnp.sum(probs_BTE * log_BTE, axis=-1), real_BT))
