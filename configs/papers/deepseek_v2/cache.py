"""The latent of MLA takes as much cache as 2.25 groups of GQA (arXiv 2405.04434).

    python -m science.claims deepseek_v2/cache --run

Takes: seconds on a CPU; bytes are those of the shapes.
Expected: docs/claims.md.
"""

from configs.claims import Claim, Measured, Reaches, Stays
from configs.papers import _resources
from models.attention import mla, softmax

CLAIM = Claim(
    says="DeepSeek-V2's attention keeps 576 numbers a token and layer for its 128 heads: as much "
    "as GQA with 2.25 groups.",
    source="arXiv 2405.04434, Table 1 and section 2.1.4",
    published="(d_c + d_h^R) l = 9/2 d_h l with d_c = 512, d_h^R = 64, d_h = 128; a group of GQA "
    "has 2 d_h l.",
    scaled="nothing: one layer of width 5,120, its shapes alone, in bfloat16. Our caches also keep "
    "the number of each token's document, 4 bytes.",
    checks=(
        *(Reaches("MLA", 1152), Stays("MLA", 1152 + 4)),
        *(Reaches("GQA, 2 groups", 1024), Stays("GQA, 2 groups", 1024 + 4)),
        *(Reaches("MHA", 65536), Stays("MHA", 65536 + 4)),
    ),
    cost="seconds on a CPU",
)


def get_measures() -> dict[str, Measured]:
    """Bytes of the cache a token."""
    latent = mla.Config(heads=128, head_dim=128, rope_dim=64, kv_rank=512, q_rank=1536)
    mixers = {
        "MLA": latent,
        "GQA, 2 groups": softmax.Config(heads=128, kv_heads=2, head_dim=128),
        "MHA": softmax.Config(heads=128, head_dim=128),
    }
    return {
        name: Measured("state", _resources.experiment(mixer, 5120), (1024, 2048), "slope")
        for name, mixer in mixers.items()
    }
