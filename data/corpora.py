"""Named documents in three splits, from sources that are on the machine already.

A document is (name, bytes). Where a source brings no splits of its own, SHA-256 of the name
decides: the same file is in the same split on every machine and in every order of listing.
"""

import difflib
import hashlib
import importlib.metadata
import json
import sysconfig
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from configs.schema import Data, on_disk

SPLITS = ("train", "validation", "test")
SOURCES = ("stdlib", "packages", "text:FOLDER", "tfds:NAME")
PACKAGES = (
    "flax",
    "grain",
    "jax",
    "numpy",
    "optax",
    "orbax-checkpoint",
    "tensorflow-datasets",
)

# Tests differ between builds of one Python version; the other two are written on the machine.
_STDLIB_SKIPS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})
_STDLIB_GENERATED = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")
_RECORDS_AT_ONCE = 256

Document = tuple[str, bytes]


class Corpus(NamedTuple):
    """Documents by split. Equal keys promise equal documents; `read` keeps one order for ever."""

    source: str
    key: str
    read: Callable[[str], Iterator[Document]]


class Summary(NamedTuple):
    """What a corpus holds: SHA-256 over names and contents, and counts by split."""

    fingerprint: str
    documents: dict[str, int]
    bytes: dict[str, int]


def documents(config: Data) -> Corpus:
    """Open `config.source`; ValueError in one line if it is unknown, missing or empty."""
    kind, _, rest = on_disk(config.source, "source").partition(":")
    on_disk(config.folder, "folder")
    if config.source == "stdlib":
        return _from_files(config.source, _stdlib())
    if config.source == "packages":
        return _from_files(config.source, _packages())
    if kind == "text" and rest:
        return _from_files(config.source, _text(Path(rest).expanduser()))
    if kind == "tfds" and rest:
        return _tfds(config.source, rest, config.folder)
    nearest = difflib.get_close_matches(kind, [s.partition(":")[0] for s in SOURCES], 1, 0)[0]
    raise ValueError(
        f"unknown source {config.source!r}: it must be one of {', '.join(SOURCES)}; "
        f"nearest: {next(s for s in SOURCES if s.startswith(nearest))}"
    )


def split_of(name: str) -> str:
    """Train below 0.86, validation below 0.91, else test, of SHA-256(name) / 2^256."""
    share = int.from_bytes(_digest(name)[:8], "big") / 2**64
    return "train" if share < 0.86 else "validation" if share < 0.91 else "test"


def summary(corpus: Corpus) -> Summary:
    """Read the whole corpus once: fingerprint, and documents and bytes by split."""
    digest, counts, sizes = hashlib.sha256(), {}, {}
    for split in SPLITS:
        counts[split] = sizes[split] = 0
        for name, content in corpus.read(split):
            absorb(digest, name, content)
            counts[split] += 1
            sizes[split] += len(content)
    return Summary(digest.hexdigest(), counts, sizes)


def absorb(digest, name: str, content: bytes) -> None:
    """Add one document to a running SHA-256; lengths first, so no two lists read the same."""
    label = _bytes(name)
    digest.update(len(label).to_bytes(8, "big") + len(content).to_bytes(8, "big"))
    digest.update(label)
    digest.update(content)


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _digest(name: str) -> bytes:
    return hashlib.sha256(_bytes(name)).digest()


def _place(name: str, own: str, given: Collection[str]) -> str:
    """A document's split: its own; splits that the source lacks are taken out of its train."""
    if own != "train":
        return own
    drawn = split_of(name)
    return "train" if drawn in given else drawn


def _from_files(source: str, files: dict[str, Path]) -> Corpus:
    """Documents in the order of their names' digests, so that any prefix is a fair sample."""
    names = sorted(files, key=_digest)
    tops = {name.split("/")[0] if "/" in name else "" for name in names}
    given = tops if source.startswith("text:") and tops <= set(SPLITS) else set()

    def read(split: str) -> Iterator[Document]:
        for name in names:
            own = name.split("/")[0] if given else "train"
            if _place(name, own, given) != split:
                continue
            content = files[name].read_bytes()
            if content and b"\0" not in content:
                yield name, content

    found = summary(Corpus(source, "", read))
    if not any(found.bytes.values()):
        raise ValueError(f"source {source!r} holds no text: every file is empty or binary")
    return Corpus(source, found.fingerprint, read)


def _stdlib() -> dict[str, Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        generated = any(part.startswith(_STDLIB_GENERATED) for part in parts)
        if not generated and _STDLIB_SKIPS.isdisjoint(parts):
            files["/".join(parts)] = path
    return files


def _packages() -> dict[str, Path]:
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


def _text(folder: Path) -> dict[str, Path]:
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


def _tfds(source: str, rest: str, folder: str) -> Corpus:
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

    def read(split: str) -> Iterator[Document]:
        own = split if split in given else "train"
        if own not in given:
            return
        rows = builder.as_data_source(split=own)
        for start in range(0, len(rows), _RECORDS_AT_ONCE):
            stop = min(start + _RECORDS_AT_ONCE, len(rows))
            labels = {i: f"{own}/{i}" for i in range(start, stop)}
            wanted = [i for i, label in labels.items() if _place(label, own, given) == split]
            for i, row in zip(wanted, rows.__getitems__(wanted) if wanted else (), strict=True):
                content = _content(row[feature])
                if content:
                    yield labels[i], content

    return Corpus(source, _stamp(where, feature), read)


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


def texts(corpus: Corpus, split: str, chunk: int = 1 << 16) -> Iterator[str]:
    """A split as pieces of at most `chunk` characters; bytes that are no UTF-8 are left out."""
    for _, content in corpus.read(split):
        text = content.decode("utf-8", "ignore")
        for start in range(0, len(text), chunk):
            yield text[start : start + chunk]
