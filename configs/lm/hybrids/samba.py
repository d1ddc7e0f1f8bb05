"""Samba: Mamba, sliding-window attention and MLPs in turn, 15.8M parameters, byte level.

    python train.py --config=configs/lm/hybrids/samba.py --workdir=runs/samba

Samba (arXiv 2406.07522, section 2): Mamba, MLP, sliding-window attention, MLP. The paper's window
is 2,048 of 4,096 tokens; here a quarter of the row.

Takes: 2,000 steps of 8,192 tokens, as every config of configs/lm.
Expected: a loss to hold against theirs, after equal tokens.
"""

from configs.schema import Data, Experiment, Optimizer
from models import lm
from models.attention import softmax
from models.block import residual
from models.channel import glu
from models.state_space import mamba1


def get_config() -> Experiment:
    """The experiment."""
    return Experiment(
        model=lm.Config(
            width=384,
            depth=8,
            pattern=(
                residual.Config(mamba1.Config(), glu.Config()),
                residual.Config(softmax.Config(heads=4, window=128), glu.Config()),
            ),
        ),
        steps=2000,
        data=Data(length=512, batch=16),
        optimizer=Optimizer(learning_rate=2e-3, warmup_steps=200),
    )
