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
    """As shutil.rmtree, each file a moment of its own."""
    for file in [p for p in path.rglob("*") if p.is_file()]:
        os.unlink(file)
    for folder in sorted((p for p in path.rglob("*") if p.is_dir()), reverse=True):
        folder.rmdir()
    path.rmdir()


def test_every_moment_of_sealing_and_removing(tmp_path, monkeypatch):
    """Stop before the n-th change of the disk, for every n; what is left is told as ours."""
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
            calls = 10**6
            for step in ("1", "2"):
                manifest.begin(folder / step)
                (folder / step / "state").mkdir()
                (folder / step / "state" / "data").write_bytes(b"data")
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
            assert manifest.unknown(folder) == [], "a kill leaves what the next start removes"
            assert sorted(steps + manifest.unfinished(folder)) == manifest.present(folder)
            limit += 1
        assert limit >= (8 if action == "seal" else 3)


def test_only_numbers_are_steps(tmp_path):
    for name in ("7", "12", "0", "007", "12.tmp", "x", "-1", "1e3", "8"):
        (tmp_path / name).mkdir()
        if name == "8":
            continue  # an empty folder is no step
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


def tree_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def test_only_what_bears_a_mark_of_ours_is_removed(tmp_path):
    """A folder of somebody else, a link to a step of ours, a step of another number."""
    step = tmp_path / "12"
    manifest.begin(step)
    (step / "data").write_bytes(b"data")
    manifest.seal(step, {"step": 12})
    assert not (step / manifest.MARK).exists(), "a whole step has a marker alone"
    (tmp_path / "13").symlink_to(step)
    (tmp_path / "2019" / "default").mkdir(parents=True)
    (tmp_path / "2019" / "default" / "weights").write_bytes(b"years of work")
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / manifest.MARKER).write_text("done")  # a marker of another program
    (tmp_path / "8").mkdir()
    (tmp_path / "8" / manifest.MANIFEST).write_text('{"step": 9, "files": {}}')
    before = tree_of(tmp_path)
    for name in ("13", "2019", "7", "8"):
        manifest.remove(tmp_path / name)
        with pytest.raises(FileExistsError, match=f"{name} holds files that this run did not"):
            manifest.begin(tmp_path / name)
    assert tree_of(tmp_path) == before
    (step / manifest.MARKER).unlink()  # the manifest still says whose it is
    manifest.remove(step)
    assert not step.exists()


def test_a_file_beside_ours_is_no_damage_and_stays(tmp_path):
    step = tmp_path / "6"
    (step / "state").mkdir(parents=True)
    (step / "state" / "a").write_bytes(b"1")
    manifest.seal(step, {"step": 6})
    (step / ".DS_Store").write_bytes(b"")
    (step / "notes").mkdir()
    (step / "notes" / "n.txt").write_text("mine")
    assert manifest.damage(step) == ""
    (step / "state" / "b").write_bytes(b"2")
    assert manifest.damage(step) == "state/b", "among ours it is"
    manifest.remove(step)
    left = sorted(p.relative_to(step).as_posix() for p in step.rglob("*"))
    assert left == [".DS_Store", "notes", "notes/n.txt"]
