"""Which weights a program rounds before it multiplies or adds them to activations.

A gain, bias or skip meets every token by itself, so that its gradient is a sum over all tokens:
summed in bfloat16 where the weight was rounded first. Maps (`dot_general` that sums over an axis,
convolutions) are meant to run in the dtype of the activations.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.extend import core

ELEMENTWISE = frozenset("add add_any sub mul div max min pow dot_general".split())


def rounded(program: core.ClosedJaxpr, weights: int) -> list[str]:
    """Operations in bfloat16 between activations and what the first `weights` inputs alone made."""
    inputs = program.jaxpr.invars
    found: set[str] = set()
    _walk(program.jaxpr, ["weight"] * weights + ["data"] * (len(inputs) - weights), found)
    return sorted(found)


def _walk(jaxpr: core.Jaxpr, kinds: Sequence[str], found: set[str]) -> list[str]:
    """What had a part in each output: "data", else "weight", else "constant"."""
    kind = dict(zip(jaxpr.invars, kinds, strict=True))
    of = lambda atom: "constant" if isinstance(atom, core.Literal) else kind.get(atom, "constant")
    for equation in jaxpr.eqns:
        given = [of(atom) for atom in equation.invars]
        if _rounds(equation, given):
            shapes = " and ".join(str(atom.aval) for atom in equation.invars)
            found.add(f"{equation.primitive.name} of {shapes}")
        kind.update(zip(equation.outvars, _results(equation, given, found), strict=True))
    return [of(atom) for atom in jaxpr.outvars]


def _results(equation: core.JaxprEqn, given: list[str], found: set[str]) -> list[str]:
    """Kinds of the equation's outputs; programs inside it, such as a loop's body, are walked."""
    results, count = [], len(equation.outvars)
    for body in core.jaxprs_in_params(equation.params):
        # The condition of a `cond` and the constants of a `while` test come first.
        entered = given[len(given) - len(body.invars) :]
        if len(entered) == len(body.invars) and len(body.outvars) == count:
            first = equation.params.get("num_consts", 0)
            for i in range(equation.params.get("num_carry", 0)):
                # What a step of a scan leaves is what the next one finds.
                entered[first + i] = _of((entered[first + i], _walk(body, entered, set())[i]))
            results.append(_walk(body, entered, found))
    return [_of(parts) for parts in zip(*results, strict=True)] or [_of(given)] * count


def _of(kinds: Sequence[str]) -> str:
    return next((kind for kind in ("data", "weight") if kind in kinds), "constant")


def _rounds(equation: core.JaxprEqn, given: Sequence[str]) -> bool:
    name, out = equation.primitive.name, equation.outvars[0].aval
    if name not in ELEMENTWISE or out.dtype != jnp.bfloat16 or set(given) != {"data", "weight"}:
        return False
    return name != "dot_general" or not equation.params["dimension_numbers"][0][0]
