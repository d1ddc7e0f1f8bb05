"""Falcon-H1: attention and Mamba-2 side by side, then an MLP, 12.8M parameters, byte level.

    python train.py --config=configs/lm/hybrids/falcon_h1.py --workdir=runs/falcon_h1

Falcon-H1 (arXiv 2507.22448, section 2): every layer adds an attention and a Mamba-2 mixer that read
the same input. The released models sum the two with fixed multipliers; here each is normed and
weighed by learned gains.

Takes: 2,000 steps of 8,192 tokens, as every config of configs/lm.
Expected: a loss to hold against theirs, after equal tokens.
"""

from configs.schema import Data, Experiment, Optimizer
from models import lm
from models.attention import softmax
from models.block import heads
from models.state_space import mamba2


def get_config() -> Experiment:
    """The experiment."""
    return Experiment(
        model=lm.Config(
            width=384,
            depth=6,
            pattern=(
                heads.Config(
                    (
                        softmax.Config(heads=4, kv_heads=2),
                        mamba2.Config(expand=1, head_dim=32, state=64),
                    )
                ),
            ),
        ),
        steps=2000,
        data=Data(length=512, batch=16),
        optimizer=Optimizer(learning_rate=2e-3, warmup_steps=200),
    )
