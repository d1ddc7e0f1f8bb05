"""DeepSeek sparse attention: a small indexer scores every earlier token; the best ones are read.

DeepSeek-V3.2 (arXiv 2512.02556, section 2, eq. 1 and 2). Notable: the indexer is cheap (few narrow
heads, one key a token, ReLU in place of softmax) and learns by imitation alone: its input is
detached, and KL between the attention over what was chosen and its own softmax is the loss
"indexer". Here whole blocks are chosen, each by its best token, because tokens gathered one by one
leave matrix units idle; block=1 chooses tokens as the paper does. The query's own block is always
one of the `top`. The indexer works in float32 and its keys are kept so. Attention has grouped heads
in place of the paper's latent ones; so the indexer's queries come from x, where the released ones
come from the latent queries, and all of their numbers are turned.
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
    """The paper reads 2048 tokens, with an indexer of 64 heads of 128."""

    top: int = 4  # blocks that a query reads, its own included
    index_heads: int = 4
    index_dim: int = 16
    imitation: float = 1.0  # weight of the indexer's loss (0: none), of calls without a state

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where a count or the heads do not fit."""
        return Mixer(self, width, rngs)


CASES = {"dsa": Config()}


class Mixer(sparse_heads.Attention):
    """I_ts = sum_j w_tj relu(q'_tj . k'_s); the blocks with the greatest max_s I_ts are read."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        super().__init__(config, width, rngs)
        sparse_heads.at_least("top", config.top, 1)
        sparse_heads.at_least("index_heads", config.index_heads, 1)
        heads, dim = config.index_heads, config.index_dim
        if dim < 2 or dim % 2:
            near = max(2, dim + dim % 2)
            raise ValueError(f"index_dim={dim} is no even number from 2. Use {near}.")
        if config.imitation < 0:
            raise ValueError(f"imitation={config.imitation} is negative. Use 0 (no loss) or more.")
        self.index_q = weights.inward(rngs, width, (heads, dim), ("heads", "key"))
        self.index_k = weights.inward(rngs, width, (dim,), ("key",))
        self.index_w = weights.inward(rngs, width, (heads,), ("heads",))
        self.norm = weights.filled(rngs, 1.0, (dim,), ("key",))
        self.norm_bias = weights.filled(rngs, 0.0, (dim,), ("key",))
        self.top, self.imitation = config.top, config.imitation

    def __call__(self, x, *, segments=None, state=None):
        positions_BT = self.positions(x, segments, state)
        q_BTHK, k_BTGK, v_BTGK = self.heads_of(x, positions_BT)
        exact = jax.lax.stop_gradient(x).astype(mixer.wide(x.dtype))
        q_BTJE = weights.project("btd,dje->btje", exact, self.index_q)
        k_BTE = weights.project("btd,de->bte", exact, self.index_k)
        k_BTE = layers.layer_norm(k_BTE, self.norm[...], self.norm_bias[...], eps=1e-6)
        if self.rope_base:
            q_BTJE = layers.rotary(q_BTJE, positions_BT, self.rope_base)
            k_BTE = layers.rotary(k_BTE[:, :, None], positions_BT, self.rope_base)[:, :, 0]
        w_BTJ = weights.project("btd,dj->btj", exact, self.index_w)
        w_BTJ = w_BTJ * (q_BTJE.shape[2] * q_BTJE.shape[3]) ** -0.5
        queries = {"q": q_BTHK, "index": q_BTJE, "weights": w_BTJ}
        tokens = {"k": k_BTGK, "v": v_BTGK}
        return self.attend(queries, tokens, segments, state, sums={"index": k_BTE}, unit=1)

    def read(self, queries, keys, row, training=False):
        def scores(row, q_BTJE, w_BTJ):
            return self._scores(row, q_BTJE, w_BTJ, keys["index"])

        def choose(row, *given):
            return chosen_blocks.top(row.own_first(scores(row, *given)), self.top)

        given = queries["index"], queries["weights"]
        lists_BTLM = row.in_chunks(choose, *given)
        if training and self.imitation:
            q, k = jax.lax.stop_gradient((queries["q"], keys["k"]))
            loss = sparse_heads.imitation(row, q, k, lists_BTLM, scores, *given)
            auxiliary.loss("indexer", self.imitation * loss)
        return row.chosen(queries["q"], keys["k"], keys["v"], lists_BTLM.swapaxes(1, 2))

    def _scores(self, row, q_BTJE, w_BTJ, k_BSE) -> Array:
        """(B, T, 1, N): the best token's score of each earlier block, -inf for all others."""
        relu_BTJS = jax.nn.relu(jnp.einsum("btje,bse->btjs", q_BTJE, k_BSE))
        s_BTS = jnp.einsum("btj,btjs->bts", w_BTJ, relu_BTJS)
        s_BTN = rearrange(s_BTS, "b t (n s) -> b t n s", s=self.block).max(-1)
        before_BTN = row.earlier(s_BTN.shape[-1])
        return jnp.where(before_BTN, s_BTN, -jnp.inf)[:, :, None]

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Keys and values of a document of `capacity` tokens, and the indexer's keys."""
        tokens = {"k": self.head_shape, "v": self.head_shape}
        index = {"index": self.norm.shape}
        return aligned.empty(batch, capacity, self.block, dtype, tokens, index, unit=1)
