"""A config of a task that trains within a second, and the command that sweeps over it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = '''"""Parity of three bits, a model of one layer."""

from configs.schema import Checkpoint, Data, Evaluation, Experiment, Optimizer
from data.tasks import parity
from models import lm


def get_config():
    return Experiment(
        model=lm.Config(vocabulary=0, width=8, depth=1, dtype="float32", layers="unrolled"),
        steps=12,
        log_every=4,
        data=Data(source=parity.Config(held_out=64), length=8, batch=8),
        optimizer=Optimizer(warmup_steps=2),
        checkpoint=Checkpoint(every_steps=2, keep=1, keep_best=0),
        evaluation=Evaluation(every_steps=4, batches=2, sample_tokens=0),
    )
'''


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    """The file."""
    path = tmp_path_factory.mktemp("config") / "bits.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="session")
def command(config, tmp_path_factory):
    """Starts sweep.py with these flags on one CPU device; the process."""
    caches = str(tmp_path_factory.mktemp("caches"))

    def start(*flags):
        return subprocess.Popen(
            [sys.executable, "sweep.py", f"--config={config}", "--heartbeat=1", *map(str, flags)],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": caches},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    return start
