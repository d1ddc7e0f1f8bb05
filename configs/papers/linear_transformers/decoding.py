"""A token written by linear attention takes as long late in a text as early (arXiv 2006.16236).

    python -m science.claims linear_transformers/decoding --run

Takes: a minute on a CPU.
Expected: docs/claims.md.
"""

from configs.claims import Claim, Measured, Reaches, Stays
from configs.papers import _resources
from models.attention import softmax
from models.linear_attention import linear_transformer

CLAIM = Claim(
    says="Linear attention writes a token as fast after 16,384 tokens as after 256; softmax "
    "attention slows down.",
    source="arXiv 2006.16236, section 4.2 and Table 1",
    published="MNIST images of 784 tokens: 142.8 images/s against 0.45 (317 x); CIFAR-10 of 3,072: "
    "17.85 against 0.004 (4,462 x).",
    scaled="seconds of a written token after 16,384 tokens over those after 256, one layer of "
    "width 256, one sequence, float32; the softmax attention here keeps a cache, which the paper's "
    "baseline of these numbers does not, so that its factors are not the aim.",
    checks=(Reaches("attention", 2.0), Stays("linear attention", 1.3)),
    cost="a minute on a CPU",
)


def get_measures() -> dict[str, Measured]:
    """One layer each."""
    mixers = {"attention": softmax.Config(), "linear attention": linear_transformer.Config()}
    made = lambda mixer: _resources.experiment(mixer, width=256, dtype="float32")
    return {
        name: Measured("decode", made(mixer), (256, 16384), "growth")
        for name, mixer in mixers.items()
    }
