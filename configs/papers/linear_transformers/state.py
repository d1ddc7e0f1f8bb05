"""Linear attention decodes from a state of constant size (arXiv 2006.16236).

    python -m science.claims linear_transformers/state --run

Takes: seconds on a CPU; bytes are those of the shapes.
Expected: docs/claims.md.
"""

from configs.claims import Claim, Measured, Reaches, Stays
from configs.papers import _resources
from models.attention import softmax
from models.linear_attention import linear_transformer

CLAIM = Claim(
    says="What linear attention carries from token to token does not grow; the cache of softmax "
    "attention does, with every token.",
    source="arXiv 2006.16236, section 3.4",
    published="constant time and memory a token in inference, against O(N).",
    scaled=_resources.STATE,
    checks=(Reaches("attention", 15.9), Stays("linear attention", 1.0)),
    cost="seconds on a CPU",
)


def get_measures() -> dict[str, Measured]:
    """One layer each."""
    return _resources.state(
        attention=softmax.Config(), linear_attention=linear_transformer.Config()
    )
