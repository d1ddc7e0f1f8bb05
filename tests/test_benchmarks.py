"""Every benchmark starts, and (marker `benchmarks`, extra `peers`) runs once at a small size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(p for p in (ROOT / "benchmarks").glob("*.py") if not p.name.startswith("_"))
MODELS = ("llama", "mamba2", "recurrent_gemma", "qwen3_next")
SIDES = ("xla", "ref", "torch", "transformers", "associative_scan")


def run(script: str | Path, *words: str, folder: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_it_starts(script, tmp_path):
    """From anywhere, without torch."""
    done = run(script, "--help", folder=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("usage:"), done.stderr


def test_no_script_hides_a_package():
    """The folder of a script that runs is on the path: transformers looks for a package there."""
    packages = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    assert not packages & {path.stem for path in (ROOT / "benchmarks").glob("*.py")}


@pytest.mark.benchmarks
@pytest.mark.parametrize("mode", ["train", "decode"])
@pytest.mark.parametrize("model", MODELS)
def test_models_beside_transformers(model, mode, tmp_path):
    words = ("--size", "tiny", "--model", model, "--mode", mode, "--rounds", "2")
    done = run("cpu_vs_torch.py", *words, "--json", str(tmp_path / "found.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = json.loads((tmp_path / "found.json").read_text())["records"]
    assert record["model"] == model and all(record["times"][side] for side in ("ours", "theirs"))


@pytest.mark.benchmarks
def test_operations_side_by_side(tmp_path):
    words = ("--impl", *SIDES, "--rounds", "1", "--least", "0", "--length", "64", "--width", "32")
    words += ("--heads", "2", "--dim", "16", "--json", str(tmp_path / "found.json"))
    done = run("operations.py", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = json.loads((tmp_path / "found.json").read_text())["lines"]
    assert {line["implementation"] for line in lines} == set(SIDES)
