"""A hybrid of RG-LRU and local attention keeps a bounded state (arXiv 2402.19427).

    python -m science.claims griffin/state --run

Takes: seconds on a CPU; bytes are those of the shapes.
Expected: docs/claims.md.
"""

from configs.claims import Claim, Measured, Reaches, Stays
from configs.papers import _resources
from configs.schema import Data, Experiment
from models import lm
from models.attention import softmax
from models.recurrent import rg_lru

AT = (2048, 65536)  # tokens

CLAIM = Claim(
    says="Griffin's state stops growing at its window of 1,024 tokens; a multi-query Transformer's "
    "cache grows on.",
    source="arXiv 2402.19427, section 4.2 and figure 4",
    published="a state of fixed size, against a cache that grows linearly and dominates from some "
    "thousand tokens on.",
    scaled="bytes after 65,536 tokens over those after 2,048, three layers of width 1,024.",
    checks=(Stays("Griffin", 1.0), Reaches("MQA Transformer", 31.9)),
    cost="seconds on a CPU",
)


def get_measures() -> dict[str, Measured]:
    """Two recurrent blocks to one of attention."""
    local = softmax.Config(heads=8, kv_heads=1, window=1024)
    griffin = lm.Config(
        vocabulary=8, width=1024, depth=3, pattern=(rg_lru.Config(), rg_lru.Config(), local)
    )
    return {
        "Griffin": Measured("state", Experiment(griffin, data=Data(batch=1)), AT, "growth"),
        "MQA Transformer": Measured(
            "state",
            _resources.experiment(softmax.Config(heads=8, kv_heads=1), 1024, 3),
            AT,
            "growth",
        ),
    }
