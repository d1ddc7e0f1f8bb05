"""A sweep on PostgreSQL, as several machines share one: pytest -m postgres, which starts a server.

Needs `initdb` and `pg_ctl` (Debian: postgresql) and the extra `postgres`.
"""

import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import optuna
import pytest

from tests.science.test_sweep import check_kills

pytestmark = pytest.mark.postgres


@pytest.fixture(scope="module")
def server():
    """The address of a server of our own, in a folder that goes away with it."""
    if not shutil.which("initdb") or not shutil.which("pg_ctl"):
        pytest.skip("needs PostgreSQL's initdb and pg_ctl")
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    as_owner = []
    if os.getuid() == 0:  # the server refuses to be root
        shutil.chown(folder, "postgres")
        as_owner = ["runuser", "-u", "postgres", "--"]
    data = folder / "data"
    subprocess.run([*as_owner, "initdb", "-A", "trust", "-U", "sweeps", "-D", data], check=True)
    options = f"-p {port} -h 127.0.0.1 -k {folder}"
    control = [*as_owner, "pg_ctl", "-D", data, "-l", folder / "log", "-w"]
    subprocess.run([*control, "-o", options, "start"], check=True)
    yield f"postgresql+psycopg://sweeps@127.0.0.1:{port}/postgres"
    subprocess.run([*control, "-m", "immediate", "stop"], check=True)
    shutil.rmtree(folder)


def test_ten_kills_of_a_sweep_of_twenty_four_on_postgresql(command, tmp_path, server):
    """Every point is finished exactly once, and the table is that of an unbroken one on SQLite."""
    flags = ["--sweep.model.pattern=gla,attention", "--seeds=4"]
    flags += ["--sweep.optimizer.learning_rate=1e-3,3e-3,1e-2"]
    check_kills(command, tmp_path, flags, 24, 10, storage=server)
    names = optuna.get_all_study_names(server)
    assert names == ["s"]
