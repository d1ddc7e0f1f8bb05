"""Zamba: a Mamba backbone that calls one shared attention block, 8.0M parameters, byte level.

    python train.py --config=configs/lm/hybrids/zamba.py --workdir=runs/zamba

Zamba (arXiv 2405.16712, section 2): the shared block is called every six Mamba layers on the stream
beside the embedding; here before every Mamba layer of a group of three. With depth=1 its weights
are one copy in the whole model; each further group would have its own.

Takes: 2,000 steps of 8,192 tokens, as every config of configs/lm.
Expected: a loss to hold against theirs, after equal tokens.
"""

from configs.schema import Data, Experiment, Optimizer
from models import lm
from models.attention import softmax
from models.block import residual, shared
from models.channel import glu
from models.state_space import mamba1


def get_config() -> Experiment:
    """The experiment."""
    mamba = residual.Config(mamba1.Config())
    return Experiment(
        model=lm.Config(
            width=384,
            depth=1,
            pattern=(
                shared.Config(
                    shared=residual.Config(softmax.Config(heads=4), glu.Config(hidden=768)),
                    blocks=(mamba, mamba, mamba),
                ),
            ),
        ),
        steps=2000,
        data=Data(length=512, batch=16),
        optimizer=Optimizer(learning_rate=2e-3, warmup_steps=200),
    )
