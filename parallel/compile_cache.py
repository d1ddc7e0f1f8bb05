"""Compiled programs are kept: what one process compiled, a later one reads back in milliseconds.

The folder is $XDG_CACHE_HOME/frugal/programs (~/.cache by default), with one folder a kind of
processor: a program for another one may not run. JAX keys a program by its operations, its
options, XLA's flags and the versions. A program that is read is run, so the folder belongs to the
user alone. Whatever goes wrong costs the time to compile and nothing else.
"""

import contextlib
import functools
import hashlib
import logging
import os
import platform
import stat
import sys
import warnings
from pathlib import Path
from typing import Any

MOST_BYTES = 2 << 30  # beyond it, the programs that were not read for longest go
_seen = {"requests": 0, "hits": 0, "saved_s": 0.0}


def use(wanted: bool = True) -> Path | None:
    """Keep this process' programs, and read kept ones; the folder, None where nothing is kept.

    JAX_COMPILATION_CACHE_DIR and JAX's own settings win. Call it after JAX is imported and before
    the first program.
    """
    import jax

    if not wanted:
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    _listen()
    settings: Any = jax.config  # its attributes are made when jax is imported
    if settings.jax_compilation_cache_dir or not settings.jax_enable_compilation_cache:
        return None
    try:
        folder = _private(home() / "programs") / _processor()
        folder.mkdir(mode=0o700, exist_ok=True)
        _drop_oldest(folder.parent)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder
        print(f"compile cache: off, {error}", file=sys.stderr)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    logger = logging.getLogger("jax._src.compiler")
    logger.addFilter(_Replacer(folder, logger.getEffectiveLevel()))
    logger.setLevel(logging.DEBUG)
    return folder


def counts() -> dict[str, float]:
    """Programs of this process read from the cache, those compiled, and the seconds it saved."""
    cached, saved = _seen["hits"], round(_seen["saved_s"], 3)
    return {"cached": cached, "compiled": _seen["requests"] - cached, "saved_s": saved}


def home() -> Path:
    """Where this user's caches live: $XDG_CACHE_HOME/frugal, which must be absolute to count."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "frugal"


def _private(folder: Path) -> Path:
    """`folder`, made for this user alone; OSError where another user could put programs there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    for path, others in ((folder.parent, stat.S_IWGRP | stat.S_IWOTH), (folder, 0o077)):
        found = path.stat()
        if found.st_uid != os.geteuid():
            raise PermissionError(f"{path} belongs to another user")
        if found.st_mode & others:
            path.chmod(stat.S_IMODE(found.st_mode) & ~others)
    return folder


def _processor() -> str:
    """A name for what this machine's processor can run."""
    lines = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        said = Path("/proc/cpuinfo").read_text().splitlines()
        lines += sorted({x for x in said if x.startswith(("flags", "Features", "model name"))})
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _drop_oldest(folder: Path) -> None:
    """Keep MOST_BYTES below `folder`; other processes may write and remove at the same time."""
    found = []
    for path in folder.glob("*/*"):
        with contextlib.suppress(FileNotFoundError):
            facts = path.stat()
            found.append((max(facts.st_atime, facts.st_mtime), facts.st_size, path))
    excess = sum(size for _, size, _ in found) - MOST_BYTES
    for _, size, path in sorted(found):
        if excess <= 0:
            return
        path.unlink(missing_ok=True)
        excess -= size


class _Replacer(logging.Filter):
    """Removes an entry that is there and was not read, or JAX would meet it at every start.

    JAX writes no entry over another, and its record of a miss is the one thing that names the key.
    Records below the logger's own level go no further.
    """

    def __init__(self, folder: Path, level: int):
        super().__init__()
        self._folder, self._level = folder, level

    def filter(self, record: logging.LogRecord) -> bool:
        if "CACHE MISS" in str(record.msg) and isinstance(record.args, tuple):
            with contextlib.suppress(OSError):
                (self._folder / f"{record.args[-1]}-cache").unlink(missing_ok=True)
        return record.levelno >= self._level


@functools.cache
def _listen() -> None:
    """Have JAX say what it asks of the cache; saved seconds are whole ones, as JAX keeps them."""
    import jax

    names = {"compile_requests_use_cache": "requests", "cache_hits": "hits"}
    told = {f"/jax/compilation_cache/{event}": name for event, name in names.items()}

    def count(event: str, **_) -> None:
        if event in told:
            _seen[told[event]] += 1

    def add(event: str, duration_secs: float, **_) -> None:
        if event == "/jax/compilation_cache/compile_time_saved_sec":
            _seen["saved_s"] += max(0.0, duration_secs)

    jax.monitoring.register_event_listener(count)
    jax.monitoring.register_event_duration_secs_listener(add)
