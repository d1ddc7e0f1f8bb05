"""Nystromformer: softmax attention rebuilt from its rows and columns at a few landmarks.

A Nystrom-Based Algorithm for Approximating Self-Attention (arXiv 2102.03902, eqs. 13 to 15 and
algorithm 1). Notable: landmarks are means of queries and keys over equal stretches of the document;
their own attention is inverted by six steps of an iteration; a depthwise convolution of the values
is added. A document of no more tokens than landmarks has each token as a landmark. Deviation: the
iteration starts from each matrix's own norms (the released code takes the largest of the batch), so
documents do not depend on one another. Packed documents are taken one after the other.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels.long_conv import long_conv
from models import checks, mixer, weights
from models.parts import documents


@dataclasses.dataclass
class Config:
    """Heads of attention through `landmarks` and a convolution over `conv` values."""

    heads: int = 4
    head_dim: int = 0  # 0: width / heads
    landmarks: int = 64  # of a document
    iterations: int = 6  # of the pseudo-inverse
    conv: int = 33  # taps, half before and half after a token; 0: no convolution

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where a number is out of range."""
        return Mixer(self, width, rngs)


CASES = {"nystromformer": Config(), "nystromformer_few": Config(landmarks=8, conv=0)}


class Mixer(mixer.Mixer):
    """o = softmax(q k~) pinv(softmax(q~ k~)) softmax(q~ k) v + conv(v), q~ and k~ the landmarks."""

    causal = False

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        heads, taps = config.heads, config.conv
        dim = config.head_dim or checks.split_heads(width, heads)
        if config.landmarks < 1:
            raise ValueError(f"landmarks={config.landmarks} must be at least 1. Use 64.")
        if config.iterations < 1:
            raise ValueError(f"iterations={config.iterations} must be at least 1; usual: 6.")
        if taps < 0 or taps and taps % 2 == 0:
            near = max(taps + 1, 1)
            raise ValueError(f"conv={taps} must be 0 (none) or odd and above. Use {near}.")
        self.qkv = weights.inward(rngs, width, (3, heads, dim), ("parts", "heads", "key"))
        self.o = weights.outward(rngs, (heads, dim), width, ("heads", "key"))
        bound = 1 / math.sqrt(max(taps, 1))
        init = lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)
        self.taps = weights.weight(rngs, init, (taps, heads), ("width", "heads")) if taps else None
        self.read = functools.partial(
            _attend, landmarks=config.landmarks, iterations=config.iterations
        )

    def __call__(self, x, *, segments=None, state=None):
        if state is not None:
            raise documents.no_state("nystromformer")
        qkv_BTPHK = weights.project("btd,dphk->btphk", x, self.qkv)
        o_BTHK = documents.each(self.read, (), qkv_BTPHK, segments)
        if self.taps is not None:
            o_BTHK += _convolve(qkv_BTPHK[:, :, 2], self.taps[...], segments)
        return weights.project("bthk,hkd->btd", o_BTHK, self.o), ()

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Raises ValueError: it reads the whole document."""
        raise documents.no_state("nystromformer")


def _convolve(v_BTHK, taps_WH, segments):
    """sum_j taps[j] v_{t + j - half}, taps shared by a head, within the document."""
    dim, half = v_BTHK.shape[-1], taps_WH.shape[0] // 2
    v_BTD = v_BTHK.reshape(*v_BTHK.shape[:2], -1)
    taps_WD = jnp.repeat(taps_WH, dim, axis=1).astype(v_BTD.dtype)
    until, _ = long_conv(v_BTD, taps_WD[half::-1], segments=segments)
    after, _ = long_conv(
        jnp.flip(v_BTD, axis=1),
        taps_WD[half:].at[0].set(0),  # the token's own tap was read above
        segments=None if segments is None else jnp.flip(segments, axis=1),
    )
    return (until + jnp.flip(after, axis=1)).reshape(v_BTHK.shape)


def _attend(weights, qkv_BTPHK, length_B, *, landmarks: int, iterations: int):
    """Attention of documents at the front of the rows; see `documents.each`."""
    dtype, count = mixer.wide(qkv_BTPHK.dtype), qkv_BTPHK.shape[1]
    q_BTHK, k_BTHK, v_BTHK = (qkv_BTPHK[:, :, part] for part in range(3))
    time, length_B1 = jnp.arange(count), length_B[:, None]
    inside_BT = time < length_B1
    stretch_BT = time * jnp.minimum(length_B1, landmarks) // jnp.maximum(length_B1, 1)
    member_BTM = (stretch_BT[..., None] == jnp.arange(landmarks)) & inside_BT[..., None]
    tokens_BM = member_BTM.sum(1)
    share_BTM = (member_BTM / jnp.maximum(tokens_BM, 1)[:, None]).astype(dtype)
    q_BTHK = q_BTHK.astype(dtype) * q_BTHK.shape[-1] ** -0.5
    k_BTHK = k_BTHK.astype(dtype)
    q_BMHK = jnp.einsum("btm,bthk->bmhk", share_BTM, q_BTHK)
    k_BMHK = jnp.einsum("btm,bthk->bmhk", share_BTM, k_BTHK)
    used_BM = tokens_BM > 0
    rows_BHTM = jnp.einsum("bthk,bmhk->bhtm", q_BTHK, k_BMHK)
    core_BHMN = jnp.einsum("bmhk,bnhk->bhmn", q_BMHK, k_BMHK)
    columns_BHMT = jnp.einsum("bmhk,bthk->bhmt", q_BMHK, k_BTHK)
    rows_BHTM = documents.softmax(rows_BHTM, used_BM[:, None, None])
    core_BHMN = documents.softmax(core_BHMN, used_BM[:, None, None])
    core_BHMN = jnp.where(used_BM[:, None, :, None], core_BHMN, 0)
    columns_BHMT = documents.softmax(columns_BHMT, inside_BT[:, None, None])
    v_BHMK = jnp.einsum("bhmt,bthk->bhmk", columns_BHMT, v_BTHK.astype(dtype))
    v_BHMK = _pseudo_inverse(core_BHMN, iterations) @ v_BHMK
    return jnp.einsum("bhtm,bhmk->bthk", rows_BHTM, v_BHMK).astype(qkv_BTPHK.dtype)


def _pseudo_inverse(a, iterations: int):
    """Z' = Z (13 - A Z (15 - A Z (7 - A Z))) / 4, from A^T / (|A|_1 |A|_inf); eq. 15."""
    norm = jnp.max(a.sum(-2), axis=-1) * jnp.max(a.sum(-1), axis=-1)
    z = a.swapaxes(-1, -2) / jnp.where(norm > 0, norm, 1)[..., None, None]
    one = jnp.eye(a.shape[-1], dtype=a.dtype)
    for _ in range(iterations):
        az = a @ z
        z = 0.25 * z @ (13 * one - az @ (15 * one - az @ (7 * one - az)))
    return z
