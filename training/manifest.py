"""A step's folder that is whole or does not count: sealed by a manifest, committed by a marker.

    1200/state/...      the data
    1200/manifest.json  what it is; size and SHA-256 of every file of the data
    1200/COMMITTED      SHA-256 of manifest.json: written last, removed first

Each is on the disk before the next is begun, so a kill at any moment leaves a whole step or one
without a marker, which never counts.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MANIFEST, MARKER = "manifest.json", "COMMITTED"


def write_atomic(path: Path, content: bytes) -> None:
    """Put `content` at `path`, on the disk, or leave what was there: never a part of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` (renames, new and removed files) survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def present(folder: Path) -> list[int]:
    """Steps that have a folder, whole or not, oldest first."""
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.iterdir() if path.is_dir()]
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))


def marked(folder: Path) -> list[int]:
    """Steps that have a marker, oldest first."""
    return [step for step in present(folder) if (folder / str(step) / MARKER).exists()]


def committed(folder: Path) -> list[int]:
    """Steps that have both marker and manifest, oldest first."""
    return [step for step in marked(folder) if (folder / str(step) / MANIFEST).exists()]


def read(path: Path) -> dict:
    """The manifest of the step at `path`."""
    return json.loads((path / MANIFEST).read_bytes())


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


def remove(path: Path) -> None:
    """Delete the step at `path`, its marker first: a kill in between leaves an uncommitted step."""
    if path.exists():
        (path / MARKER).unlink(missing_ok=True)
        sync_folder(path)
        shutil.rmtree(path)


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
        for name in sorted(written.keys() | sizes.keys()):
            if name not in written or written[name]["size"] != sizes.get(name):
                return name
        hashes = _hashes(path, list(written), lambda descriptor: None)
    except OSError as error:
        return Path(error.filename or MANIFEST).name
    wrong = [name for name in written if written[name]["sha256"] != hashes[name]]
    return wrong[0] if wrong else ""


def _sizes(path: Path) -> dict[str, int]:
    ours = {path / MANIFEST, path / MARKER}
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
