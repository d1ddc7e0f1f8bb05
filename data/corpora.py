"""Named documents in three splits, and what every source of them shares.

A document is (name, bytes). Where a source brings no splits of its own, SHA-256 of the name
decides: the same file is in the same split on every machine and in every order of listing.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

SPLITS = ("train", "validation", "test")

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


def place(name: str, own: str, given: Collection[str]) -> str:
    """A document's split: its own; splits that the source lacks are taken out of its train."""
    if own != "train":
        return own
    drawn = split_of(name)
    return "train" if drawn in given else drawn


def from_files(source: str, files: dict[str, Path]) -> Corpus:
    """Documents in the order of their names' digests, so that any prefix is a fair sample."""
    names = sorted(files, key=_digest)
    tops = {name.split("/")[0] if "/" in name else "" for name in names}
    given = tops if source.startswith("text:") and tops <= set(SPLITS) else set()

    def read(split: str) -> Iterator[Document]:
        for name in names:
            own = name.split("/")[0] if given else "train"
            if place(name, own, given) != split:
                continue
            content = files[name].read_bytes()
            if content and b"\0" not in content:
                yield name, content

    found = summary(Corpus(source, "", read))
    if not any(found.bytes.values()):
        raise ValueError(f"source {source!r} holds no text: every file is empty or binary")
    return Corpus(source, found.fingerprint, read)


def texts(corpus: Corpus, split: str, chunk: int = 1 << 16) -> Iterator[str]:
    """A split as pieces of at most `chunk` characters; bytes that are no UTF-8 are left out."""
    for _, content in corpus.read(split):
        text = content.decode("utf-8", "ignore")
        for start in range(0, len(text), chunk):
            yield text[start : start + chunk]
