"""Retention decodes from a state of constant size (arXiv 2307.08621).

    python -m science.claims retnet/state --run

Takes: seconds on a CPU; bytes are those of the shapes.
Expected: docs/claims.md.
"""

from configs.claims import Claim, Measured, Reaches, Stays
from configs.papers import _resources
from models.attention import softmax
from models.linear_attention import retnet

CLAIM = Claim(
    says="What a retentive network carries from token to token does not grow.",
    source="arXiv 2307.08621, Table 1",
    published="O(1) inference cost a token, against O(N).",
    scaled=_resources.STATE,
    checks=(Reaches("attention", 15.9), Stays("retention", 1.0)),
    cost="seconds on a CPU",
)


def get_measures() -> dict[str, Measured]:
    """One layer each."""
    return _resources.state(attention=softmax.Config(), retention=retnet.Config())
