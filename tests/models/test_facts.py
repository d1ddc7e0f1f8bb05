"""The catalogue's record is of the code as it is; the command prints whole lines into a pipe."""

import subprocess
import sys
from pathlib import Path

import pytest

from models import catalogue, facts
from models.linear_attention import gla

ROOT = Path(__file__).parents[2]
CASES = catalogue.cases()
FIRST = list({name.partition(".")[0]: name for name in reversed(CASES)}.values())  # of each family


@pytest.mark.parametrize("name", CASES)
def test_the_record_is_of_this_code(name):
    assert facts.known(CASES[name]), "python -m models --renew --markdown docs/architectures.md"


@pytest.mark.parametrize(
    "name",
    [name if name in FIRST else pytest.param(name, marks=pytest.mark.long) for name in CASES],
)
def test_the_record_is_what_the_code_says(name):
    assert facts.known(CASES[name]) == facts.facts(CASES[name])


def test_other_settings_are_not_on_record():
    assert facts.known(gla.Config()) and facts.known(gla.Config(heads=2)) is None


def run(*words: str) -> str:
    command = [sys.executable, "-m", "models", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_piped_lines_are_whole():
    (line,) = [line for line in run("gla").splitlines() if " gla " in line]
    assert "linear_attention" in line and "2312.06635" in line and "gated_linear" in line


def test_a_closed_pipe_ends_it_quietly():
    done = subprocess.run(
        f"{sys.executable} -m models | head -1",
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.count("\n") == 1 and done.stderr == ""
