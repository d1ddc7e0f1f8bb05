"""Parity needs an eigenvalue of -1, or a gate that forgets (arXiv 2411.12537, Table 2)."""

from configs.claims import Claim, Reaches, Stays
from configs.schema import Checkpoint, Data, Evaluation, Experiment, Optimizer
from configs.sweep import Sweep
from data.tasks import parity
from models import lm
from models.attention import softmax
from models.delta import deltanet
from models.linear_attention import gla
from models.recurrent import slstm
from models.state_space import mamba1

CLAIM = None


def get_config() -> Experiment:
    """DeltaNet with eigenvalues in (-1, 1)."""
    return Experiment(
        model=lm.Config(vocabulary=0, width=64, depth=2, pattern=(deltanet.Config(heads=4, beta_max=2.0),), dtype="float32", layers="unrolled"),
        steps=2000,
        log_every=100,
        data=Data(source=parity.Config(shortest=3), length=40, batch=128),
        optimizer=Optimizer(learning_rate=1e-3, warmup_steps=200, weight_decay=0.1),
        checkpoint=Checkpoint(every_steps=1000, keep=1, keep_best=0),
        evaluation=Evaluation(every_steps=200, batches=4, length=128, sample_tokens=0),
    )


def get_sweep(base):
    models = {
        "DeltaNet [-1, 1]": {"model.pattern": (deltanet.Config(heads=4, beta_max=2.0),)},
        "DeltaNet [0, 1]": {"model.pattern": (deltanet.Config(heads=4),)},
        "GLA": {"model.pattern": (gla.Config(heads=4),)},
        "Mamba": {"model.pattern": (mamba1.Config(),)},
        "sLSTM": {"model.pattern": (slstm.Config(heads=4),)},
        "attention": {"model.pattern": (softmax.Config(heads=4),)},
    }
    return Sweep(base, {"model": models}, seeds=1)
