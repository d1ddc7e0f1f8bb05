"""What is known of a model's weights: the names of their dimensions, and how many are at work."""

import math

import jax
from flax import nnx


def dims(model: nnx.Module) -> dict:
    """Names of the dimensions of every weight, as the nested dict that `nnx.to_pure_dict` gives."""

    def names(param):
        lead = len(param.shape) - len(param.get_metadata()["dims"])
        return ("layers",) * lead + param.get_metadata()["dims"]

    state = nnx.split(model)[1]
    named = jax.tree.map(names, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return nnx.to_pure_dict(named)


def active(model: nnx.Module) -> int:
    """Weights that work on one token: all but the experts that a token does not have."""
    weights = jax.tree.leaves(nnx.split(model)[1], is_leaf=lambda w: isinstance(w, nnx.Variable))
    return round(sum(math.prod(w.shape) * w.get_metadata()["share"] for w in weights))
