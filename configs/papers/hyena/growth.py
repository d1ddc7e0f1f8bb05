"""Long convolutions by FFT are subquadratic (arXiv 2302.10866).

    python -m science.claims hyena/growth --run

Takes: seconds on a CPU; FLOPs are counted from the program's trace.
Expected: docs/claims.md.
"""

from configs.claims import Claim, Measured, Reaches, Stays
from configs.papers import _resources
from models.attention import softmax
from models.convolution import hyena

CLAIM = Claim(
    says="The Hyena operator costs O(L log L).",
    source="arXiv 2302.10866, section 3.2",
    published="O(N D L (log L + D)) for order N, against O(L^2).",
    scaled=_resources.GROWTH,
    checks=(Reaches("attention", 1.9), Stays("hyena", 1.2)),
    cost="seconds on a CPU",
)


def get_measures() -> dict[str, Measured]:
    """One layer each."""
    return _resources.growth(
        attention=softmax.Config(), hyena=tuple(hyena.Config(length=n) for n in _resources.LENGTHS)
    )
