"""What attention to chosen blocks has in common: projections, rotary positions, state, refusals."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from models import checks, layers, mixer, weights
from models.parts import aligned, chosen_blocks


@dataclasses.dataclass
class Settings:
    """Heads, as in softmax attention, and the block that a choice is made of."""

    heads: int = 4
    kv_heads: int = 0  # 0: as many as heads
    head_dim: int = 0  # 0: width / heads
    block: int = 16  # tokens that are chosen together
    rope_base: float = 10_000.0  # 0: no positions


class Attention(mixer.Mixer):
    """o_t = softmax_s(q_t k_s / sqrt(K)) v_s over the chosen s, then the output projection."""

    causal: bool = True

    def __init__(self, config: Settings, width: int, rngs: nnx.Rngs):
        heads, groups = config.heads, config.kv_heads or config.heads
        at_least("heads", heads, 1)
        dim = config.head_dim or checks.split_heads(width, heads)
        checks.groups(heads, groups)
        if config.rope_base:
            checks.pairs(dim)
        at_least("block", config.block, 1)
        shared = "heads" if groups > 1 else "groups"  # a single head is whole on every device
        self.q = weights.inward(rngs, width, (heads, dim), ("heads", "key"))
        self.kv = weights.inward(rngs, width, (2, groups, dim), ("parts", shared, "key"))
        self.o = weights.outward(rngs, (heads, dim), width, ("heads", "key"))
        self.block, self.rope_base = config.block, config.rope_base
        self.head_shape = (groups, dim)

    def __call__(self, x, *, segments=None, state=None):
        q_BTHK, k_BTGK, v_BTGK = self.heads_of(x, self.positions(x, segments, state))
        return self.attend({"q": q_BTHK}, {"k": k_BTGK, "v": v_BTGK}, segments, state)

    def rule(self, number, blocks, most: int):
        """The blocks that each block sees: see `chosen_blocks.Rule`."""
        raise NotImplementedError

    def read(
        self,
        queries: aligned.Arrays,
        keys: aligned.Arrays,
        row: chosen_blocks.Row,
        training: bool = False,
    ) -> Array:
        """What the queries find in chosen blocks; while training it may report losses."""
        return row.fixed(queries["q"], keys["k"], keys["v"], self.rule, causal=self.causal)

    def positions(self, x, segments, state) -> Int[Array, "B T"]:
        """Tokens of its document before each token; ValueError where a state cannot be."""
        if state is not None and not self.causal:
            self._refuse_state()
        return aligned.positions(state, segments, x)

    def heads_of(
        self, x: Float[Array, "B T D"], positions_BT: Int[Array, "B T"]
    ) -> tuple[Array, Array, Array]:
        """Queries, keys and values in x's dtype, the first two rotated."""
        q_BTHK = weights.project("btd,dhk->bthk", x, self.q)
        kv_BTPGK = weights.project("btd,dpgk->btpgk", x, self.kv)
        k_BTGK, v_BTGK = kv_BTPGK[:, :, 0], kv_BTPGK[:, :, 1]
        if self.rope_base:
            q_BTHK = layers.rotary(q_BTHK, positions_BT, self.rope_base)
            k_BTGK = layers.rotary(k_BTGK, positions_BT, self.rope_base)
        return q_BTHK, k_BTGK, v_BTGK

    def attend(
        self, queries, tokens, segments, state, sums=None, unit: int = 0
    ) -> tuple[Array, mixer.State]:
        """The output projection of what the queries read, and the state."""
        # Losses leave no branch of a `cond`, and there is one wherever a state is given.
        read = functools.partial(self.read, training=True) if state is None else self.read
        o_BTHK, new = aligned.attend(
            queries,
            tokens,
            state,
            segments,
            block=self.block,
            read=read,
            near=lambda queries, tokens: chosen_blocks.plain(
                queries["q"], tokens["k"], tokens["v"], segments, self.block, self.causal
            ),
            sums=sums,
            unit=unit,
            init_state=self.init_state if self.causal else None,
        )
        return weights.project("bthk,hkd->btd", o_BTHK, self.o), new if self.causal else ()

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Room for the keys and values of a document of `capacity` tokens."""
        if not self.causal:
            self._refuse_state()
        shapes = {"k": self.head_shape, "v": self.head_shape}
        return aligned.empty(batch, capacity, self.block, dtype, shapes)

    def _refuse_state(self):
        raise ValueError(
            f"{type(self).__module__} is bidirectional: it has no state to decode from. "
            f"Use it in an encoder."
        )


def at_least(name: str, value: int, least: int, why: str = "") -> None:
    """Raise unless a setting reaches its least value."""
    if value < least:
        raise ValueError(f"{name}={value} is too small{why}. Use at least {least}.")


def imitation(
    row: chosen_blocks.Row,
    q_BTHK: Array,
    k_BSGK: Array,
    lists_BTLM: Array,
    scores: Callable[..., Array],
    *given: Array,
) -> Float[Array, ""]:
    """Mean over tokens of KL(p || softmax(score)) over the chosen blocks before their own.

    p is what attention gives each such block, a mean over the heads that share a list, and no
    gradient reaches it. `scores(row, *given)` are (B, T, L, N); they learn to foresee p. Packed
    documents of less than a block, which have nothing to choose, do not count.
    """
    groups = k_BSGK.shape[2]
    k_BGNSK = rearrange(chosen_blocks.by_block(k_BSGK, row.block), "b n s g k -> b g n s k")

    def distance(row, q_BTHK, lists_BTLM, *given):
        s_BTLN = scores(row, *given)
        lowest = jnp.finfo(s_BTLN.dtype).min
        open_BTLM = (lists_BTLM >= 0) & (lists_BTLM != row.number[:, :, None, None])
        at_BTLM = jnp.where(open_BTLM, lists_BTLM, 0)
        s_BTLM = jnp.take_along_axis(s_BTLN, at_BTLM, axis=3)
        log_q_BTLM = jax.nn.log_softmax(jnp.where(open_BTLM, s_BTLM, lowest), axis=3)
        at_BTGM = jnp.repeat(at_BTLM, groups // at_BTLM.shape[2], axis=2)
        open_BTGM = jnp.repeat(open_BTLM, groups // at_BTLM.shape[2], axis=2)
        take = jax.vmap(jax.vmap(lambda blocks, at: blocks[at], (0, 1), 1))
        found_BTGMSK = take(k_BGNSK, at_BTGM)
        q_BTGRK = rearrange(q_BTHK, "b t (g r) k -> b t g r k", g=groups)
        a_BTGRMS = jnp.einsum(
            "btgrk,btgmsk->btgrms", q_BTGRK, found_BTGMSK, preferred_element_type=s_BTLN.dtype
        )
        a_BTGRMS *= q_BTHK.shape[3] ** -0.5
        a_BTGRMS = jnp.where(open_BTGM[:, :, :, None, :, None], a_BTGRMS, lowest)
        p_BTGM = jax.nn.softmax(a_BTGRMS, axis=(4, 5)).sum(5).mean(3)
        p_BTLM = p_BTGM if lists_BTLM.shape[2] > 1 else p_BTGM.mean(2, keepdims=True)
        p_BTLM = jnp.where(open_BTLM, jax.lax.stop_gradient(p_BTLM), 0)
        terms = p_BTLM * (jnp.log(jnp.maximum(p_BTLM, 1e-30)) - log_q_BTLM)
        return jnp.where(open_BTLM, terms, 0).sum(3).mean(2)

    found_BT = row.in_chunks(distance, q_BTHK, lists_BTLM, *given, chunk=64)
    real_BT = jnp.ones_like(row.slot) if row.segments is None else row.segments > 0
    return jnp.sum(found_BT * real_BT) / jnp.maximum(jnp.sum(real_BT), 1)
