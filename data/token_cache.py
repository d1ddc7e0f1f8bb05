"""A corpus as flat token files, encoded once and read as memory maps.

A split's stream is [SEP, document, SEP, document, ..., SEP]. The folder of a (corpus, tokenizer)
pair holds one .npy a split and meta.json, written last; each file is renamed into place, and its
size and SHA-256 are checked before use, so a torn or damaged cache is built again.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.corpora import SPLITS, Corpus, absorb
from data.tokenizers import Tokenizer

_FORMAT = 1
_HASH_BLOCK = 1 << 22


class Tokens(NamedTuple):
    """One split: `flat` (N,) unsigned integers, its counts, and the corpus' SHA-256."""

    flat: np.ndarray
    documents: int
    bytes: int
    fingerprint: str


def root(folder: str) -> Path:
    """Where token files live: hidden in `Data.folder`, or in the user's cache."""
    if folder:
        return Path(folder).expanduser() / ".frugal-tokens"
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))  # a relative one does not count
    return (given if given.is_absolute() else Path.home() / ".cache") / "frugal"


def load(corpus: Corpus, tokenizer: Tokenizer, split: str, folder: str = "") -> Tokens:
    """The tokens of a split; encodes all three splits first where no good cache exists."""
    identity = json.dumps([_FORMAT, corpus.source, corpus.key, tokenizer.fingerprint])
    home = root(folder) / hashlib.sha256(identity.encode()).hexdigest()[:24]
    meta, fault = _checked(home, split)
    if fault:
        if home.exists():
            logging.getLogger(__name__).warning("token cache %s: %s; encoding again", home, fault)
        meta = _build(corpus, tokenizer, home)
    counts = meta["splits"][split]
    flat = np.asarray(np.load(home / f"{split}.npy", mmap_mode="r"))
    return Tokens(flat, counts["documents"], counts["bytes"], meta["fingerprint"])


def _checked(home: Path, split: str) -> tuple[dict[str, Any], str]:
    """The folder's meta data, and what is wrong with it or with the split's file ("": nothing)."""
    try:
        meta = json.loads((home / "meta.json").read_text())
        seal = meta.pop("seal")
        if seal != _seal(meta):
            return {}, "meta.json is damaged"
        file, counts = home / f"{split}.npy", meta["splits"][split]
        if file.stat().st_size != counts["size"]:
            return {}, f"{file.name} has {file.stat().st_size} bytes, not {counts['size']}"
        if _sha256(file) != counts["sha256"]:
            return {}, f"{file.name} does not match its SHA-256"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, f"{type(error).__name__}: {error}"
    return meta, ""


def _build(corpus: Corpus, tokenizer: Tokenizer, home: Path) -> dict[str, Any]:
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"cannot write token files below {home.parent} ({error.strerror}); "
            "name a folder that can be written: --config.data.folder=FOLDER"
        ) from None
    meta: dict[str, Any] = {"source": corpus.source, "tokenizer": tokenizer.name, "splits": {}}
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory(prefix="partial-", dir=home) as scratch:
        for split in SPLITS:
            file = Path(scratch) / f"{split}.npy"
            meta["splits"][split] = _encode(corpus.read(split), tokenizer, file, digest)
        meta["fingerprint"] = digest.hexdigest()
        sealed = Path(scratch) / "meta.json"
        sealed.write_text(json.dumps(meta | {"seal": _seal(meta)}, indent=1))
        for name in (*(f"{split}.npy" for split in SPLITS), "meta.json"):
            (Path(scratch) / name).replace(home / name)
    return meta


def _encode(
    documents: Iterable[tuple[str, bytes]], tokenizer: Tokenizer, file: Path, digest
) -> dict[str, Any]:
    """Write one split document by document, so that memory holds one document at a time."""
    dtype = np.dtype(np.uint16 if tokenizer.vocabulary <= 1 << 16 else np.uint32)
    separator = np.array([tokenizer.separator], dtype).tobytes()
    counts: dict[str, Any] = {"tokens": 1, "documents": 0, "bytes": 0}
    with file.open("wb") as out:
        start = _header(out, dtype, 0)
        out.write(separator)
        for name, content in documents:
            absorb(digest, name, content)
            ids = tokenizer.encode(content)
            out.write(ids.astype(dtype).tobytes())
            out.write(separator)
            counts["tokens"] += len(ids) + 1
            counts["documents"] += 1
            counts["bytes"] += len(content)
        out.seek(0)
        # NumPy leaves room in the header for the length to grow; it must end where it did.
        if _header(out, dtype, counts["tokens"]) != start:
            raise RuntimeError(f"the .npy header of {file.name} changed its size")
    return counts | {"size": file.stat().st_size, "sha256": _sha256(file)}


def _header(out, dtype: np.dtype, length: int) -> int:
    described = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": (length,),
    }
    np.lib.format.write_array_header_1_0(out, described)
    return out.tell()


def _seal(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()
