"""RecurrentGemma: Griffin's pattern with Gemma's head, 10.0M parameters, byte level.

    python train.py --config=configs/lm/hybrids/recurrent_gemma.py --workdir=runs/recurrent_gemma

RecurrentGemma (arXiv 2404.07839): two RG-LRU layers to one of local attention, GeGLU, the embedding
multiplied by the square root of the width, logits capped at 30.

Takes: 2,000 steps of 8,192 tokens, as every config of configs/lm.
Expected: a loss to hold against theirs, after equal tokens.
"""

from configs.schema import Data, Experiment, Optimizer
from models import lm
from models.attention import softmax
from models.channel import glu
from models.recurrent import rg_lru


def get_config() -> Experiment:
    """The experiment."""
    return Experiment(
        model=lm.Config(
            width=384,
            depth=6,
            channel=glu.Config(activation="gelu"),
            embed_scale=384**0.5,
            softcap=30.0,
            pattern=(
                rg_lru.Config(blocks=4),
                rg_lru.Config(blocks=4),
                softmax.Config(heads=4, kv_heads=1, window=128),
            ),
        ),
        steps=2000,
        data=Data(length=512, batch=16),
        optimizer=Optimizer(learning_rate=2e-3, warmup_steps=200),
    )
