"""Any pattern of layers as text after the file's name; by default 11.8M parameters, byte level.

    python train.py --config='configs/lm/pattern.py:(mamba2*3,window:128,moe)*2' \
        --workdir=runs/pattern

Names are those of `python -m models`. A channel mixer in the text stands as a layer of its own;
with one anywhere in it, no other channel mixers are added.

Takes: 2,000 steps of 8,192 tokens, each as long as the layers that are named.
Expected: a loss that falls.
"""

from configs.schema import Data, Experiment, Optimizer
from models import lm, pattern
from models.channel import glu


def get_config(text: str = "(mamba2*3,window:128,moe)*2") -> Experiment:
    """The experiment with the layers of `text`, once each."""
    layers = pattern.parse(text)
    channel = None if any(map(lm.is_channel, layers)) else glu.Config()
    return Experiment(
        model=lm.Config(
            width=256,
            depth=len(layers),
            pattern=pattern.period(layers),
            channel=channel,
        ),
        steps=2000,
        data=Data(length=512, batch=16),
        optimizer=Optimizer(learning_rate=2e-3, warmup_steps=200),
    )
