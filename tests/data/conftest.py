"""A small folder of documents: short, long, empty, binary, and no UTF-8."""

import random
from pathlib import Path

import pytest

from configs.schema import Data


def write_documents(folder: Path, count: int = 120, seed: int = 0) -> dict[str, bytes]:
    """Documents of 1 to 3,000 bytes, each with its own words; returns those that hold text."""
    draw = random.Random(seed)
    written = {}
    for number in range(count):
        size = draw.choice([1, 7, 60, 300, 3000])
        text = f"{number:04d}" * size
        content = (text[: size - 2] + "é☃" + chr(draw.randrange(0x10000, 0x10400))).encode()
        if number % 10 == 0:
            content += bytes(draw.randrange(1, 256) for _ in range(20))
        name = f"part{number % 3}/document{number}.txt"
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        written[name] = content
    (folder / "empty.txt").write_bytes(b"")
    (folder / "picture.bin").write_bytes(b"\x89PNG\0\0")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "notes.txt").write_text("not a document")
    return written


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The folder of documents."""
    path = tmp_path_factory.mktemp("documents")
    write_documents(path)
    return path


@pytest.fixture(scope="session")
def config(folder, tmp_path_factory):
    """A config for that folder, with rows of 64 tokens in batches of 8 and a cache of its own."""
    cache = tmp_path_factory.mktemp("cache")
    return Data(source=f"text:{folder}", length=64, batch=8, folder=str(cache))


@pytest.fixture(scope="session")
def bpe(config, tmp_path_factory):
    """A BPE of 600 ids trained on that folder."""
    from data import tokenizers

    file = tmp_path_factory.mktemp("bpe") / "bpe.json"
    tokenizers.train(config, 600, file)
    return f"bpe:{file}"
