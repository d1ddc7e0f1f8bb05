"""Settings of sparse attention that do not fit are refused in one line."""

import pytest
from flax import nnx

from models.sparse_attention import (
    bigbird,
    block_routing,
    dsa,
    local,
    longformer,
    moba,
    nsa,
    reformer,
    s2,
    strided,
)

REFUSED = [
    (strided.Config(heads=5), "heads=5 does not divide the width 64. Use 4"),
    (strided.Config(heads=0), "heads=0 is too small. Use at least 1"),
    (strided.Config(kv_heads=3), "kv_heads=3 does not divide heads=4. Use one of 1, 2, 4"),
    (strided.Config(head_dim=5), "head_dim=5 is odd; rotary positions need pairs. Use 6"),
    (strided.Config(block=0), "block=0 is too small. Use at least 1"),
    (strided.Config(stride=0), "stride=0 is too small. Use at least 1"),
    (strided.Config(fixed=True, summary=5), "summary=5 must be 1 to stride=4. Use 4"),
    (longformer.Config(before=-1), "before=-1 is too small. Use at least 0"),
    (longformer.Config(global_blocks=-2), "global_blocks=-2 is too small. Use at least 0"),
    (bigbird.Config(random=-1), "random=-1 is too small. Use at least 0"),
    (local.Config(before=-1), "before=-1 is too small. Use at least 0"),
    (s2.Config(shards=5), "shards=5 is not 1 to the 4 key heads, which cover them. Use 4"),
    (s2.Config(kv_heads=2, shards=4), "shards=4 is not 1 to the 2 key heads"),
    (moba.Config(top=0), "top=0 is too small. Use at least 1"),
    (nsa.Config(stride=3), "stride=3 does not divide compress=8. Use 2"),
    (nsa.Config(block=18), "stride=4 does not divide block=18. Use 2"),
    (nsa.Config(compress=32), "compress=32 is above block=16. Use 16"),
    (nsa.Config(window=8), "window=8 is too small for block=16. Use at least 16"),
    (nsa.Config(top=2), "top=2 is too small for first . local = 3. Use at least 3"),
    (nsa.Config(local=0), "local=0 is too small. Use at least 1"),
    (dsa.Config(top=0), "top=0 is too small. Use at least 1"),
    (dsa.Config(index_dim=7), "index_dim=7 is no even number from 2. Use 8"),
    (dsa.Config(imitation=-1.0), "imitation=-1.0 is negative. Use 0"),
    (block_routing.Config(gate_dim=1), "gate_dim=1 is no even number from 2. Use 2"),
    (reformer.Config(buckets=7), "buckets=7 is no even number from 2. Use 8"),
    (reformer.Config(rounds=0), "rounds=0 is too small. Use at least 1"),
    (reformer.Config(window=1), "window=1 is too small to see another token. Use at least 2"),
    (reformer.Config(heads=3), "heads=3 does not divide the width 64"),
]


@pytest.mark.parametrize(("config", "match"), REFUSED)
def test_refused(config, match):
    with pytest.raises(ValueError, match=match) as caught:
        config.build(64, nnx.Rngs(0))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("module", [longformer, bigbird])
def test_an_encoder_has_no_state(module):
    encoder = module.Config(causal=False).build(64, nnx.Rngs(0))
    with pytest.raises(ValueError, match="is bidirectional: it has no state to decode from"):
        encoder.init_state(1, 8)
