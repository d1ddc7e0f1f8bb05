"""Hymba: attention and Mamba heads side by side in every layer, 12.7M parameters, byte level.

    python train.py --config=configs/lm/hybrids/hymba.py --workdir=runs/hymba

Hymba (arXiv 2411.13676, section 2): the two kinds of heads read the same input and their normed
outputs are averaged; attention is global in three layers and local in the others, here in a third
of them. The paper's meta tokens and shared caches of neighbouring layers are left out.

Takes: 2,000 steps of 8,192 tokens, as every config of configs/lm.
Expected: a loss to hold against theirs, after equal tokens.
"""

from configs.schema import Data, Experiment, Optimizer
from models import lm
from models.attention import softmax
from models.block import heads
from models.state_space import mamba1


def get_config() -> Experiment:
    """The experiment."""
    layer = lambda attention: heads.Config((attention, mamba1.Config(expand=1)))
    local = softmax.Config(heads=4, kv_heads=2, window=128)
    return Experiment(
        model=lm.Config(
            width=384,
            depth=6,
            pattern=(
                layer(softmax.Config(heads=4, kv_heads=2)),
                layer(local),
                layer(local),
            ),
        ),
        steps=2000,
        data=Data(length=512, batch=16),
        optimizer=Optimizer(learning_rate=2e-3, warmup_steps=200),
    )
