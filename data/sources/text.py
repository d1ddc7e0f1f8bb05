"""The files below a folder, each a document; folders named train, validation, test are splits."""

import dataclasses
from pathlib import Path

from data import corpora


@dataclasses.dataclass
class Config:
    """The folder; ~ is the user's home."""

    folder: str

    def __str__(self) -> str:
        return f"text:{self.folder}"

    def corpus(self, folder: str = "") -> corpora.Corpus:
        """The documents; `folder`, where token files are kept, does not matter."""
        return corpora.from_files(str(self), _files(Path(self.folder).expanduser()))


def _files(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise ValueError(f"source 'text:{folder}' must name a folder, and there is none")
    files = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            files[name.as_posix()] = path
    if not files:
        raise ValueError(f"source 'text:{folder}' must hold files, and the folder is empty")
    return files
