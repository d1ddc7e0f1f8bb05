"""A call of a public function of kernels/, as the survey compiles it and benchmarks time it."""

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Arrays = dict[str, Any]  # by name; arrays, or shapes in their place


class Subject(NamedTuple):
    """The function and all that it is given: arrays, or their shapes, and settings.

    A NumPy array is a setting: known when the program is traced, as static lists of blocks.
    """

    folder: str
    function: str
    given: dict[str, Any]

    @property
    def arrays(self) -> Arrays:
        """What of `given` is an array or its shape."""
        kinds = (jax.Array, jax.ShapeDtypeStruct)
        return {name: x for name, x in self.given.items() if isinstance(x, kinds)}

    def call(self, impl: str | None = None) -> Callable:
        """The function, which takes the arrays by name."""
        public = getattr(importlib.import_module(f"kernels.{self.folder}"), self.function)
        settings = {name: x for name, x in self.given.items() if name not in self.arrays}
        return functools.partial(public, impl=impl, **settings)

    def outputs(self) -> Any:
        """The shapes of the results."""
        return jax.eval_shape(lambda arrays: self.call("xla")(**arrays), self.arrays)

    def parts(self) -> tuple[Arrays, Arrays]:
        """(arrays with a gradient, the others)."""
        cases = importlib.import_module(f"kernels.{self.folder}.cases")
        constant = getattr(cases, "NO_GRADIENT", ())
        free = {
            name: x
            for name, x in self.arrays.items()
            if name not in constant and jnp.issubdtype(x.dtype, jnp.floating)
        }
        return free, {name: x for name, x in self.arrays.items() if name not in free}


def both_passes(function: Callable) -> Callable:
    """(free, fixed, slopes) -> (results, gradients by name) of a function of arrays by name."""

    def run(free: Arrays, fixed: Arrays, slopes: Any):
        results, pull = jax.vjp(lambda free: function(**free, **fixed), free)
        return results, pull(slopes)[0]

    return run
