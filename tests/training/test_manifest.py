"""The manifest: stopped between any two changes of the disk, a marked step is a whole step."""

import contextlib
import os
import shutil
from pathlib import Path

import pytest

from training import manifest


class Killed(BaseException):
    """Stands for kill -9."""


def remove_tree(path: Path) -> None:
    """As shutil.rmtree, in the worst order: the marker last."""
    files = [p for p in path.rglob("*") if p.is_file()]
    for file in sorted(files, key=lambda p: p.name == manifest.MARKER):
        os.unlink(file)
    for folder in sorted((p for p in path.rglob("*") if p.is_dir()), reverse=True):
        folder.rmdir()
    path.rmdir()


def test_every_moment_of_sealing_and_removing(tmp_path, monkeypatch):
    """Stop before the n-th change of the disk, for every n."""
    calls = 0

    def counted(real):
        def call(*args, **kwargs):
            nonlocal calls
            calls -= 1
            if calls < 0:
                raise Killed
            return real(*args, **kwargs)

        return call

    for name in ("replace", "fsync", "unlink"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))
    monkeypatch.setattr(shutil, "rmtree", remove_tree)
    act = {"seal": lambda at: manifest.seal(at, {"step": 2}), "remove": manifest.remove}
    for action, whole in (("seal", [1, 2]), ("remove", [1])):
        finished, limit = False, 0
        while not finished:
            folder = tmp_path / f"{action}{limit}"
            for step in ("1", "2"):
                (folder / step / "state").mkdir(parents=True)
                (folder / step / "state" / "data").write_bytes(b"data")
            calls = 10**6
            manifest.seal(folder / "1", {"step": 1})
            if action == "remove":
                manifest.seal(folder / "2", {"step": 2})
            calls = limit
            with contextlib.suppress(Killed):
                act[action](folder / "2")
                finished = True
            steps = manifest.marked(folder)
            assert steps == manifest.committed(folder)
            assert 1 in steps and all(manifest.damage(folder / str(s)) == "" for s in steps)
            assert steps == whole or not finished
            limit += 1
        assert limit >= (8 if action == "seal" else 3)


def test_only_numbers_are_steps(tmp_path):
    for name in ("7", "12", "0", "007", "12.tmp", "x", "-1", "1e3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / manifest.MARKER).touch()
    (tmp_path / "5").touch()
    assert manifest.present(tmp_path) == manifest.marked(tmp_path) == [0, 7, 12]
    assert manifest.committed(tmp_path) == manifest.committed(tmp_path / "nowhere") == []


def test_write_atomic_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "file"
    manifest.write_atomic(path, b"old")

    def fail(*_):
        raise OSError("full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="full"):
        manifest.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
