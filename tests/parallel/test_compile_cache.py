"""The compile cache: later processes read it, damage costs a compilation, the folder is private."""

import itertools
import json
import os
import stat
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from data import token_cache
from parallel import compile_cache

ROOT = Path(__file__).parents[2]
# Four programs and more, and what the cache did for them; the sum of 0 to 99 is 4,950.
CODE = """
from parallel import compile_cache, launch
launch.prepare()
import jax, json
folder = compile_cache.use({wanted})
for n in range(4):
    assert int(jax.jit(lambda x: (x + n).sum())(jax.numpy.arange(100))) == 4950 + 100 * n
print(json.dumps([str(folder), compile_cache.counts()]))
"""


def start(home: Path, wanted: bool = True, **more: str) -> subprocess.Popen:
    """CODE in a process whose caches lie in `home`."""
    dropped = ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return subprocess.Popen(
        [sys.executable, "-c", CODE.format(wanted=wanted)],
        cwd=ROOT,
        env=kept | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(home)} | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> tuple[str, dict]:
    """The folder of its programs, and its counts; it must end well and say nothing else."""
    output, error = process.communicate(timeout=300)
    assert process.returncode == 0 and error == "", error
    return tuple(json.loads(output))


def entries(home: Path) -> list[Path]:
    return sorted(home.glob("frugal/programs/*/*-cache"))


def test_a_later_process_reads_what_an_earlier_one_compiled(tmp_path):
    folder, first = finish(start(tmp_path))
    assert Path(folder).parent == tmp_path / "frugal" / "programs"
    assert first["cached"] == 0 and first["compiled"] == len(entries(tmp_path)) > 0
    _, second = finish(start(tmp_path))
    assert second["compiled"] == 0 and second["cached"] == first["compiled"]
    for path in (Path(folder), Path(folder).parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_a_damaged_entry_costs_a_compilation_and_is_replaced(tmp_path):
    finish(start(tmp_path))
    good = {path: path.read_bytes() for path in entries(tmp_path)}
    flipped = lambda content: content[:99] + bytes([content[99] ^ 1]) + content[100:]
    damages = (
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        flipped,
        lambda content: zlib.compress(b"\0\0\0\1 no program"),
    )
    assert len(good) >= len(damages)
    for (path, content), damage in zip(good.items(), itertools.cycle(damages)):
        path.write_bytes(damage(content))
    _, counted = finish(start(tmp_path))
    assert counted["cached"] == 0 and counted["compiled"] == len(good)
    _, counted = finish(start(tmp_path))
    assert counted["compiled"] == 0


def test_two_processes_at_once(tmp_path):
    both = [start(tmp_path), start(tmp_path)]
    for process in both:
        finish(process)
    _, counted = finish(start(tmp_path))
    assert counted["compiled"] == 0


def test_it_can_be_off_or_elsewhere(tmp_path):
    assert finish(start(tmp_path, wanted=False))[1]["cached"] == 0
    given = tmp_path / "given"
    finish(start(tmp_path, JAX_COMPILATION_CACHE_DIR=str(given)))
    assert given.is_dir() and not (tmp_path / "frugal").exists()


def test_no_folder_is_one_line_and_no_cache(tmp_path):
    (tmp_path / "file").write_text("")
    process = start(tmp_path / "file")
    output, error = process.communicate(timeout=300)
    assert process.returncode == 0 and json.loads(output)[0] == "None"
    assert error.count("\n") == 1 and error.startswith("compile cache: off, ")


def test_another_users_folder_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(PermissionError, match="belongs to another user"):
        compile_cache._private(tmp_path / "frugal" / "programs")


def test_others_lose_access(tmp_path):
    folder = tmp_path / "frugal" / "programs"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    folder.parent.chmod(0o775)
    compile_cache._private(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o755


def test_what_was_not_read_for_longest_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_cache, "MOST_BYTES", 25)
    for name, when in (("a", 3), ("b", 1), ("c", 2)):
        path = tmp_path / "kind" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(10))
        os.utime(path, (when, when))
    compile_cache._drop_oldest(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*/*")) == ["a", "c"]


@pytest.mark.parametrize(("given", "right"), [("/x", "/x/frugal"), ("x", "~/.cache/frugal")])
def test_home(monkeypatch, given, right):
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    assert compile_cache.home() == Path(right).expanduser()
    assert token_cache.root("") == Path(right).expanduser()
