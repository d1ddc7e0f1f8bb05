"""One head of keys and values for all queries shrinks the cache (arXiv 1911.02150).

    python -m science.claims multi_query/cache --run

Takes: seconds on a CPU; bytes are those of the shapes.
Expected: docs/claims.md.
"""

from configs.claims import Claim, Measured, Reaches, Stays
from configs.papers import _resources
from models.attention import softmax

CLAIM = Claim(
    says="Multi-query attention keeps 1/h of the bytes a token that multi-head attention keeps, "
    "and groups of 8 heads (GQA) 1/8.",
    source="arXiv 1911.02150, section 3; arXiv 2305.13245, section 2.2",
    published="a cache smaller by the number of heads (64 heads of 128: 32,768 bytes a token and "
    "layer in bfloat16, 4,096 in 8 groups, 512 with one).",
    scaled="nothing: one layer of width 8,192 with 64 heads, its shapes alone. Our caches also "
    "keep the number of each token's document, 4 bytes.",
    checks=(
        *(Reaches("multi-head", 32768), Stays("multi-head", 32768 + 4)),
        *(Reaches("8 groups", 4096), Stays("8 groups", 4096 + 4)),
        *(Reaches("multi-query", 512), Stays("multi-query", 512 + 4)),
    ),
    cost="seconds on a CPU",
)


def get_measures() -> dict[str, Measured]:
    """Bytes of the cache a token."""
    groups = {"multi-head": 64, "8 groups": 8, "multi-query": 1}
    made = {name: softmax.Config(heads=64, kv_heads=count) for name, count in groups.items()}
    return {
        name: Measured("state", _resources.experiment(mixer, 8192), (1024, 2048), "slope")
        for name, mixer in made.items()
    }
