"""Adding an architecture is adding a file: a toy one is found and proven; faults are caught."""

import importlib
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models.recurrent
from models import catalogue, lm
from tests import contract

TOY = """
    import dataclasses
    import jax.numpy as jnp
    from kernels.linear_scan import linear_scan
    from models import mixer, weights

    @dataclasses.dataclass
    class Config:
        decay: float = 0.9
        def build(self, width, rngs):
            return Mixer(self, width, rngs)

    class Mixer(mixer.Mixer):
        def __init__(self, config, width, rngs):
            init, shape = weights.fan_in(width), (width, width)
            self.w = weights.weight(rngs, init, shape, ("embed", "channels"))
            self.o = weights.weight(rngs, init, shape, ("channels", "embed"))
            self.decay = config.decay

        def __call__(self, x, *, segments=None, state=None):
            u = x @ self.w[...].astype(x.dtype)
            rate = jnp.full(u.shape, jnp.log(self.decay), mixer.wide(x.dtype))
            h, state = linear_scan(u, rate, segments={segments}, initial_state=state)
            return {h} @ self.o[...].astype(x.dtype), state

        def init_state(self, batch, capacity, dtype=jnp.float32):
            return jnp.zeros((batch, self.w.shape[1]), mixer.wide(dtype))
"""


@pytest.fixture
def add(tmp_path, monkeypatch):
    """A function that adds a file to the family `recurrent` for the length of a test."""
    monkeypatch.setattr(models.recurrent, "__path__", [*models.recurrent.__path__, str(tmp_path)])

    def write(name, **parts):
        source = textwrap.dedent(TOY)
        for key, value in parts.items():
            source = source.replace("{" + key + "}", value)
        (tmp_path / f"{name}.py").write_text(source)
        importlib.invalidate_caches()
        monkeypatch.delitem(sys.modules, f"models.recurrent.{name}", raising=False)
        return catalogue.cases()[f"recurrent.{name}"]

    return write


def test_a_new_file_is_found_and_proven(add):
    config = add("toy", segments="segments", h="h")
    for check in contract.CHECKS:
        check(config)


def test_a_new_file_trains_in_a_language_model(add):
    config = add("toy_lm", segments="segments", h="h")
    model = lm.Config(width=32, depth=2, pattern=(config,), dtype="float32").build(nnx.Rngs(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 257, (2, 16)))
    loss, nll = model.loss(tokens, tokens, jnp.ones((2, 16)))
    assert nll.shape == (2, 16) and np.isfinite(float(loss))


@pytest.mark.parametrize(
    ("fault", "parts", "check"),
    [
        ("leaks", dict(segments="None", h="h"), contract.packing),
        ("peeks", dict(segments="segments", h="jnp.roll(h, -1, axis=1)"), contract.causality),
        (
            "rounds",
            dict(segments="segments", h="(h * (1 + 1e-3 * (h.dtype == jnp.float32)))"),
            contract.reference,
        ),
    ],
)
def test_broken_ones_are_caught(add, fault, parts, check):
    config = add(fault, **parts)
    with pytest.raises((AssertionError, TypeError)):
        check(config)
