"""Switch: a mixture whose tokens have one expert each, and experts a limited capacity.

Switch Transformers (arXiv 2101.03961, eqs. 2 to 5). Notable: a dropped token passes by, its output
here is zero. The paper counts the capacity over a group of tokens, later ones and other documents
included; ours runs along the document, so that decoding and packing change nothing: the token at
position t stays if its expert was chosen at most max(least, ceil(factor (t + 1) / E)) times so far.
`least` is what the start of a document gets, where few tokens would make even loads look full.
Left out: jitter of the router's input, and its smaller initialisation.
"""

import dataclasses

from flax import nnx

from models.parts import capacity


@dataclasses.dataclass
class Config(capacity.Settings):
    """Experts, their size and their capacity."""

    capacity_factor: float = 1.25

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where a size does not fit."""
        return Mixer(self, width, rngs)


CASES = {"switch": Config()}


class Mixer(capacity.Mixer):
    """y = p_e relu(x W_e) V_e, e = argmax p, p = softmax(x W_r); 0 for a dropped token."""

    top_k = 1
    in_proportion = False
