"""MiniMax-01: seven lightning layers to one of softmax attention, 15.2M parameters, byte level.

    python train.py --config=configs/lm/hybrids/minimax.py --workdir=runs/minimax

MiniMax-01 (arXiv 2501.08313, section 2): lightning attention with a softmax layer, half of each
head rotary, after every seventh, and 32 experts of which a token has 2; here 4 experts.

Takes: 2,000 steps of 8,192 tokens, as every config of configs/lm.
Expected: a loss to hold against theirs, after equal tokens.
"""

from configs.schema import Data, Experiment, Optimizer
from models import lm
from models.attention import softmax
from models.channel import dropless
from models.linear_attention import lightning


def get_config() -> Experiment:
    """The experiment."""
    attention = softmax.Config(heads=4, kv_heads=2, rope_fraction=0.5)
    return Experiment(
        model=lm.Config(
            width=256,
            depth=8,
            channel=dropless.Config(experts=4, top_k=2, hidden=512),
            pattern=(*(lightning.Config(heads=4),) * 7, attention),
        ),
        steps=2000,
        data=Data(length=512, batch=16),
        optimizer=Optimizer(learning_rate=2e-3, warmup_steps=200),
    )
