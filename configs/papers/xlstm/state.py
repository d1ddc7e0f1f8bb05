"""xLSTM's memory is constant in the length (arXiv 2405.04517).

    python -m science.claims xlstm/state --run

Takes: seconds on a CPU; bytes are those of the shapes.
Expected: docs/claims.md.
"""

from configs.claims import Claim, Measured, Reaches, Stays
from configs.papers import _resources
from models.attention import softmax
from models.linear_attention import mlstm
from models.recurrent import slstm

CLAIM = Claim(
    says="What mLSTM and sLSTM carry from token to token does not grow.",
    source="arXiv 2405.04517, section 2.5",
    published="constant memory with respect to sequence length.",
    scaled=_resources.STATE,
    checks=(Reaches("attention", 15.9), Stays("mLSTM", 1.0), Stays("sLSTM", 1.0)),
    cost="seconds on a CPU",
)


def get_measures() -> dict[str, Measured]:
    """One layer each."""
    return _resources.state(attention=softmax.Config(), mLSTM=mlstm.Config(), sLSTM=slstm.Config())
