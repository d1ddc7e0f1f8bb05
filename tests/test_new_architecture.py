"""Adding an architecture is adding a file: a toy one is found and proven; faults are caught."""

import importlib.util
import sys
import textwrap
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models.recurrent
from configs.schema import Data
from data import pipeline
from models import catalogue, lm
from tests import contract

ROOT = Path(__file__).parents[1]
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

    def write(name, source=TOY, **parts):
        source = textwrap.dedent(source)
        for key, value in parts.items():
            source = source.replace("{" + key + "}", value)
        (tmp_path / f"{name}.py").write_text(source)
        importlib.invalidate_caches()
        monkeypatch.delitem(sys.modules, f"models.recurrent.{name}", raising=False)
        return catalogue.cases()[f"recurrent.{name}"]

    return write


def printed(page: str, beginning: str) -> str:
    """The block of code of docs/PAGE.md that begins so."""
    blocks = (ROOT / "docs" / f"{page}.md").read_text("utf-8").split("```python\n")[1:]
    return next(b.partition("```")[0] for b in blocks if b.startswith(beginning))


def test_a_new_file_is_found_and_proven(add):
    """The example of docs/extend.md, whole."""
    config = add("decay", printed("extend", '"""A leaky sum'))
    for check in contract.CHECKS:
        check(config)


@pytest.mark.parametrize(
    ("right", "wrong", "line"),
    [
        (
            "(self, batch, capacity, dtype=jnp.float32)",
            "(self, batch)",
            r"init_state\(self, batch\)",
        ),
        ("segments=None, state=None", "state=None", r"__call__\(self, x, \*, state=None\)"),
    ],
)
def test_a_wrong_signature_is_one_line(add, right, wrong, line):
    with pytest.raises(
        TypeError, match=rf"^models.recurrent.odd.Mixer.{line} must take \(self, .*"
    ):
        add("odd", textwrap.dedent(TOY).replace(right, wrong))


def test_the_source_of_tokens_in_the_docs_works(tmp_path):
    (tmp_path / "lines.py").write_text(printed("extend", '"""The lines of one file'))
    found = importlib.util.spec_from_file_location("lines", tmp_path / "lines.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    file = tmp_path / "lines.txt"
    file.write_text("\n".join(f"line {i}" for i in range(200)))
    data = Data(source=module.Config(str(file)), length=16, batch=4, folder=str(tmp_path))
    split = pipeline.open_split(data, "train")
    assert split.documents > 100 and split.batch(0)["inputs"].shape == (4, 16)


def test_the_task_in_the_docs_works(tmp_path):
    (tmp_path / "first.py").write_text(printed("extend", '"""Recall the first'))
    found = importlib.util.spec_from_file_location("first", tmp_path / "first.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    split = pipeline.open_split(Data(source=module.Config(), length=16, batch=4), "train")
    batch = split.batch(0)
    np.testing.assert_array_equal(batch["targets"][:, -1], batch["inputs"][:, 0])
    assert split.vocabulary == 8 and split.metric == "accuracy" and batch["weights"].sum() == 4


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
