"""A step's folder that is whole or does not count: sealed by a manifest, committed by a marker.

    1200/frugal.unfinished  our mark, while the step is written or removed: first in, last out
    1200/state/...          the data
    1200/manifest.json      what it is; size and SHA-256 of every file of the data
    1200/COMMITTED          SHA-256 of manifest.json: written last, removed first

Each is on the disk before the next is begun, so a kill at any moment leaves a whole step, or one
that bears our mark and never counts. A folder with neither is somebody else's, or a step that lost
its marker: it is left alone.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MARK, MANIFEST, MARKER = "frugal.unfinished", "manifest.json", "COMMITTED"
OURS = (MANIFEST, MARKER)  # and their unfinished forms; MARK goes last
STATE = "state"  # the folder in a step that Orbax fills, and how its unfinished forms begin


def write_atomic(path: Path, content: bytes) -> None:
    """Put `content` at `path`, on the disk, or leave what was there: never a part of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def write_json(path: Path, content: Any) -> None:
    """The same for values of JSON, a line each."""
    write_atomic(path, json.dumps(content, indent=1).encode() + b"\n")


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` (renames, new and removed files) survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def present(folder: Path) -> list[int]:
    """Steps that have a folder with something in it, whole or not, oldest first."""
    if not folder.is_dir():
        return []
    numbered = [path for path in folder.iterdir() if re.fullmatch("0|[1-9][0-9]*", path.name)]
    return sorted(int(path.name) for path in numbered if path.is_dir() and not _is_empty(path))


def _is_empty(path: Path) -> bool:
    try:
        return not any(path.iterdir())
    except FileNotFoundError:  # just removed by the run that owns it
        return True
    except OSError:  # not ours to read
        return False


def marked(folder: Path) -> list[int]:
    """Steps that have a marker, oldest first."""
    return [step for step in present(folder) if (folder / str(step) / MARKER).exists()]


def committed(folder: Path) -> list[int]:
    """Steps that have both marker and manifest, oldest first."""
    return [step for step in marked(folder) if (folder / str(step) / MANIFEST).exists()]


def unfinished(folder: Path) -> list[int]:
    """Steps that a save began and did not commit, or that were being removed, oldest first."""
    return [
        step
        for step in present(folder)
        if (folder / str(step) / MARK).exists() and not (folder / str(step) / MARKER).exists()
    ]


def unknown(folder: Path) -> list[int]:
    """Numbers of folders with neither mark nor marker: what is in them is not ours to remove."""
    ours = {*unfinished(folder), *marked(folder)}  # in this order: a save may end meanwhile
    return [step for step in present(folder) if step not in ours]


def read(path: Path) -> dict:
    """The manifest of the step at `path`."""
    return json.loads((path / MANIFEST).read_bytes())


def begin(path: Path) -> None:
    """Make the folder of a step and put our mark into it; OSError if anything else is there."""
    path.mkdir(parents=True, exist_ok=True)
    if not _is_empty(path):
        raise FileExistsError(errno.EEXIST, f"{path} holds files that this run did not write")
    _mark(path)


def seal(path: Path, head: dict) -> None:
    """Write manifest (`head` and the files) and marker of the step at `path`; its data is whole."""
    sizes = _sizes(path)
    hashes = _hashes(path, list(sizes), os.fsync)
    files = {name: {"size": sizes[name], "sha256": hashes[name]} for name in sizes}
    for folder in (*(p for p in path.rglob("*") if p.is_dir()), path, path.parent):
        sync_folder(folder)
    content = json.dumps(head | {"files": files}).encode()
    write_atomic(path / MANIFEST, content)
    write_atomic(path / MARKER, hashlib.sha256(content).hexdigest().encode())
    finish(path)


def finish(path: Path) -> None:
    """Take our mark from a step that is committed."""
    (path / MARK).unlink(missing_ok=True)
    sync_folder(path)


def remove(path: Path) -> None:
    """Delete a step that we wrote, in part or whole; leave any other folder, and links, alone.

    Its marker goes first and our mark last: a kill in between leaves what can be told as ours.
    Files that somebody put beside ours stay, and with them the folder.
    """
    if not _is_ours(path):
        return
    written = _written(path)
    _mark(path)
    (path / MARKER).unlink(missing_ok=True)
    sync_folder(path)
    for inside in path.iterdir():
        name = inside.name
        if name in written or name.startswith(STATE) or name.strip(".").startswith(OURS):
            is_folder = inside.is_dir() and not inside.is_symlink()
            shutil.rmtree(inside) if is_folder else inside.unlink()
    (path / MARK).unlink()
    if _is_empty(path):
        path.rmdir()


def _written(path: Path) -> set[str]:
    """What the manifest of a step lists, by the first part of each name."""
    try:
        return {name.partition("/")[0] for name in read(path)["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def is_taken(path: Path) -> bool:
    """Whether a step cannot be written at `path`: it is there and holds what is not ours."""
    if not path.is_dir():
        return path.exists() or path.is_symlink()
    return not _is_empty(path) and not _is_ours(path)


def _mark(path: Path) -> None:
    (path / MARK).touch()  # its name says all: a kill leaves it, or nothing
    sync_folder(path)


def _is_ours(path: Path) -> bool:
    """Whether the folder bears our mark, our marker (64 hex digits), or a manifest of this step."""
    if path.is_symlink() or not path.is_dir():
        return False
    if (path / MARK).exists():
        return True
    with contextlib.suppress(OSError, ValueError):
        if re.fullmatch("[0-9a-f]{64}", (path / MARKER).read_text()):
            return True
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        return str(read(path)["step"]) == path.name and "files" in read(path)
    return False


def damage(path: Path) -> str:
    """Name of the first file of a marked step that is not as it was written, "" if all are."""
    try:
        content = (path / MANIFEST).read_bytes()
        if (path / MARKER).read_bytes() != hashlib.sha256(content).hexdigest().encode():
            return f"{MANIFEST} or {MARKER}"
        manifest = json.loads(content)
        if str(manifest["step"]) != path.name:
            return MANIFEST
        written, sizes = manifest["files"], _sizes(path)
        tops = {name.partition("/")[0] for name in written}
        for name in sorted(written.keys() | sizes.keys()):
            if name not in written and name.partition("/")[0] not in tops:
                continue  # somebody's file beside ours is no damage
            if name not in written or written[name]["size"] != sizes.get(name):
                return name
        hashes = _hashes(path, list(written), lambda descriptor: None)
    except OSError as error:
        return Path(error.filename or MANIFEST).name
    wrong = [name for name in written if written[name]["sha256"] != hashes[name]]
    return wrong[0] if wrong else ""


def _sizes(path: Path) -> dict[str, int]:
    ours = {path / MARK, path / MANIFEST, path / MARKER}
    files = (p for p in path.rglob("*") if p.is_file() and p not in ours)
    return {p.relative_to(path).as_posix(): p.stat().st_size for p in sorted(files)}


def _hashes(path: Path, names: list[str], before: Callable[[int], None]) -> dict[str, str]:
    """SHA-256 of each file, each opened, given to `before` as a descriptor, and read."""

    def digest(name: str) -> str:
        with open(path / name, "rb") as file:
            before(file.fileno())
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(4) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))
