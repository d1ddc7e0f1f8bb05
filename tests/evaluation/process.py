"""eval.py as users run it: a process of its own."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def program(folder: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "eval.py", *options]
    environment = {"PATH": "", "JAX_PLATFORMS": "cpu", "HOME": str(folder)}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )
