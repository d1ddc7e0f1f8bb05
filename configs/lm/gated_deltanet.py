"""Gated DeltaNet, 22.3M parameters, byte level, on Python's own source.

    python train.py --config=configs/lm/gated_deltanet.py --workdir=runs/gated_deltanet

Takes: 2,000 steps of 8,192 tokens, as every config of configs/lm.
Expected: a loss to hold against theirs, after equal tokens.
"""

from configs.schema import Data, Experiment, Optimizer
from models import lm
from models.delta import gated_deltanet


def get_config() -> Experiment:
    """The experiment."""
    return Experiment(
        model=lm.Config(
            width=512,
            depth=6,
            pattern=(gated_deltanet.Config(heads=4),),
        ),
        steps=2000,
        data=Data(length=512, batch=16),
        optimizer=Optimizer(learning_rate=2e-3, warmup_steps=200),
    )
