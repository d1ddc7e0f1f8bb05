"""MatMul-free LM: ternary weights everywhere, 10.7M parameters, byte level.

    python train.py --config=configs/lm/hybrids/matmul_free.py --workdir=runs/matmul_free

Scalable MatMul-free Language Modeling (arXiv 2406.02528): a linear gated recurrence and a gated
linear unit whose maps are of -1, 0 and 1.

Takes: 2,000 steps of 8,192 tokens, as every config of configs/lm.
Expected: a loss to hold against theirs, after equal tokens.
"""

from configs.schema import Data, Experiment, Optimizer
from models import lm
from models.channel import bit_linear
from models.recurrent import mlgru


def get_config() -> Experiment:
    """The experiment."""
    return Experiment(
        model=lm.Config(
            width=384,
            depth=6,
            channel=bit_linear.Config(),
            pattern=(mlgru.Config(),),
        ),
        steps=2000,
        data=Data(length=512, batch=16),
        optimizer=Optimizer(learning_rate=4e-3, warmup_steps=200),
    )
