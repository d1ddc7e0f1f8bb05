"""Linear attention costs O(N) where softmax attention costs O(N^2) (arXiv 2006.16236).

    python -m science.claims linear_transformers/growth --run

Takes: seconds on a CPU; FLOPs are counted from the program's trace.
Expected: docs/claims.md.
"""

from configs.claims import Claim, Measured, Reaches, Stays
from configs.papers import _resources
from models.attention import softmax
from models.linear_attention import linear_transformer

CLAIM = Claim(
    says="The work of linear attention grows with the length of a row, that of softmax attention "
    "with its square.",
    source="arXiv 2006.16236, section 3.2.1",
    published="O(N) against O(N^2) in time and memory.",
    scaled=_resources.GROWTH,
    checks=(Reaches("attention", 1.9), Stays("linear attention", 1.02)),
    cost="seconds on a CPU",
)


def get_measures() -> dict[str, Measured]:
    """One layer each."""
    return _resources.growth(
        attention=softmax.Config(), linear_attention=linear_transformer.Config()
    )
