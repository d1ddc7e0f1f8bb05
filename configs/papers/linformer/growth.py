"""Projected keys and values make attention O(n) (arXiv 2006.04768).

    python -m science.claims linformer/growth --run

Takes: seconds on a CPU; FLOPs are counted from the program's trace.
Expected: docs/claims.md.
"""

from configs.claims import Claim, Measured, Reaches, Stays
from configs.papers import _resources
from models.attention import bidirectional
from models.low_rank import linformer

CLAIM = Claim(
    says="With keys and values projected to a fixed number, attention of an encoder costs O(n).",
    source="arXiv 2006.04768, Table 1",
    published="O(n) a layer, against O(n^2).",
    scaled=_resources.GROWTH,
    checks=(Reaches("attention", 1.9), Stays("linformer", 1.02)),
    cost="seconds on a CPU",
)


def get_measures() -> dict[str, Measured]:
    """One layer each."""
    return _resources.growth(
        attention=bidirectional.Config(), linformer=linformer.Config(length=32768)
    )
