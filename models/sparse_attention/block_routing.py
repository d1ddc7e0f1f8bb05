"""Block routing: a learned gate compares each query with pooled keys and picks the blocks to read.

SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs (arXiv 2410.13276, eq. 2 to 5).
Notable: the gate has weights of its own on queries and keys before their rotation, and learns by
imitation: KL between the attention over the chosen blocks and the gate's softmax is the loss
"gate". Deviations: a gate a group of heads, and a choice a token instead of a pooled block of
queries, which could not be decoded; keys are pooled by their mean alone (the paper joins maximum
and minimum), so that a block's sum grows token by token; the gate trains beside the model, not
after it, and on the chosen blocks alone. The gate works in float32.
"""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from models import auxiliary, layers, mixer, weights
from models.parts import aligned, chosen_blocks, sparse_heads


@dataclasses.dataclass
class Config(sparse_heads.Settings):
    """The paper's blocks have 64 tokens."""

    kv_heads: int = 2
    top: int = 4  # blocks that a query reads, its own included
    gate_dim: int = 16
    imitation: float = 1.0  # weight of the gate's loss (0: none), of calls without a state

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where a count or the heads do not fit."""
        return Mixer(self, width, rngs)


CASES = {"block_routing": Config()}


class Mixer(sparse_heads.Attention):
    """s_j = rope(W_q q) . rope(W_k mean(k of block j)) / sqrt(E); the best blocks are read."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        super().__init__(config, width, rngs)
        sparse_heads.at_least("top", config.top, 1)
        inner = config.gate_dim
        if inner < 2 or inner % 2:
            near = max(2, inner + inner % 2)
            raise ValueError(f"gate_dim={inner} is no even number from 2. Use {near}.")
        if config.imitation < 0:
            raise ValueError(f"imitation={config.imitation} is negative. Use 0 (no loss) or more.")
        groups, dim = self.head_shape
        each = config.heads // groups
        shared = "heads" if groups > 1 else "groups"
        init = weights.fan_in(each, dim)
        names = (shared, "parts", "key", "rank")
        self.gate_q = weights.weight(rngs, init, (groups, each, dim, inner), names)
        self.gate_k = weights.weight(
            rngs, weights.fan_in(dim), (groups, dim, inner), (shared, "key", "rank")
        )
        self.top, self.imitation = config.top, config.imitation

    def __call__(self, x, *, segments=None, state=None):
        positions_BT = self.positions(x, segments, state)
        q_BTHK, k_BTGK, v_BTGK = self.heads_of(x, positions_BT)
        exact = x.astype(mixer.wide(x.dtype))
        gate_q_BTGE, gate_k_BTGE = self._gate(exact, positions_BT)
        queries = {"q": q_BTHK, "gate": gate_q_BTGE}
        tokens = {"k": k_BTGK, "v": v_BTGK}
        return self.attend(queries, tokens, segments, state, sums={"gate_sum": gate_k_BTGE})

    def _gate(self, exact_BTD, positions_BT) -> tuple[Array, Array]:
        """The gate's queries and keys (B, T, G, E), made of detached queries and keys."""
        q_BTHK = weights.project("btd,dhk->bthk", exact_BTD, self.q)
        kv_BTPGK = weights.project("btd,dpgk->btpgk", exact_BTD, self.kv)
        q_BTHK, kv_BTPGK = jax.lax.stop_gradient((q_BTHK, kv_BTPGK))
        q_BTGRK = rearrange(q_BTHK, "b t (g r) k -> b t g r k", g=self.head_shape[0])
        q_BTGE = weights.project("btgrk,grke->btge", q_BTGRK, self.gate_q)
        k_BTGE = weights.project("btgk,gke->btge", kv_BTPGK[:, :, 0], self.gate_k)
        if self.rope_base:
            # One angle a block: to rotate each key so is to rotate their mean.
            start_BT = positions_BT // self.block * self.block
            q_BTGE = layers.rotary(q_BTGE, positions_BT, self.rope_base)
            k_BTGE = layers.rotary(k_BTGE, start_BT, self.rope_base)
        return q_BTGE, k_BTGE

    def read(self, queries, keys, row, training=False):
        mean_BNGE = keys["gate_sum"] / self.block

        def scores(row, q_BTGE):
            s_BTGN = jnp.einsum("btge,bnge->btgn", q_BTGE, mean_BNGE) * q_BTGE.shape[3] ** -0.5
            before_BTN = row.earlier(mean_BNGE.shape[1])
            return jnp.where(before_BTN[:, :, None], s_BTGN, -jnp.inf)

        def choose(row, q_BTGE):
            return chosen_blocks.top(row.own_first(scores(row, q_BTGE)), self.top)

        lists_BTGM = row.in_chunks(choose, queries["gate"])
        if training and self.imitation:
            q, k = jax.lax.stop_gradient((queries["q"], keys["k"]))
            loss = sparse_heads.imitation(row, q, k, lists_BTGM, scores, queries["gate"])
            auxiliary.loss("gate", self.imitation * loss)
        return row.chosen(queries["q"], keys["k"], keys["v"], lists_BTGM.swapaxes(1, 2))

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Keys and values of a document of `capacity` tokens, and sums of the gate's keys."""
        tokens = {"k": self.head_shape, "v": self.head_shape}
        sums = {"gate_sum": (self.head_shape[0], self.gate_k.shape[2])}
        return aligned.empty(batch, capacity, self.block, dtype, tokens, sums)
