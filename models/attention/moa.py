"""Mixture of attention heads: a token chooses its query and output maps, keys are shared.

MoA (arXiv 2210.05144, section 3) and its form with several heads an expert, as in JetMoE
(2404.07413, section 2). Notable: the cache is that of kv_heads heads, whatever the number of
experts; an expert's head h reads key head h. The weights of the chosen sum to 1 (eq. 4 of MoA,
whose divisor is cut from the gradient: here it is not); losses are Switch's balance and ST-MoE's z.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels.attention import attention, cached_attention
from kernels.grouped_matmul import grouped_matmul
from models import auxiliary, cache, checks, layers, mixer, weights
from models.parts import routing


@dataclasses.dataclass
class Config:
    """Experts of kv_heads query heads each, of which a token has top_k."""

    experts: int = 8
    top_k: int = 2
    kv_heads: int = 2  # heads of an expert, whose keys and values all experts share
    head_dim: int = 0  # 0: width / (top_k * kv_heads)
    window: int = 0  # tokens that a query sees, itself included; 0: all
    rope_base: float = 10_000.0  # 0: no positions
    balance: float = 1e-2  # coefficient of the loss that evens the load
    z: float = 1e-3  # coefficient of the loss that keeps logits small

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where experts, heads and width do not fit."""
        return Mixer(self, width, rngs)


CASES = {"moa": Config()}


class Mixer(mixer.Mixer):
    """y_t = sum over the chosen e of w_te attention(x_t Q_e, x K, x V) O_e."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        routing.check(config.experts, config.top_k)
        heads = config.kv_heads
        if heads < 1:
            raise ValueError(f"kv_heads={heads} must be at least 1. Use 1.")
        dim = config.head_dim or checks.split_heads(width, config.top_k * heads, "top_k * kv_heads")
        if config.rope_base:
            checks.pairs(dim)
        checks.window(config.window)
        self.router = weights.inward(rngs, width, (config.experts,), ("experts",))
        shape, dims = (config.experts, width, heads, dim), ("experts", "embed", "heads", "key")
        share = config.top_k / config.experts
        self.q = weights.weight(rngs, weights.fan_in(width), shape, dims, share)
        self.kv = weights.inward(rngs, width, (2, heads, dim), ("parts", "heads", "key"))
        shape, dims = (config.experts, heads, dim, width), ("experts", "heads", "key", "embed")
        self.o = weights.weight(rngs, weights.fan_in(heads, dim), shape, dims, share)
        self.top_k, self.window, self.rope_base = config.top_k, config.window, config.rope_base
        self.balance, self.z = config.balance, config.z

    def __call__(self, x, *, segments=None, state=None):
        old = state or self.init_state(x.shape[0], x.shape[1], x.dtype)
        positions_BT = cache.positions(old["length"], segments, x.shape[1])
        weight_BTJ, expert_BTJ = self._route(x, segments)
        plan = routing.plan(expert_BTJ, self.router.shape[1])
        q_BTHK = self._queries(x, plan)
        kv_BTPGK = weights.project("btd,dpgk->btpgk", x, self.kv)
        k_BTGK, v_BTGK = kv_BTPGK[:, :, 0], kv_BTPGK[:, :, 1]
        if self.rope_base:
            q_BTHK = layers.rotary(q_BTHK, positions_BT, self.rope_base)
            k_BTGK = layers.rotary(k_BTGK, positions_BT, self.rope_base)
        o_BTHK, new = cache.attend(
            {"k": k_BTGK, "v": v_BTGK},
            old,
            positions_BT,
            segments,
            training=state is None,
            alone=lambda: attention(q_BTHK, k_BTGK, v_BTGK, segments=segments, window=self.window),
            beside=lambda seen, **where: cached_attention(
                q_BTHK, seen["k"], seen["v"], window=self.window, **where
            ),
        )
        return self._outputs(o_BTHK, weight_BTJ, plan), new

    def _route(self, x, segments):
        """Weights that sum to 1, and experts; the losses and metrics of the router."""
        real_BT = routing.real(segments, x)
        logits_BTE = routing.logits(x, self.router)
        probs_BTE = jax.nn.softmax(logits_BTE)
        weight_BTJ, expert_BTJ = routing.choose(probs_BTE, self.top_k, real_BT)
        auxiliary.loss("balance", self.balance * routing.balance(probs_BTE, expert_BTJ, real_BT))
        auxiliary.loss("z", self.z * routing.z(logits_BTE, real_BT))
        routing.measure(probs_BTE, routing.hot(expert_BTJ, probs_BTE.shape[2]), real_BT)
        return weight_BTJ / weight_BTJ.sum(-1, keepdims=True), expert_BTJ

    def _queries(self, x, plan):
        """Queries (B, T, G J, K): the heads that read one key head lie side by side."""
        experts, width, heads, dim = self.q.shape
        rows = routing.spread(x.reshape(-1, width), plan)
        q_EDN = self.q[...].astype(x.dtype).reshape(experts, width, heads * dim)
        q_MN = routing.restore(grouped_matmul(rows, q_EDN, plan.sizes), plan)
        q_BTJGK = q_MN.reshape(*x.shape[:2], self.top_k, heads, dim)
        return q_BTJGK.swapaxes(2, 3).reshape(*x.shape[:2], -1, dim)

    def _outputs(self, o_BTHK, weight_BTJ, plan):
        """What each chosen expert read through its output map, summed by weight."""
        experts, heads, dim, width = self.o.shape
        o_BTGJK = o_BTHK.reshape(*weight_BTJ.shape[:2], heads, self.top_k, dim)
        rows = routing.spread(o_BTGJK.swapaxes(2, 3).reshape(-1, heads * dim), plan)
        o_END = self.o[...].astype(rows.dtype).reshape(experts, heads * dim, width)
        return routing.weighted(grouped_matmul(rows, o_END, plan.sizes), weight_BTJ, plan)

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """An empty ring of `capacity` (at most `window`) slots."""
        slots, shape = min(capacity, self.window or capacity), self.kv.shape[2:]
        return cache.empty(batch, slots, dtype, k=shape, v=shape)
