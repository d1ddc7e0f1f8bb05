"""The language model: embedding, a pattern of blocks repeated to depth, a norm, a head, the loss.

Blocks of equal position in the pattern are stacked and scanned by period, so compile time follows
the pattern and not the depth; blocks left over when the pattern does not divide the depth follow
one by one.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kernels.cross_entropy import cross_entropy
from models import layers, mixer, multi_token, positions, reports, stacks
from models.attention import softmax
from models.block import residual
from models.channel import glu
from parallel.sharding import constrain, gathered


@dataclasses.dataclass
class Config:
    """A language model; elements of `pattern` are Configs of mixers or of whole blocks."""

    vocabulary: int = 257  # ids; 0: as many as the tokenizer has (training finds out)
    width: int = 256
    depth: int = 4
