"""Mamba-2, 20.8M parameters, byte level, on Python's own source.

    python train.py --config=configs/lm/mamba2.py --workdir=runs/mamba2

Takes: 2,000 steps of 8,192 tokens, as every config of configs/lm.
Expected: a loss to hold against theirs, after equal tokens.
"""

from configs.schema import Data, Experiment, Optimizer
from models import lm
from models.block import residual
from models.state_space import mamba2


def get_config() -> Experiment:
    """The experiment."""
    return Experiment(
        model=lm.Config(
            width=512,
            depth=12,
            pattern=(residual.Config(mamba2.Config(head_dim=64, state=128)),),
        ),
        steps=2000,
        data=Data(length=512, batch=16),
        optimizer=Optimizer(learning_rate=2e-3, warmup_steps=200),
    )
