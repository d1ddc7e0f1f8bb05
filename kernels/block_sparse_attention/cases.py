"""Inputs for tests and benchmarks of block-sparse attention: four query heads on two key heads."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from kernels.block_sparse_attention import patterns

HEADS, GROUPS, KEY, VALUE = 4, 2, 16, 24


def draw(rng: np.random.Generator, *, batch, length, dtype, extreme=False) -> dict:
    """Normal q, k, v and random lists, with entries that are empty, repeated or out of sight.

    `extreme` adds 90 to the scores of every other head, -90 to the rest: exp(score) overflows or
    vanishes while the softmax, and with it every gradient, keeps its size. The length picks whose
    the lists are, the sizes of the blocks and the mask.
    """
    block, query_block, lists, causal, window = (
        (16, 0, 1, True, 0),
        (8, 4, GROUPS, True, 20),
        (16, 1, GROUPS, True, 0),
        (8, 16, HEADS, False, 0),
    )[length % 4]
    arrays = _draw_heads(rng, batch, length, extreme)
    count, blocks = math.ceil(length / (query_block or block)), math.ceil(length / block)
    indices = rng.integers(-1, blocks, (batch, lists, count, 5), dtype=np.int32)
    return {name: x.astype(dtype) for name, x in arrays.items()} | {
        "indices": indices,
        "block": block,
        "query_block": query_block,
        "causal": causal,
        "window": window,
    }


def _draw_heads(rng, batch: int, length: int, extreme: bool) -> dict:
    sizes = ((HEADS, KEY), (GROUPS, KEY), (GROUPS, VALUE))
    q, k, v = (rng.normal(size=(batch, length, *size)) for size in sizes)
    if extreme:
        q[..., 0] = 90 * KEY**0.5 * np.where(np.arange(HEADS) % 2, -1, 1)
        k[..., 0] = 1
    return {"q": q, "k": k, "v": v}


def sizes() -> dict[str, dict]:
    """Calls of model size by label: bfloat16, 32768 tokens; fixed lists are NumPy, chosen ones not.

    The last three choose for every token: 16 blocks a group of heads (arXiv:2502.11089), or 3 a
    head (arXiv:2502.13189).
    """
    like = jax.ShapeDtypeStruct

    def heads(length, key, count, groups):
        batch = 32768 // length
        shapes = {"q": (count, key), "k": (groups, key), "v": (groups, key)}
        return {n: like((batch, length, *s), jnp.bfloat16) for n, s in shapes.items()}

    def fixed(found, length, key, *, count=16, groups=16, causal=True):
        given = heads(length, key, count, groups)
        return given | {"indices": found[None, None], "block": 64, "causal": causal}

    def chosen(length, key, *, block, entries, count=16, groups=16, one_head=False, alone=False):
        given, blocks = heads(length, key, count, groups), length // block
        shape = (32768 // length, count if one_head else groups, length if alone else blocks)
        given["indices"] = like((*shape, entries), jnp.int32)
        return given | {"block": block, "query_block": 1 if alone else 0}

    def packed(given):
        return given | {"segments": like(given["q"].shape[:2], jnp.int32)}

    bigbird = functools.partial(patterns.bigbird, causal=True)
    return {
        "BigBird T4096 K64": fixed(bigbird(64), 4096, 64),
        "BigBird T32768 K128": fixed(bigbird(512), 32768, 128, groups=8),
        "Longformer T4096 K64, both ways": fixed(
            patterns.longformer(64, before=4, after=4, causal=False), 4096, 64, causal=False
        ),
        "chosen T4096 K64 segments": packed(chosen(4096, 64, block=64, entries=16)),
        "chosen T4096 K128": chosen(4096, 128, block=128, entries=8, groups=4),
        "chosen T4096 K256": chosen(4096, 256, block=64, entries=16, count=8, groups=8),
        "chosen T32768 K128": chosen(32768, 128, block=64, entries=16, groups=4),
        "chosen T4096 K128 by head": chosen(
            4096, 128, block=64, entries=8, groups=4, one_head=True
        ),
        "NSA T4096 K128": chosen(4096, 128, block=64, entries=16, count=64, groups=4, alone=True),
        "NSA T32768 K128 segments": packed(
            chosen(32768, 128, block=64, entries=16, count=64, groups=4, alone=True)
        ),
        "MoBA T32768 K128": chosen(
            32768, 128, block=512, entries=3, groups=16, one_head=True, alone=True
        ),
    }
