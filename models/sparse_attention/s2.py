"""S2-Attention: every head keeps another shard of the far past, all heads together keep it whole.

S2-Attention: Hardware-Aware Context Sharding Among Attention Heads (arXiv 2407.17678, section 3).
Notable: a head's shard is a set of blocks that does not move with the query, so what a head does
not see now it never needs again. As in the released library (dkernel), heads that share keys and
values share the shard too, so that this holds for the keys of grouped heads. The decoding state
here still holds every block for every key head.
"""

import dataclasses

import numpy as np
from flax import nnx

from kernels.block_sparse_attention import patterns
from models.parts import chosen_blocks, sparse_heads


@dataclasses.dataclass
class Config(sparse_heads.Settings):
    """The near past, seen by every head, and the number of shards."""

    before: int = 1  # blocks before the query's own
    shards: int = 0  # 0: as many as key heads

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where the shards or the heads do not fit."""
        return Mixer(self, width, rngs)


CASES = {"s2": Config()}


class Mixer(sparse_heads.Attention):
    """Block n of key head g sees j <= n with n - j <= before or (j + g) mod shards = 0."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        super().__init__(config, width, rngs)
        sparse_heads.at_least("before", config.before, 0)
        groups = config.kv_heads or config.heads
        shards = config.shards or groups
        if not 1 <= shards <= groups:
            near = min(max(shards, 1), groups)
            raise ValueError(
                f"shards={shards} is not 1 to the {groups} key heads, which cover them. Use {near}."
            )
        self.before, self.shards = config.before, shards
        self.groups, self.each = groups, config.heads // groups

    def rule(self, number, blocks, most: int):
        n, j = np.arange(most)[:, None], np.arange(most)
        near = n - j <= self.before
        shard = lambda group: (j + group) % self.shards == 0
        lists = [patterns.from_mask((j <= n) & (near | shard(g))) for g in range(self.groups)]
        table = np.repeat(chosen_blocks.stacked(lists), self.each, axis=0)
        return chosen_blocks.look_up(table, number)
