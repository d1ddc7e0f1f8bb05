"""Python's own standard library, as it lies on the machine: every .py file but tests."""

import dataclasses
import sysconfig
from pathlib import Path

from data import corpora

# Tests differ between builds of one Python version; the other two are written on the machine.
_SKIPS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})
_GENERATED = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")


@dataclasses.dataclass
class Config:
    """It has nothing to set."""

    def __str__(self) -> str:
        return "stdlib"

    def corpus(self, folder: str = "") -> corpora.Corpus:
        """The documents; `folder` does not matter."""
        return corpora.from_files(str(self), _files())


def _files() -> dict[str, Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        generated = any(part.startswith(_GENERATED) for part in parts)
        if not generated and _SKIPS.isdisjoint(parts):
            files["/".join(parts)] = path
    return files
