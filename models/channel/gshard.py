"""GShard: a mixture with two experts a token and a limited capacity.

GShard (arXiv 2006.16668, section 2.2, algorithm 1). Notable: the two weights sum to 1, and a choice
beyond its expert's capacity is dropped alone. The paper counts the capacity, 2 N / E, over a group
of N tokens, first choices before second ones; ours runs along the document, so that decoding and
packing change nothing: the token at position t stays if its expert was chosen at most
max(least, ceil(2 factor (t + 1) / E)) times so far, as first or second. `least` is what the start
of a document gets. The second expert is always asked (the paper: at random, by its weight). The
loss counts first choices as the paper does, in the scale of Switch: 1 when even.
"""

import dataclasses

from flax import nnx

from models.parts import capacity


@dataclasses.dataclass
class Config(capacity.Settings):
    """Experts, their size and their capacity."""

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where a size does not fit."""
        return Mixer(self, width, rngs)


CASES = {"gshard": Config()}


class Mixer(capacity.Mixer):
    """y = sum over the two e of highest p = softmax(x W_r) of p_e / (p_1 + p_2) relu(x W_e) V_e."""

    top_k = 2
    in_proportion = True
