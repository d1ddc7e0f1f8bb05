"""Window, global and random blocks make attention O(n) (arXiv 2007.14062).

    python -m science.claims bigbird/growth --run

Takes: seconds on a CPU; FLOPs are counted from the program's trace.
Expected: docs/claims.md.
"""

from configs.claims import Claim, Measured, Reaches, Stays
from configs.papers import _resources
from models.attention import softmax
from models.sparse_attention import bigbird

CLAIM = Claim(
    says="Attention to a window, global blocks and random ones costs O(n).",
    source="arXiv 2007.14062, section 2",
    published="linear in the number of tokens.",
    scaled=_resources.GROWTH,
    checks=(Reaches("attention", 1.9), Stays("bigbird", 1.02)),
    cost="seconds on a CPU",
)


def get_measures() -> dict[str, Measured]:
    """One layer each."""
    return _resources.growth(attention=softmax.Config(), bigbird=bigbird.Config())
