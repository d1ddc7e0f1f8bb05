"""Native sparse attention: compressed blocks, chosen blocks and a window, mixed by gates.

Native Sparse Attention (arXiv 2502.11089, eq. 5 to 12). Notable: the probabilities of the
compressed blocks, which are read anyway, also choose the blocks that are read in full, once for all
heads of a group; each branch has keys and values of its own. The compressor is a two-layer MLP over
a block's tokens with their positions inside it, whose first layer is factored: a weight for each
position and channel, summed over the block, then a matrix. A block's sum grows token by token, so
decoding keeps sums and never reads a block again. The compressed branch has no rotary positions;
it and the choice are computed in float32. Eq. 9 is read so that a compressed block counts for the
chosen block as often as their strides overlap.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from kernels.block_sparse_attention import patterns
from models import checks, layers, mixer, weights
from models.parts import aligned, chosen_blocks, sparse_heads


@dataclasses.dataclass
class Config(sparse_heads.Settings):
    """The paper: compress 32, stride 16, block 64, top 16 (1 first, 2 local), window 512."""

    kv_heads: int = 2
    compress: int = 8  # tokens of a compressed block (l)
    stride: int = 4  # tokens between the starts of two of them (d)
    top: int = 6  # blocks read in full (n), first and local ones included
    first: int = 1
    local: int = 2  # blocks up to the query's own, itself included
    window: int = 32  # tokens

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where blocks, counts or heads do not fit."""
        return Mixer(self, width, rngs)


CASES = {"nsa": Config()}


class Mixer(sparse_heads.Attention):
    """o = sum over branches c of g_c attention(q, k_c, v_c), with g = sigmoid(x W)."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        super().__init__(config, width, rngs)
        _check(config)
        groups, dim = self.head_shape
        shared = "heads" if groups > 1 else "groups"
        self.kv_near, self.kv_far = (
            weights.inward(rngs, width, (2, groups, dim), ("parts", shared, "key"))
            for _ in range(2)
        )
        self.gates = weights.inward(rngs, width, (3, config.heads), ("parts", "heads"))
        taps = ("parts", "width", "key")
        self.place = weights.weight(rngs, weights.normal(0.02), (2, config.compress, dim), taps)
        self.taps = weights.filled(rngs, config.compress**-0.5, (2, config.compress, dim), taps)
        square = ("parts", "key", "value")
        self.mlp_in = weights.weight(rngs, weights.fan_in(dim), (2, dim, dim), square)
        self.mlp_out = weights.weight(rngs, weights.fan_in(dim), (2, dim, dim), square)
        self.compress, self.stride, self.window = config.compress, config.stride, config.window
        self.top, self.first, self.local = config.top, config.first, config.local

    def __call__(self, x, *, segments=None, state=None):
        positions_BT = self.positions(x, segments, state)
        q_BTHK, k_BTGK, v_BTGK = self.heads_of(x, positions_BT)
        kv_BTPGK = weights.project("btd,dpgk->btpgk", x, self.kv_near)
        near_BTGK = kv_BTPGK[:, :, 0]
        if self.rope_base:
            near_BTGK = layers.rotary(near_BTGK, positions_BT, self.rope_base)
        exact = x.astype(mixer.wide(x.dtype))
        gates_BTPH = jax.nn.sigmoid(weights.project("btd,dph->btph", exact, self.gates))
        exact_BTHK = weights.project("btd,dhk->bthk", exact, self.q)
        queries = {"q": q_BTHK, "exact": exact_BTHK, "gates": gates_BTPH}
        tokens = {"k": k_BTGK, "v": v_BTGK, "k_near": near_BTGK, "v_near": kv_BTPGK[:, :, 1]}
        o_BTHK, new = aligned.attend(
            queries,
            tokens,
            state,
            segments,
            block=self.block,
            read=self.read,
            near=lambda queries, tokens: self._near(queries, tokens, segments),
            sums={"sums": self._summands(exact, positions_BT)},
            unit=self.stride,
            least=self.compress,
            init_state=self.init_state,
        )
        return weights.project("bthk,hkd->btd", o_BTHK, self.o), new

    def _summands(self, exact_BTD, positions_BT) -> Array:
        """(B, T, E, 2, G, K): what a token adds to the E compressed blocks that it lies in."""
        kv_BTPGK = weights.project("btd,dpgk->btpgk", exact_BTD, self.kv_far)
        shape = (2, self.compress // self.stride, self.stride, -1)
        place_PEOK, taps_PEOK = (w[...].reshape(shape) for w in (self.place, self.taps))
        at_BT = positions_BT % self.stride
        of_token = lambda w_PEOK: rearrange(
            jnp.take(w_PEOK, at_BT, axis=2), "p e b t k -> b t e p 1 k"
        )
        return (kv_BTPGK[:, :, None] + of_token(place_PEOK)) * of_token(taps_PEOK)

    def read(self, queries, keys, row, training=False):
        q_BTHK, gates_BTPH = queries["q"], queries["gates"]
        k_BIGK, v_BIGK = self._compressed(keys["sums"])

        def far(row, exact_BTHK):
            return self._far(row, exact_BTHK, k_BIGK, v_BIGK)

        far_BTHK, lists_BTGM = row.in_chunks(far, queries["exact"])
        chosen_BTHK = row.chosen(q_BTHK, keys["k"], keys["v"], lists_BTGM.swapaxes(1, 2))
        before = math.ceil((self.window - 1) / self.block)
        rule = lambda number, blocks, most: chosen_blocks.look_up(
            patterns.sliding(most, before=before)[None], number
        )
        near_BTHK = row.fixed(q_BTHK, keys["k_near"], keys["v_near"], rule, window=self.window)
        return _mixed(gates_BTPH, far_BTHK, chosen_BTHK, near_BTHK)

    def _near(self, queries, tokens, segments):
        """Documents too short for a compressed block: the other branches see all of them."""
        chosen, near = (
            chosen_blocks.plain(queries["q"], tokens[k], tokens[v], segments, self.block)
            for k, v in (("k", "v"), ("k_near", "v_near"))
        )
        return _mixed(queries["gates"], jnp.zeros_like(chosen), chosen, near)

    def _compressed(self, sums_BUEPGK) -> tuple[Array, Array]:
        """Keys and values (B, I, G, K) of compressed blocks; those past the end are not whole."""
        each, units = self.compress // self.stride, sums_BUEPGK.shape[1]
        pad = ((0, 0), (0, each - 1)) + ((0, 0),) * 4
        longer = jnp.pad(sums_BUEPGK, pad)
        sum_BIPGK = functools.reduce(jnp.add, (longer[:, e : e + units, e] for e in range(each)))
        hidden = jax.nn.silu(jnp.einsum("bipgk,pkv->bipgv", sum_BIPGK, self.mlp_in[...]))
        kv_BIPGK = jnp.einsum("bipgk,pkv->bipgv", hidden, self.mlp_out[...])
        return kv_BIPGK[:, :, 0], kv_BIPGK[:, :, 1]

    def _far(self, row, exact_BTHK, k_BIGK, v_BIGK) -> tuple[Array, Array]:
        """What queries read in compressed blocks (eq. 8), and the blocks that these choose."""
        units, groups = k_BIGK.shape[1:3]
        start = jnp.arange(units) * self.stride
        seen_BTI = start >= (row.origin * self.block)[..., None]
        seen_BTI &= start + self.compress - 1 <= row.slot[..., None]
        seen_BT11I = seen_BTI[:, :, None, None]
        q_BTGRK = rearrange(exact_BTHK, "b t (g r) k -> b t g r k", g=groups)
        s_BTGRI = jnp.einsum("btgrk,bigk->btgri", q_BTGRK, k_BIGK) * k_BIGK.shape[-1] ** -0.5
        s_BTGRI = jnp.where(seen_BT11I, s_BTGRI, jnp.finfo(s_BTGRI.dtype).min)
        # A query that sees no block reads zero: its sum is then 0, not the number of blocks.
        p_BTGRI = jnp.exp(s_BTGRI - s_BTGRI.max(-1, keepdims=True)) * seen_BT11I
        p_BTGRI /= jnp.maximum(p_BTGRI.sum(-1, keepdims=True), 1e-30)
        o_BTGRK = jnp.einsum("btgri,bigk->btgrk", p_BTGRI, v_BIGK)
        each = self.compress // self.stride
        shared_BTGI = jnp.pad(p_BTGRI.sum(3), ((0, 0),) * 3 + ((each - 1, 0),))
        shifted = [shared_BTGI[..., each - 1 - e :][..., :units] for e in range(each)]
        by_unit = functools.reduce(jnp.add, shifted)
        by_block = rearrange(by_unit, "b t g (n r) -> b t g n r", r=self.block // self.stride)
        lists_BTGM = self._choose(row, by_block.sum(-1))
        return rearrange(o_BTGRK, "b t g r k -> b t (g r) k"), lists_BTGM

    def _choose(self, row, s_BTGN) -> Array:
        """The best blocks (eq. 11), after the first and the local ones."""
        before_BTN = row.earlier(s_BTGN.shape[-1])
        block = jnp.arange(s_BTGN.shape[-1])
        first_BTN = block < row.origin[..., None] + self.first
        near_BTN = block > row.number[..., None] - self.local
        s_BTGN = jnp.where((first_BTN | near_BTN)[:, :, None], jnp.inf, s_BTGN)
        s_BTGN = jnp.where(before_BTN[:, :, None], s_BTGN, -jnp.inf)
        return chosen_blocks.top(row.own_first(s_BTGN), self.top)

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Keys and values of the two full branches, and sums for the compressed one.

        The window's branch keeps as many slots as the chosen one: blocks are found by position.
        """
        groups, dim = shape = self.head_shape
        tokens = {name: shape for name in ("k", "v", "k_near", "v_near")}
        sums = {"sums": (self.compress // self.stride, 2, groups, dim)}
        return aligned.empty(batch, capacity, self.block, dtype, tokens, sums, self.stride)


def _mixed(gates_BTPH, *branches) -> Array:
    dtype = branches[-1].dtype
    parts = (gates_BTPH[:, :, i, :, None] * branch for i, branch in enumerate(branches))
    return functools.reduce(jnp.add, parts).astype(dtype)


def _check(config: Config) -> None:
    """Raise unless blocks are made of whole strides and the window holds a block."""
    sparse_heads.at_least("compress", config.compress, 1)
    for name in ("compress", "block"):
        value, stride = getattr(config, name), config.stride
        if stride < 1 or value % stride:
            near = checks.nearest_divisor(math.gcd(config.compress, config.block), stride)
            raise ValueError(f"stride={stride} does not divide {name}={value}. Use {near}.")
    if config.compress > config.block:
        raise ValueError(
            f"compress={config.compress} is above block={config.block}. Use {config.block}."
        )
    sparse_heads.at_least("window", config.window, config.block, f" for block={config.block}")
    sparse_heads.at_least("first", config.first, 0)
    sparse_heads.at_least("local", config.local, 1)
    least = config.first + config.local
    sparse_heads.at_least("top", config.top, least, f" for first + local = {least}")
