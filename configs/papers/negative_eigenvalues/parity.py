"""Parity beyond the trained length needs an eigenvalue of -1, or sLSTM's gates (arXiv 2411.12537).

    python -m science.claims negative_eigenvalues/parity --run

Takes: 25 minutes on one CPU core for 18 trials.
Expected: docs/claims.md.
"""

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

CLAIM = Claim(
    says="DeltaNet with eigenvalues in [-1, 1] and sLSTM solve parity at lengths beyond training; "
    "DeltaNet and Mamba with eigenvalues in [0, 1], GLA and attention do not.",
    source="arXiv 2411.12537, Table 2",
    published="(accuracy - 1/2) / (1/2) at lengths 40 to 256, best of three seeds: DeltaNet "
    "[-1, 1] 1.0, sLSTM 1.0, DeltaNet [0, 1] 0.017, Mamba [0, 1] 0.0, attention 0.022; "
    "trained at 3 to 40 for 100,000 steps of 1,024 words.",
    scaled="width 64 for 128, words of 3 to 24 bits in training and of 3 to 96 in validation, 500 "
    "steps of 128 words, one learning rate. Theory says of those that do not solve it that no "
    "training would help (they cannot change sign). sLSTM could, but did not in so few steps, nor "
    "in 750 at a rate of 5e-3.",
    checks=(
        Reaches("DeltaNet [-1, 1]", 0.95),
        Reaches("sLSTM", 0.95),
        Stays("DeltaNet [0, 1]", 0.65),
        Stays("GLA", 0.65),
        Stays("Mamba", 0.65),
        Stays("attention", 0.65),
    ),
    statistic="best",
    cost="25 minutes on one CPU core",
)


def get_config() -> Experiment:
    """DeltaNet with eigenvalues in (-1, 1)."""
    return Experiment(
        model=lm.Config(
            vocabulary=0,
            width=64,
            depth=2,
            pattern=(deltanet.Config(heads=4, beta_max=2.0),),
            dtype="float32",
            layers="unrolled",
        ),
        steps=500,
        log_every=100,
        data=Data(source=parity.Config(), length=24, batch=128),
        optimizer=Optimizer(learning_rate=2e-3, warmup_steps=50),
        checkpoint=Checkpoint(every_steps=250, keep=1, keep_best=0),
        evaluation=Evaluation(every_steps=100, batches=8, length=96, sample_tokens=0),
    )


def get_sweep(base: Experiment) -> Sweep:
    """The models of the claim."""
    models = {
        "DeltaNet [-1, 1]": (deltanet.Config(heads=4, beta_max=2.0),),
        "DeltaNet [0, 1]": (deltanet.Config(heads=4),),
        "GLA": (gla.Config(heads=4),),
        "Mamba": (mamba1.Config(),),
        "sLSTM": (slstm.Config(heads=4),),
        "attention": (softmax.Config(heads=4),),
    }
    return Sweep(base, {"model.pattern": models}, seeds=3)
