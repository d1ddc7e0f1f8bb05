"""Tokenizers without loss: bytes, or a byte-level BPE; both with one separator as the last id.

`python -m data.tokenizers --source=stdlib --size=4096 --out=FILE` trains a BPE on the training
split; `--config.data.tokenizer=bpe:FILE` uses it.
"""

import argparse
import difflib
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from configs.schema import Data, on_disk
from data import corpora, sources

# What a normalizer, a prefix space or a whitespace splitter would change.
_PROBES = ("Def f(x):\n\treturn 'nai\u0308ve ☃ 𝔘 ﬁ'\r\n\n  # 42\0 end ", "  two  spaces")
_KEEP = (
    "ByteLevel",
    "Split",
    "Digits",
    "Punctuation",
    "Sequence",
)  # pre-tokenizers that only split
_INVALID = re.compile("([\udc80-\udcff]+)")


class Tokenizer(NamedTuple):
    """`pieces[i]` are the bytes that id i stands for; the last id is the separator, with none."""

    name: str
    fingerprint: str
    pieces: tuple[bytes, ...]
    encode: Callable[[bytes], np.ndarray]

    @property
    def vocabulary(self) -> int:
        """Number of ids, the separator included."""
        return len(self.pieces)

    @property
    def separator(self) -> int:
        """The id before every document and after the last; `encode` never returns it."""
        return len(self.pieces) - 1

    @property
    def byte_lengths(self) -> np.ndarray:
        """np.int32[vocabulary]: bytes that an id stands for, 0 for the separator."""
        return np.array([len(piece) for piece in self.pieces], np.int32)

    def decode_bytes(self, ids) -> bytes:
        """The exact bytes of `ids`; separators are dropped."""
        return b"".join(self.pieces[i] for i in np.asarray(ids).ravel().tolist())

    def decode(self, ids) -> str:
        """Text of `ids`; bytes that are no UTF-8 show as U+FFFD, separators are dropped."""
        return self.decode_bytes(ids).decode("utf-8", "replace")


def open_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer named by `Data.tokenizer`: "bytes" or "bpe:FILE"."""
    kind, _, file = on_disk(spec, "tokenizer").partition(":")
    if spec == "bytes":
        return _bytes()
    if kind == "bpe" and file:
        return _bpe(Path(file).expanduser())
    choice = {"bytes": "bytes", "bpe": "bpe:FILE"}
    nearest = difflib.get_close_matches(kind, choice, 1, 0)[0]
    raise ValueError(
        f"unknown tokenizer {spec!r}: it must be bytes or bpe:FILE; nearest: {choice[nearest]}"
    )


def _bytes() -> Tokenizer:
    pieces = (*(bytes([b]) for b in range(256)), b"")
    return Tokenizer("bytes", "bytes", pieces, lambda data: np.frombuffer(data, np.uint8))


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ValueError("a bpe: tokenizer needs: pip install tokenizers") from None
    return tokenizers


def _visible() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character: that character to its byte."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


def _bpe(file: Path) -> Tokenizer:
    if not file.is_file():
        raise ValueError(
            f"tokenizer file {str(file)!r} does not exist; make one with: "
            f"python -m data.tokenizers --source=stdlib --size=4096 --out={file}"
        )
    library = _library()
    text = file.read_bytes()
    try:
        model = library.Tokenizer.from_str(text.decode())
    except Exception as error:  # the library raises a bare Exception
        raise ValueError(f"{str(file)!r} is no tokenizers JSON file: {error}") from None
    model.no_padding()
    model.no_truncation()
    pieces, singles = _pieces(model)
    encode = _encoder(model, pieces, singles, str(file))
    name = f"bpe:{file}"
    tokenizer = Tokenizer(name, hashlib.sha256(text).hexdigest(), pieces, encode)
    fault = _fault(json.loads(text))
    if not fault and -1 in singles:
        fault = "not all 256 bytes are in its vocabulary"
    if fault:
        raise ValueError(
            f"{str(file)!r} loses bytes: it must be a byte-level BPE that keeps every byte of a "
            f"text, but {fault}"
        )
    for probe in _PROBES:  # what the rules above do not know of
        encode(probe.encode())
    return tokenizer


def _fault(described: dict[str, Any]) -> str:
    """Which part of a tokenizers JSON file changes text, drops some or adds some ("": none)."""
    model = described["model"]
    if model.get("type", "BPE") != "BPE":
        return f"its model is {model['type']}"
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            return f"its model has {name}={model[name]!r}"
    if (normalizer := described.get("normalizer")) and normalizer.get("normalizers") != []:
        return f"it has a normalizer ({normalizer['type']})"
    for token in described.get("added_tokens", ()):
        for side in ("lstrip", "rstrip"):
            if token.get(side):
                return f"its added token {token['content']!r} takes the spaces beside it ({side})"
    splitters: list[dict[str, Any]] = [described.get("pre_tokenizer") or {"type": "none"}]
    kinds = set()
    while splitters:
        one = splitters.pop()
        splitters += one.get("pretokenizers", ())
        kinds.add(one["type"])
        if one.get("add_prefix_space"):
            return "it adds a space before a text (add_prefix_space)"
        if one["type"] not in _KEEP or one.get("behavior") == "Removed":
            return f"its pre_tokenizer {one['type']} drops what it splits at"
    return "" if "ByteLevel" in kinds else "its pre_tokenizer is not ByteLevel"


def _pieces(model) -> tuple[tuple[bytes, ...], np.ndarray]:
    """Bytes of each id, and the id of each single byte (-1 where the vocabulary lacks it)."""
    visible = _visible()
    added = {i: token.content for i, token in model.get_added_tokens_decoder().items()}
    ids = model.get_vocab(with_added_tokens=True)
    pieces = [b""] * (max(ids.values()) + 2)
    singles = np.full(256, -1, np.int32)
    for token, i in ids.items():
        if i in added or any(c not in visible for c in token):
            pieces[i] = token.encode()
            continue
        pieces[i] = bytes(visible[c] for c in token)
        if len(token) == 1:
            singles[visible[token]] = i
    return tuple(pieces), singles


def _encoder(model, pieces, singles: np.ndarray, file: str) -> Callable[[bytes], np.ndarray]:
    """UTF-8 goes through the model; each byte that is no UTF-8 becomes its own single-byte id.

    What comes out is read back: a text that the file's rules change is an error, whatever they are.
    """

    def encode(data: bytes) -> np.ndarray:
        ids = []
        for run in _INVALID.split(data.decode("utf-8", "surrogateescape")):
            if run and "\udc80" <= run[0] <= "\udcff":
                raw = np.frombuffer(run.encode("utf-8", "surrogateescape"), np.uint8)
                ids.extend(singles[raw].tolist())
            elif run:
                ids.extend(model.encode(run, add_special_tokens=False).ids)
        back = b"".join([pieces[i] for i in ids])
        if back != data:
            shared = os.path.commonprefix([back, data])
            lost = data[max(0, len(shared) - 8) : len(shared) + 8]
            raise ValueError(f"{file!r} loses bytes: the text about {lost!r} does not come back")
        return np.array(ids, np.int32)

    return encode


def train(config: Data, size: int, out: Path) -> Tokenizer:
    """Train a byte-level BPE on the training split of `config.source` and write it to `out`.

    `size` counts all ids, the 256 bytes and the separator included.
    """
    if size < 257:
        raise ValueError(f"size {size} must hold 256 bytes and the separator; nearest: 257")
    library = _library()
    corpus = sources.documents(config)
    model = library.Tokenizer(library.models.BPE())
    model.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(
        vocab_size=size - 1, initial_alphabet=alphabet, special_tokens=[], show_progress=False
    )
    model.train_from_iterator(corpora.texts(corpus, "train"), trainer)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    partial.write_text(model.to_str(), encoding="utf-8")
    partial.replace(out)
    return _bpe(out)


def main() -> None:
    """Train from the command line and print vocabulary and bytes per token on validation."""
    parser = argparse.ArgumentParser(prog="python -m data.tokenizers", description=main.__doc__)
    parser.add_argument("--source", default="stdlib", help=", ".join(sources.forms()))
    parser.add_argument("--folder", default="", help="data_dir of a tfds: source")
    parser.add_argument("--size", type=int, default=4096, help="ids, the separator included")
    parser.add_argument("--out", type=on_disk, required=True, help="the JSON file to write")
    flags = parser.parse_args()
    config = Data(source=flags.source, folder=flags.folder)
    try:
        tokenizer = train(config, flags.size, Path(flags.out))
        corpus = sources.documents(config)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    size = count = 0
    for _, content in corpus.read("validation"):
        size += len(content)
        count += len(tokenizer.encode(content))
    line = {"file": str(flags.out), "vocabulary": tokenizer.vocabulary}
    if count:
        line["validation_bytes_per_token"] = round(size / count, 3)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
