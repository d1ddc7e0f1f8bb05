"""The config files of this repository, and how a test reads one line of refusal."""

import ast
from pathlib import Path

import pytest

from configs import loading

ROOT = Path(__file__).parents[2]
FILES = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "configs").rglob("*.py")
    if any(
        isinstance(node, ast.FunctionDef) and node.name == "get_config"
        for node in ast.parse(path.read_text("utf-8")).body
    )
)
OPTIONS = {"workdir": "", "dry_run": False, "profile": "", "rounds": 3, "rate": 0.5}


def read(*argv: str):
    """The experiment that the command line asks for."""
    return loading.parse(argv, OPTIONS)[0][0]


def refusal(capsys, *argv: str) -> str:
    """The one line on stderr with which the command line is refused, exit code 2."""
    with pytest.raises(SystemExit) as stop:
        loading.run(lambda: loading.parse(argv, OPTIONS) and 0)
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == "" and err.endswith("\n") and err.count("\n") == 1
    assert err.startswith("config error: ")
    return err.removeprefix("config error: ").strip()
