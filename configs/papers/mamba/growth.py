"""A selective state space is linear in the length (arXiv 2312.00752).

    python -m science.claims mamba/growth --run

Takes: seconds on a CPU; FLOPs are counted from the program's trace.
Expected: docs/claims.md.
"""

from configs.claims import Claim, Measured, Reaches, Stays
from configs.papers import _resources
from models.attention import softmax
from models.state_space import mamba1

CLAIM = Claim(
    says="A layer of Mamba costs as much a token at any length.",
    source="arXiv 2312.00752, section 3.3",
    published="O(B L D N) FLOPs in recurrent mode; linear scaling up to a million tokens.",
    scaled=_resources.GROWTH,
    checks=(Reaches("attention", 1.9), Stays("mamba", 1.02)),
    cost="seconds on a CPU",
)


def get_measures() -> dict[str, Measured]:
    """One layer each."""
    return _resources.growth(attention=softmax.Config(), mamba=mamba1.Config())
