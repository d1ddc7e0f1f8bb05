"""Sinkhorn attention: each block reads itself and one block of a learned soft sorting.

Sparse Sinkhorn Attention (arXiv 2002.11296, eqs. 1 to 6). Notable: a map of the sum of a block's
tokens says where the block belongs; rows and columns of the exponentials are normed in turn until
they are near a permutation, which moves keys and values. Each head sorts for itself. Blocks are
counted inside a document; the last may be short, and its missing tokens count as zeros when blocks
are mixed. Deviation: no Gumbel noise. Packed documents are taken one after the other; a row that is
one document longer than `length` is refused. b_B of eq. 2 is left out: the norming removes it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models import checks, mixer, weights
from models.parts import documents


@dataclasses.dataclass
class Config:
    """Heads, the block's tokens, and what sorts up to length / block blocks."""

    heads: int = 4
    head_dim: int = 0  # 0: width / heads
    block: int = 16
    length: int = 512  # of the longest document
    iterations: int = 8  # of the norming of rows and columns
    temperature: float = 0.75

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where a number is out of range."""
        return Mixer(self, width, rngs)


class Mixer(mixer.Mixer):
    """o_t = softmax over keys of t's block and of its sorted block S k, S = Sinkhorn(exp(R / tau)).

    R_n = W_B relu(W_P (sum of block n of x) + b_P), a row of S a block.
    """

    causal = False

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        heads, block = config.heads, config.block
        dim = config.head_dim or checks.split_heads(width, heads)
        if block < 1:
            raise ValueError(f"block={block} must be at least 1 token; usual: 16 to 128.")
        if config.length < block or config.length % block:
            near = max(config.length // block, 1) * block
            raise ValueError(
                f"length={config.length} is no whole number of blocks of {block}. Use {near}."
            )
        if config.iterations < 1:
            raise ValueError(f"iterations={config.iterations} must be at least 1; usual: 5 to 10.")
        if config.temperature <= 0:
            raise ValueError(f"temperature={config.temperature} must be > 0; usual: 0.75.")
        blocks = config.length // block
        self.qkv = weights.inward(rngs, width, (3, heads, dim), ("parts", "heads", "key"))
        self.o = weights.outward(rngs, (heads, dim), width, ("heads", "key"))
        sums = weights.fan_in(width, gain=block**-0.5)
        self.place_in = weights.weight(rngs, sums, (width, width), ("embed", "rank"))
        self.place_bias = weights.filled(rngs, 0.0, (width,), ("rank",))
        self.sort = weights.weight(
            rngs, weights.fan_in(width), (width, heads, blocks), ("rank", "heads", "state")
        )
        self.length = config.length
        self.read = functools.partial(
            _attend,
            block=block,
            iterations=config.iterations,
            temperature=config.temperature,
        )

    def __call__(self, x, *, segments=None, state=None):
        if state is not None:
            raise documents.no_state("sinkhorn")
        if segments is None:
            documents.check_length(x.shape[1], self.length)
        qkv_BTPHK = weights.project("btd,dphk->btphk", x, self.qkv)
        sorting = (self.place_in, self.place_bias, self.sort)
        sorters = tuple(weight[...].astype(mixer.wide(x.dtype)) for weight in sorting)
        o_BTHK = documents.each(self.read, sorters, (x, qkv_BTPHK), segments)
        return weights.project("bthk,hkd->btd", o_BTHK, self.o), ()

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Raises ValueError: it reads the whole document."""
        raise documents.no_state("sinkhorn")


def _attend(weights, rows, length_B, *, block: int, iterations: int, temperature: float):
    """Attention of documents at the front of the rows; see `documents.each`."""
    x_BTD, qkv_BTPHK = rows
    batch, count = x_BTD.shape[:2]
    cut = lambda x: jnp.pad(x, ((0, 0), (0, -count % block)) + ((0, 0),) * (x.ndim - 2)).reshape(
        batch, -1, block, *x.shape[2:]
    )
    x_BNCD, qkv_BNCPHK = cut(x_BTD), cut(qkv_BTPHK)
    q_BNCHK, k_BNCHK, v_BNCHK = (qkv_BNCPHK[:, :, :, part] for part in range(3))
    inside_BNC = jnp.arange(x_BNCD.shape[1] * block) < length_B[:, None]
    inside_BNC = inside_BNC.reshape(batch, -1, block)
    move_BHNM = _sorting(weights, x_BNCD, inside_BNC[..., 0], iterations, temperature)
    move_BHNM = move_BHNM.astype(x_BTD.dtype)
    # An offset is there in the sorted block where it is in the first: the others are not longer.
    sorted_BNC = jnp.broadcast_to(inside_BNC[:, :1], inside_BNC.shape)
    seen_BNS = jnp.concatenate([inside_BNC, sorted_BNC], axis=2)
    both = lambda y: jnp.concatenate([y, jnp.einsum("bhnm,bmchk->bnchk", move_BHNM, y)], axis=2)
    q_BNCHK = q_BNCHK * q_BNCHK.shape[-1] ** -0.5
    scores_BNHCS = jnp.einsum("bnchk,bnshk->bnhcs", q_BNCHK, both(k_BNCHK))
    shares_BNHCS = documents.softmax(
        scores_BNHCS.astype(mixer.wide(x_BTD.dtype)), seen_BNS[:, :, None, None]
    )
    o_BNCHK = jnp.einsum("bnhcs,bnshk->bnchk", shares_BNHCS.astype(x_BTD.dtype), both(v_BNCHK))
    return o_BNCHK.reshape(batch, -1, *o_BNCHK.shape[3:])[:, :count]


def _sorting(weights, x_BNCD, there_BN, iterations: int, temperature: float):
    """S (B, H, N, M): the share of block m in sorted block n; rows and columns sum to one."""
    place_in, place_bias, sort = weights
    sums_BND = x_BNCD.astype(place_in.dtype).sum(2)
    hidden_BNR = jax.nn.relu(sums_BND @ place_in + place_bias)
    log_BHNM = jnp.einsum("bnr,rhm->bhnm", hidden_BNR, sort)
    missing = max(x_BNCD.shape[1] - sort.shape[2], 0)  # blocks past `length` go nowhere
    log_BHNM = jnp.pad(log_BHNM, ((0, 0),) * 3 + ((0, missing),))[..., : x_BNCD.shape[1]]
    known = jnp.arange(x_BNCD.shape[1]) < sort.shape[2]
    open_BHNM = there_BN[:, None, :, None] & (there_BN & known)[:, None, None]
    log_BHNM = jnp.where(open_BHNM, log_BHNM / temperature, -1e30)
    for _ in range(iterations):
        for axis in (-1, -2):
            total = jax.nn.logsumexp(log_BHNM, axis=axis, keepdims=True)
            log_BHNM = jnp.where(open_BHNM, log_BHNM - total, -1e30)
    return jnp.where(open_BHNM, jnp.exp(log_BHNM), 0)
