"""Re-weighting by cosines keeps linear attention linear (arXiv 2202.08791).

    python -m science.claims cosformer/growth --run

Takes: seconds on a CPU; FLOPs are counted from the program's trace.
Expected: docs/claims.md.
"""

from configs.claims import Claim, Measured, Reaches, Stays
from configs.papers import _resources
from models.attention import softmax
from models.linear_attention import cosformer

CLAIM = Claim(
    says="cosFormer's re-weighting by position keeps the work linear in the length.",
    source="arXiv 2202.08791, section 3.3",
    published="O(N d^2) against O(N^2 d).",
    scaled=_resources.GROWTH,
    checks=(Reaches("attention", 1.9), Stays("cosformer", 1.02)),
    cost="seconds on a CPU",
)


def get_measures() -> dict[str, Measured]:
    """One layer each."""
    return _resources.growth(attention=softmax.Config(), cosformer=cosformer.Config())
