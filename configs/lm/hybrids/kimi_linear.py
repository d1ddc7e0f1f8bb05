"""Kimi Linear: three KDA layers to one of latent attention, 10.6M parameters, byte level.

    python train.py --config=configs/lm/hybrids/kimi_linear.py --workdir=runs/kimi_linear

Kimi Linear (arXiv 2510.26692, section 4): Kimi Delta Attention and multi-head latent attention at 3
to 1, with DeepSeek's experts. The paper's latent attention has no rotary part at all; here its
small one stays.

Takes: 2,000 steps of 8,192 tokens, as every config of configs/lm.
Expected: a loss to hold against theirs, after equal tokens.
"""

from configs.schema import Data, Experiment, Optimizer
from models import lm
from models.attention import mla
from models.channel import deepseek_moe
from models.delta import kda


def get_config() -> Experiment:
    """The experiment."""
    return Experiment(
        model=lm.Config(
            width=256,
            depth=4,
            channel=deepseek_moe.Config(experts=16, top_k=4, shared=1),
            pattern=(
                kda.Config(heads=4),
                kda.Config(heads=4),
                kda.Config(heads=4),
                mla.Config(heads=4),
            ),
        ),
        steps=2000,
        data=Data(length=512, batch=16),
        optimizer=Optimizer(learning_rate=2e-3, warmup_steps=200),
    )
