"""FAVOR+ costs O(L) (arXiv 2009.14794).

    python -m science.claims performer/growth --run

Takes: seconds on a CPU; FLOPs are counted from the program's trace.
Expected: docs/claims.md.
"""

from configs.claims import Claim, Measured, Reaches, Stays
from configs.papers import _resources
from models.attention import softmax
from models.linear_attention import performer

CLAIM = Claim(
    says="Attention by random features costs as much a token at any length.",
    source="arXiv 2009.14794, section 2.3",
    published="O(L r d) time against O(L^2 d).",
    scaled=_resources.GROWTH,
    checks=(Reaches("attention", 1.9), Stays("performer", 1.02)),
    cost="seconds on a CPU",
)


def get_measures() -> dict[str, Measured]:
    """One layer each."""
    return _resources.growth(attention=softmax.Config(), performer=performer.Config())
