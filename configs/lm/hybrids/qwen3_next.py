"""Qwen3-Next: three Gated DeltaNet layers to one of gated attention, 13.0M parameters, byte level.

    python train.py --config=configs/lm/hybrids/qwen3_next.py --workdir=runs/qwen3_next

Qwen3-Next (Qwen team, 2025; its parts: arXiv 2412.06464 and 2505.06708): gated attention with norms
on q and k and a quarter of each head rotary, and fine-grained experts, one of them shared; here 16
experts.

Takes: 2,000 steps of 8,192 tokens, as every config of configs/lm.
Expected: a loss to hold against theirs, after equal tokens.
"""

from configs.schema import Data, Experiment, Optimizer
from models import lm
from models.attention import softmax
from models.channel import deepseek_moe
from models.delta import gated_deltanet


def get_config() -> Experiment:
    """The experiment."""
    delta = gated_deltanet.Config(heads=4, value_heads=8, key_dim=32, value_dim=32)
    attention = softmax.Config(heads=4, kv_heads=2, qk_norm=True, gated=True, rope_fraction=0.25)
    return Experiment(
        model=lm.Config(
            width=256,
            depth=4,
            channel=deepseek_moe.Config(experts=16, top_k=4, shared=1, score="softmax"),
            predict=2,
            pattern=(delta, delta, delta, attention),
        ),
        steps=2000,
        data=Data(length=512, batch=16),
        optimizer=Optimizer(learning_rate=2e-3, warmup_steps=200),
    )
