"""A config file that needs no architecture, and the repository's root as working folder."""

import pytest

from tests.configs.shipped import ROOT

PLAIN = """
import dataclasses
from typing import Any, Literal

from configs.schema import Data, Experiment, Optimizer


@dataclasses.dataclass
class Part:
    heads: int = 4
    rates: tuple[float, ...] = (0.5, 1.0)


@dataclasses.dataclass
class Model:
    width: int = 8
    scale: float = 1.0
    fast: bool = False
    name: str = "x"
    kind: Literal["red", "green"] = "red"
    sizes: tuple = (1, 2)
    pair: tuple[int, int] = (1, 2)
    words: tuple = ()
    grid: tuple = ((1, 2), (3, 4))
    limit: int | None = None
    function: Any = None
    part: Part = dataclasses.field(default_factory=Part)
    pattern: tuple = (Part(),) * 3


def get_config(arg=""):
    if arg == "none":
        return None
    if arg.startswith("raise"):
        raise ValueError("arg='raise' must be 'none'.\\nUse 'none'.")
    if arg == "bug":
        return 1 / 0
    if arg == "float":
        return Experiment(model=Model(), steps=1e3)
    if arg == "bare":
        return Experiment()
    return Experiment(model=Model(name=arg))
"""


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def plain(tmp_path) -> str:
    """Path of a config file with every kind of field."""
    file = tmp_path / "plain.py"
    file.write_text(PLAIN)
    return str(file)
