"""A TFDS data set that is prepared on disk: its text, or the pixels of its images.

It has the splits of the data set; what those lack of our three is taken out of its train split.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data import corpora
from data.corpora import SPLITS

_RECORDS_AT_ONCE = 256


@dataclasses.dataclass
class Config:
    """NAME[/CONFIG[/VERSION]][:FEATURE]; without a feature, the only text or the only image."""

    name: str

    def __str__(self) -> str:
        return f"tfds:{self.name}"

    def corpus(self, folder: str = "") -> corpora.Corpus:
        """The documents below the data_dir `folder` ("": TFDS's own)."""
        return _corpus(str(self), self.name, folder)


def _corpus(source: str, rest: str, folder: str) -> corpora.Corpus:
    """A prepared TFDS data set; its own splits, and what it lacks of the three out of train."""
    name, _, feature = rest.partition(":")
    root = Path(folder).expanduser() if folder else Path.home() / "tensorflow_datasets"
    where = _prepared(name, root)
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder_from_directory(where)
    if builder.info.file_format.value != "array_record":
        raise ValueError(
            f"source {source!r} is stored as {builder.info.file_format.value}, which needs "
            f"TensorFlow to read; write array_record with: {_recipe(name, root)}"
        )
    feature = _feature(source, feature, builder.info.features, tfds)
    given = [split for split in SPLITS if split in builder.info.splits]

    def read(split: str) -> Iterator[corpora.Document]:
        own = split if split in given else "train"
        if own not in given:
            return
        rows = builder.as_data_source(split=own)
        for start in range(0, len(rows), _RECORDS_AT_ONCE):
            stop = min(start + _RECORDS_AT_ONCE, len(rows))
            labels = {i: f"{own}/{i}" for i in range(start, stop)}
            wanted = [i for i, label in labels.items() if corpora.place(label, own, given) == split]
            for i, row in zip(wanted, rows.__getitems__(wanted) if wanted else (), strict=True):
                content = _content(row[feature])
                if content:
                    yield labels[i], content

    return corpora.Corpus(source, _stamp(where, feature), read)


def _prepared(name: str, root: Path) -> Path:
    """The folder ROOT/NAME[/CONFIG]/VERSION of the highest version on disk."""
    if ".." in Path(name).parts or Path(name).is_absolute():
        raise ValueError(f"tfds name {name!r} must be NAME or NAME/CONFIG below {root}")
    for level in ("dataset_info.json", "*/dataset_info.json", "*/*/dataset_info.json"):
        found = sorted((info.parent for info in (root / name).glob(level)), key=_version)
        configs = sorted({folder.parent.name for folder in found})
        if level.count("/") == 2 and len(configs) > 1:
            choice = ", ".join(f"tfds:{name}/{config}" for config in configs)
            raise ValueError(f"tfds data set {name!r} has several configs; choose one of: {choice}")
        if found:
            return found[-1]
    raise ValueError(
        f"tfds data set {name!r} is not prepared below {root}; prepare it once (this step needs "
        f"TensorFlow, reading does not): {_recipe(name, root)}"
    )


def _recipe(name: str, root: Path) -> str:
    return (
        'pip install tensorflow-cpu && python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', data_dir='{root}', file_format='array_record')"
        '.download_and_prepare()"'
    )


def _version(folder: Path) -> tuple[int, ...]:
    parts = folder.name.split(".")
    return tuple(int(part) if part.isdecimal() else -1 for part in parts)


def _feature(source: str, wanted: str, features, tfds) -> str:
    """The named feature, or the only Text feature, or (no Text at all) the only Image."""
    texts = sorted(k for k, f in features.items() if isinstance(f, tfds.features.Text))
    images = sorted(k for k, f in features.items() if isinstance(f, tfds.features.Image))
    usable = [wanted] if wanted in texts + images else []
    if not wanted:
        usable = texts or images
    if len(usable) != 1:
        bare = source.removesuffix(f":{wanted}") if wanted else source
        choice = ", ".join(f"{bare}:{k}" for k in texts + images) or "none here"
        raise ValueError(
            f"source {source!r} must name one Text or Image feature; choose one of: {choice}"
        )
    return usable[0]


def _content(value) -> bytes:
    """Text as stored; an image's pixels row by row, one byte a channel."""
    return value.encode() if isinstance(value, str) else bytes(value)


def _stamp(where: Path, feature: str) -> str:
    """Identity without reading the records: names, sizes and times of the files, and the info."""
    digest = hashlib.sha256(json.dumps([*where.parts[-3:], feature]).encode())
    for path in sorted(where.iterdir()):
        stat = path.stat()
        digest.update(json.dumps([path.name, stat.st_size, stat.st_mtime_ns]).encode())
    return digest.hexdigest()
