"""RWKV decodes from a state of constant size (arXiv 2305.13048).

    python -m science.claims rwkv/state --run

Takes: seconds on a CPU; bytes are those of the shapes.
Expected: docs/claims.md.
"""

from configs.claims import Claim, Measured, Reaches, Stays
from configs.papers import _resources
from models.attention import softmax
from models.recurrent import rwkv4

CLAIM = Claim(
    says="What RWKV carries from token to token does not grow.",
    source="arXiv 2305.13048, Table 1",
    published="O(d) space in inference, against O(T d) and more.",
    scaled=_resources.STATE,
    checks=(Reaches("attention", 15.9), Stays("rwkv", 1.0)),
    cost="seconds on a CPU",
)


def get_measures() -> dict[str, Measured]:
    """One layer each."""
    return _resources.state(attention=softmax.Config(), rwkv=rwkv4.Config())
