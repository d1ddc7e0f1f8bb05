"""A first run on a laptop: Mamba-2, 0.7M parameters, byte level, on Python's own source.

    python train.py --config=configs/quickstart.py --workdir=runs/quickstart

Takes: not yet measured.
Expected: not yet measured.
"""

from configs.schema import Checkpoint, Data, Evaluation, Experiment, Optimizer
from models import block, lm
from models.state_space import mamba2


def get_config() -> Experiment:
    """The experiment."""
    return Experiment(
        model=lm.Config(
            width=160,
            depth=4,
            pattern=(block.Config(mamba2.Config(head_dim=32, state=32)),),
            dtype="float32",
        ),
        steps=300,
        data=Data(length=256, batch=16),
        optimizer=Optimizer(learning_rate=4e-3, warmup_steps=30),
        checkpoint=Checkpoint(every_steps=100),
        evaluation=Evaluation(every_steps=100, batches=8),
    )
