"""Jamba: Mamba, an eighth of attention, mixtures of experts, 22.4M parameters, byte level.

    python train.py --config=configs/lm/hybrids/jamba.py --workdir=runs/jamba

Jamba (arXiv 2403.19887, section 3): attention once in eight layers, without positions, and 16
experts of which a token has 2 in every other layer; here 8 experts.

Takes: 2,000 steps of 8,192 tokens, as every config of configs/lm.
Expected: a loss to hold against theirs, after equal tokens.
"""

from configs.schema import Data, Experiment, Optimizer
from models import lm
from models.attention import softmax
from models.block import residual
from models.channel import dropless, glu
from models.state_space import mamba1


def get_config() -> Experiment:
    """The experiment."""
    experts = dropless.Config(experts=8, top_k=2)
    mamba = residual.Config(mamba1.Config(), glu.Config())
    mamba_moe = residual.Config(mamba1.Config(), experts)
    attention = residual.Config(softmax.Config(heads=4, kv_heads=2, rope_base=0.0), glu.Config())
    return Experiment(
        model=lm.Config(
            width=256,
            depth=8,
            pattern=(
                *(mamba, mamba_moe, mamba, mamba_moe),
                *(attention, mamba_moe, mamba, mamba_moe),
            ),
        ),
        steps=2000,
        data=Data(length=512, batch=16),
        optimizer=Optimizer(learning_rate=2e-3, warmup_steps=200),
    )
