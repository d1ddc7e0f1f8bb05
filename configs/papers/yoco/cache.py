"""A cache that all upper layers share does not grow with depth (arXiv 2405.05254).

    python -m science.claims yoco/cache --run

Takes: seconds on a CPU; bytes are those of the shapes.
Expected: docs/claims.md.
"""

from configs.claims import Claim, Measured, Reaches, Stays
from configs.papers import _resources
from models.attention import softmax
from models.block import yoco
from models.channel import glu
from models.linear_attention import retnet

CLAIM = Claim(
    says="YOCO keeps the keys and values of one layer where a Transformer keeps those of all.",
    source="arXiv 2405.05254, Table 1",
    published="O((N + C L) D) against O(L N D) for N tokens and L layers.",
    scaled="bytes a token of 16 layers of width 256, in bfloat16: one layer has 1,024. Our caches "
    "also keep the number of each token's document, 4 bytes.",
    checks=(
        *(Reaches("YOCO", 1024), Stays("YOCO", 1024 + 4)),
        *(Reaches("Transformer", 16384), Stays("Transformer", 16 * (1024 + 4))),
    ),
    cost="seconds on a CPU",
)


def get_measures() -> dict[str, Measured]:
    """Eight layers of retention below, eight that read the cache above; 16 of attention."""
    whole = yoco.Config(below=(retnet.Config(),) * 8, channel=glu.Config(), above=8)
    return {
        "YOCO": Measured("state", _resources.experiment(whole, 256), (1024, 2048), "slope"),
        "Transformer": Measured(
            "state", _resources.experiment(softmax.Config(), 256, 16), (1024, 2048), "slope"
        ),
    }
