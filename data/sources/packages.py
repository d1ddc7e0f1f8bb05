"""The Python sources of the packages that this project needs, as installed."""

import dataclasses
import importlib.metadata
from pathlib import Path

from data import corpora

PACKAGES = (
    "flax",
    "grain",
    "jax",
    "numpy",
    "optax",
    "orbax-checkpoint",
    "tensorflow-datasets",
)


@dataclasses.dataclass
class Config:
    """It has nothing to set."""

    def __str__(self) -> str:
        return "packages"

    def corpus(self, folder: str = "") -> corpora.Corpus:
        """The documents; `folder` does not matter."""
        return corpora.from_files(str(self), _files())


def _files() -> dict[str, Path]:
    files = {}
    for package in PACKAGES:
        try:
            listed = importlib.metadata.files(package)
        except importlib.metadata.PackageNotFoundError:
            listed = None
        if listed is None:
            raise ValueError(f"source 'packages' needs {package}: pip install {package}")
        for file in listed:
            if file.suffix == ".py" and ".." not in file.parts:
                files[file.as_posix()] = Path(str(file.locate()))
    return files
