"""A window and global tokens make attention O(n) (arXiv 2004.05150).

    python -m science.claims longformer/growth --run

Takes: seconds on a CPU; FLOPs are counted from the program's trace.
Expected: docs/claims.md.
"""

from configs.claims import Claim, Measured, Reaches, Stays
from configs.papers import _resources
from models.attention import softmax
from models.sparse_attention import longformer

CLAIM = Claim(
    says="Attention to a window and a few global blocks costs O(n).",
    source="arXiv 2004.05150, section 3.1",
    published="O(n w) for a window of w, against O(n^2).",
    scaled=_resources.GROWTH,
    checks=(Reaches("attention", 1.9), Stays("longformer", 1.02)),
    cost="seconds on a CPU",
)


def get_measures() -> dict[str, Measured]:
    """One layer each."""
    return _resources.growth(attention=softmax.Config(), longformer=longformer.Config())
