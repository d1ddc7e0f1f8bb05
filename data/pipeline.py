"""Opens a split of what a config names: its source, its tokenizer, its layout (data/split.py).

`python -m data.pipeline --bench` prints what a source holds and how fast each layout is.
"""

import argparse
import copy
import dataclasses
import difflib
import json
import time
from collections.abc import Callable, Iterator

import numpy as np

from configs.schema import Data
from data import corpora, generated, packing, sources, token_cache
from data.split import Split
from data.tokenizers import Tokenizer, open_tokenizer


def open_split(config: Data, split: str, host: int = 0, hosts: int = 1) -> Split:
    """Open one split of `config.source`; every wrong value is a ValueError of one line."""
    _check(config, split, host, hosts)
    source = sources.find(config.source)
    if hasattr(source, "rows"):
        return generated.opened(source, config, split, host, hosts)
    if hasattr(source, "open"):
        return source.open(config, split, host, hosts)
    tokenizer = open_tokenizer(config.tokenizer)
    corpus = sources.documents(config)
    tokens = token_cache.load(corpus, tokenizer, split, config.folder)
    if not tokens.documents:
        raise ValueError(
            f"split {split!r} of source {str(source)!r} has no documents; add documents, or "
            f"name folders {', '.join(corpora.SPLITS)} in a text: source"
        )
    layout = packing.lay_out(
        config.layout, tokens.flat, config.length, config.batch, tokenizer.separator
    )
    take = layout.take
    if split == "train" and config.layout != "stream":
        take = packing.shuffled(layout, config.seed).take
    return Split(
        name=split,
        config=copy.copy(config),
        host=host,
        hosts=hosts,
        tokenizer=tokenizer,
        fingerprint=tokens.fingerprint,
        documents=tokens.documents,
        bytes=tokens.bytes,
        tokens=len(tokens.flat) - 1,
        rows=layout.rows,
        take=take,
    )


def tokenizer_of(config: Data) -> Tokenizer:
    """What the ids of `config` stand for: a task's symbols, or the pieces of `config.tokenizer`."""
    source = sources.find(config.source)
    if hasattr(source, "symbols"):
        return generated.tokenizer(source.symbols(), str(source))
    return open_tokenizer(config.tokenizer)


def _check(config: Data, split: str, host: int, hosts: int) -> None:
    if split not in corpora.SPLITS:
        nearest = difflib.get_close_matches(split, corpora.SPLITS, 1, 0)[0]
        choice = ", ".join(corpora.SPLITS)
        raise ValueError(f"unknown split {split!r}: it must be one of {choice}; nearest: {nearest}")
    if config.layout not in packing.LAYOUTS:
        packing.lay_out(config.layout, np.zeros(0), 0, 0, 0)
    if config.length < 2:
        raise ValueError(f"length {config.length} must be at least 2; nearest: 2")
    if config.batch < 1:
        raise ValueError(f"batch {config.batch} must be at least 1; nearest: 1")
    if not 0 <= host < hosts:
        raise ValueError(f"host {host} must be in 0..{hosts - 1} for {hosts} hosts")
    if config.batch % hosts:
        nearest = max(1, round(config.batch / hosts)) * hosts
        raise ValueError(
            f"batch {config.batch} must be a multiple of the {hosts} hosts; nearest: {nearest}"
        )


def _seconds(call: Callable[[int], object], count: int) -> float:
    start = time.perf_counter()
    for i in range(count):
        call(i)
    return (time.perf_counter() - start) / count


def bench(config: Data, count: int) -> Iterator[dict[str, object]]:
    """Per layout: time to open, fill, microseconds a batch and million tokens a second.

    "direct" is `batch(i)` called in turn, "prefetched" the next of `batches()`; the best of five
    interleaved rounds of `count` batches each.
    """
    for layout in packing.LAYOUTS:
        start = time.perf_counter()
        split = open_split(dataclasses.replace(config, layout=layout), "train")
        opened = time.perf_counter() - start
        batches = split.batches()
        next(batches)
        split.batch(0)
        ways = {"direct": split.batch, "prefetched": lambda _, it=batches: next(it)}
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(5):
            for way, call in ways.items():
                best[way] = min(best[way], _seconds(call, count))
        batches.close()
        line: dict[str, object] = {"layout": layout, "open_s": round(opened, 3)}
        line["fill"] = round(split.fill, 4)
        for way, seconds in best.items():
            line[f"{way}_us"] = round(seconds * 1e6, 1)
            line[f"{way}_Mtok_s"] = round(config.batch * config.length / seconds / 1e6, 1)
        yield line


def main() -> None:
    """Print what a source holds; with --bench, how fast each layout gives batches."""
    parser = argparse.ArgumentParser(prog="python -m data.pipeline", description=main.__doc__)
    for field in ("source", "tokenizer", "length", "batch", "folder"):
        default = getattr(Data(), field)
        parser.add_argument(f"--{field}", type=type(default), default=default)
    parser.add_argument("--bench", type=int, nargs="?", const=300, default=0, metavar="BATCHES")
    flags = vars(parser.parse_args())
    count = flags.pop("bench")
    try:
        config = Data(**flags)
        found = corpora.summary(sources.documents(config))
        print(json.dumps({"source": str(config.source), **found._asdict()}))
        for line in bench(config, count) if count else ():
            print(json.dumps(line))
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
