"""Opens the splits of a task: rows by their numbers, shuffled, and padding where there is none."""

import copy
import dataclasses
import hashlib
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from data import packing, sources
from data.draws import Draws
from data.split import Split
from data.tokenizers import Tokenizer

UNENDING = 1 << 40  # rows of an epoch where every row is new
HASHED = 64  # rows of each split that the fingerprint reads


def opened(task: Any, data: Any, split: str, host: int, hosts: int) -> Split:
    """The split `split` of a `data.tasks.Task`; ValueError where its settings do not fit a row."""
    task.check(data.length)
    count = (task.examples or UNENDING) if split == "train" else task.held_out

    def take(rows: np.ndarray, epochs: np.ndarray) -> packing.Batch:
        batch = _rows(task, data, split, np.maximum(rows, 0))
        for array in batch.values():
            array[rows < 0] = 0
        most = answers(data)
        return batch | ({"answers": _places(batch["weights"] > 0, most)} if most else {})

    layout = packing.Layout(count, take)
    if split == "train" and task.examples:
        layout = packing.shuffled(layout, data.seed)
    return Split(
        name=split,
        config=copy.copy(data),
        host=host,
        hosts=hosts,
        tokenizer=tokenizer(task.symbols(), str(task)),
        fingerprint=_fingerprint(task, data),
        documents=count,
        bytes=count * data.length,
        tokens=count * data.length,
        rows=count,
        take=layout.take,
        metric=task.metric,
    )


def answers(data: Any) -> int:
    """How many places of a row are asked at the most, where those are fewer than all; else 0."""
    source = sources.find(data.source)
    most = source.places(data.length) if hasattr(source, "places") else data.length
    return most if most < data.length else 0


def _places(due: Bool[np.ndarray, "B T"], most: int) -> Int[np.ndarray, "B A"]:
    """Where answers are due in each row, in order; then -1."""
    order = np.argsort(~due, axis=1, kind="stable")[:, :most]
    return np.where(np.take_along_axis(due, order, axis=1), order, -1).astype(np.int32)


def tokenizer(names: tuple[str, ...], task: str) -> Tokenizer:
    """The ids of a task: each stands for one symbol; a text is read as names between blanks."""
    known = {name: i for i, name in enumerate(names)}

    def encode(text: bytes) -> np.ndarray:
        return np.asarray([known[w] for w in text.decode().split() if w in known], np.int32)

    mark = hashlib.sha256("\0".join(names).encode()).hexdigest()
    return Tokenizer(task, mark, tuple(f"{name} ".encode() for name in names), encode)


def _rows(task: Any, data: Any, split: str, numbers: np.ndarray) -> packing.Batch:
    """Rows of a split by their numbers; a row is one document."""
    counts = ("examples", "held_out")  # how many rows there are changes none of them
    names = (field.name for field in dataclasses.fields(task) if field.name not in counts)
    settings = {name: getattr(task, name) for name in names}
    draw = Draws(f"{task}/{settings}/{data.length}/{split}/{data.seed}", numbers)
    batch = task.rows(draw, data.length)
    real = batch.pop("real", None)
    real = np.ones_like(batch["inputs"]) if real is None else real
    return batch | {"segments": real.astype(np.int32)}


def _fingerprint(task: Any, data: Any) -> str:
    """SHA-256 of the first rows of all splits."""
    digest = hashlib.sha256()
    for split in ("train", "validation", "test"):
        for array in _rows(task, data, split, np.arange(HASHED)).values():
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
