"""The cost estimates that TPU kernels state, for tests that hold them against formulas."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.extend import core

from kernels import setting


def costs(function: Callable, given: Any, **settings: Any) -> list[pl.CostEstimate]:
    """Of the launches of `function(**given)` as a TPU kernel and of its backward pass, in order."""

    def both(given):
        run = lambda given: function(**given, **settings, impl="pallas_tpu")
        outputs, pullback = jax.vjp(run, given)
        return pullback(jax.tree.map(jnp.ones_like, outputs))

    with setting.interpreting():
        return list(of_program(jax.make_jaxpr(both)(given).jaxpr))


def of_program(jaxpr: core.Jaxpr) -> Iterator[pl.CostEstimate]:
    """Of all launches of a program, in order."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            yield eqn.params["cost_estimate"]
        else:
            for inner in core.jaxprs_in_params(eqn.params):
                yield from of_program(inner)
