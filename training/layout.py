"""One state in two layouts: layers stacked to be scanned, or one by one, as `model.layers` says.

Of n blocks a period and P periods, layer p n + i is row p of stack i; the layers after the stacks
follow one by one. Moments and carried states have the paths of what they belong to.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models import lm
from training.leaves import named


class Place(NamedTuple):
    """What a leaf is of: a layer's number between the two parts of its name; -1: of no layer."""

    before: str
    layer: int
    after: str


def relaid(tree: Any, old: lm.Config, abstract: Any, new: lm.Config) -> Any:
    """`tree` of the model `old` in the layout of the model `new`: its values where `abstract` says.

    The two models differ in `layers` alone. ValueError where a leaf cannot be taken apart, as a
    moment that is shared by all layers of a stack.
    """
    if periods(old) == periods(new):
        return tree
    for name, leaf in named(tree).items():
        count = len(_places(name, old))
        if count > 1 and leaf.shape[:1] != (count,):
            raise ValueError(_stuck(name, old, new))
    wanted = {name: leaf.sharding for name, leaf in named(abstract).items()}

    def move(tree):
        held = {}
        for name, leaf in named(tree).items():
            places = _places(name, old)
            held.update(zip(places, leaf if _is_stack(name) else [leaf], strict=True))
        found = {}
        for name in wanted:
            places = _places(name, new)
            parts = [held[place] for place in places if place in held]
            if len(parts) < len(places) or len({part.shape for part in parts}) > 1:
                raise ValueError(_stuck(name, old, new))
            found[name] = jnp.stack(parts) if _is_stack(name) else parts[0]
        return found

    values = jax.jit(move, out_shardings=wanted)(tree)
    return jax.tree.unflatten(jax.tree.structure(abstract), [values[name] for name in wanted])


def periods(config: lm.Config) -> int:
    """How many layers a stack holds; 0 without stacks."""
    return config.depth // len(config.pattern) if config.layers == "scanned" else 0


def _stuck(name: str, old: lm.Config, new: lm.Config) -> str:
    return (
        f"model.layers={new.layers!r}: the checkpoint has {old.layers!r}, and its {name} is not "
        f"kept by layer. Use model.layers={old.layers!r}."
    )


def _is_stack(name: str) -> bool:
    return _found(name)[1] == "stacks"


def _found(name: str) -> tuple[str, str, int, str]:
    """A leaf's name as what is before "stacks" or "rest", that word, its number, what is after."""
    parts = name.split("/")
    for i, (word, number) in enumerate(itertools.pairwise(parts)):
        if word in ("stacks", "rest") and number.isdigit():
            return "/".join(parts[:i]), word, int(number), "/".join(parts[i + 2 :])
    return name, "", -1, ""


def _places(name: str, config: lm.Config) -> list[Place]:
    """The layers that a leaf holds, one for each row of a stack."""
    before, word, number, after = _found(name)
    blocks, rows = len(config.pattern), periods(config)
    if word == "stacks":
        return [Place(before, row * blocks + number, after) for row in range(rows)]
    return [Place(before, rows * blocks + number if word else -1, after)]
