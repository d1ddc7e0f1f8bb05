"""eval.py as users run it: a process of its own, whose compiler takes as little as the tests'."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def program(folder: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "eval.py", *options]
    environment = {"PATH": "", "JAX_PLATFORMS": "cpu", "HOME": str(folder)}
    if "XLA_FLAGS" in os.environ:
        environment["XLA_FLAGS"] = os.environ["XLA_FLAGS"]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )
