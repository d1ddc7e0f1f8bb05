"""Griffin, two RG-LRU blocks to one of local attention, 17.4M parameters, byte level.

    python train.py --config=configs/lm/hybrids/griffin.py --workdir=runs/griffin

Takes: 2,000 steps of 8,192 tokens, as every config of configs/lm.
Expected: a loss to hold against theirs, after equal tokens.
"""

from configs.schema import Data, Experiment, Optimizer
from models import lm
from models.attention import softmax
from models.recurrent import rg_lru


def get_config() -> Experiment:
    """The experiment."""
    return Experiment(
        model=lm.Config(
            width=512,
            depth=6,
            pattern=(
                rg_lru.Config(blocks=8),
                rg_lru.Config(blocks=8),
                softmax.Config(heads=8, kv_heads=1, window=128),
            ),
        ),
        steps=2000,
        data=Data(length=512, batch=16),
        optimizer=Optimizer(learning_rate=2e-3, warmup_steps=200),
    )
