"""Landmarks make attention O(n) (arXiv 2102.03902).

    python -m science.claims nystromformer/growth --run

Takes: seconds on a CPU; FLOPs are counted from the program's trace.
Expected: docs/claims.md.
"""

from configs.claims import Claim, Measured, Reaches, Stays
from configs.papers import _resources
from models.attention import bidirectional
from models.low_rank import nystromformer

CLAIM = Claim(
    says="Attention through a fixed number of landmarks costs O(n).",
    source="arXiv 2102.03902, section 3.4",
    published="O(n) in time and memory, against O(n^2).",
    scaled=_resources.GROWTH,
    checks=(Reaches("attention", 1.9), Stays("nystromformer", 1.02)),
    cost="seconds on a CPU",
)


def get_measures() -> dict[str, Measured]:
    """One layer each."""
    return _resources.growth(attention=bidirectional.Config(), nystromformer=nystromformer.Config())
