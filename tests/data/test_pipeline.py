"""Batches are a pure function of (config, split, number): any host count, any resume, any cache."""

import dataclasses
import hashlib
import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from configs.schema import Data, freeze
from data import corpora, packing, pipeline, sources, token_cache
from data.pipeline import open_split


def with_(config: Data, **changes) -> Data:
    return dataclasses.replace(config, **changes)


def equal(first: packing.Batch, second: packing.Batch) -> bool:
    return first.keys() == second.keys() and all(
        np.array_equal(first[key], second[key]) for key in first
    )


def digest(batches) -> str:
    total = hashlib.sha256()
    for batch in batches:
        for key in sorted(batch):
            total.update(key.encode() + batch[key].tobytes())
    return total.hexdigest()


def documents_of(batches, separator: int) -> set[bytes]:
    """Every piece of a document that appears as one segment in a row."""
    found = set()
    for batch in batches:
        for row in range(len(batch["targets"])):
            for number in range(1, batch["segments"][row].max() + 1):
                ids = batch["targets"][row][batch["segments"][row] == number]
                found.add(bytes(ids[ids != separator].astype(np.uint8)))
    return found - {b""}


@pytest.mark.parametrize("layout", packing.LAYOUTS)
def test_global_batches_do_not_depend_on_the_hosts(config, layout):
    config = with_(config, layout=layout, batch=32)
    digests = []
    for hosts in (1, 2, 4, 8):
        splits = [open_split(config, "train", host, hosts) for host in range(hosts)]
        assert 100 > 2 * len(splits[0])  # the hundred batches cross epochs
        digests.append(
            digest(
                {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
                for parts in ([split.batch(i) for split in splits] for i in range(100))
            )
        )
    assert len(set(digests)) == 1


@pytest.mark.parametrize("layout", packing.LAYOUTS)
def test_resuming_at_any_step_gives_the_unbroken_order(config, layout):
    split = open_split(with_(config, layout=layout), "train")
    steps = 2 * len(split) + 3
    unbroken = split.batches()
    expected, states = [], []
    for _ in range(steps):
        states.append(json.loads(json.dumps(unbroken.get_state())))
        expected.append(next(unbroken))
    for i in range(steps):
        assert states[i] == {"next_index": i}
        assert equal(expected[i], split.batch(i))
    for start in (0, 1, 2, len(split) - 1, len(split), steps - 1):
        resumed = split.batches(start)
        assert resumed.get_state() == {"next_index": start}
        assert equal(next(resumed), expected[start])
        unbroken.set_state(states[start])
        assert equal(next(unbroken), expected[start])
        resumed.close()
    unbroken.close()


def test_training_streams_go_on_from_batch_to_batch(config):
    split = open_split(with_(config, layout="stream"), "train")
    for i in range(2 * len(split)):
        this, following = split.batch(i), split.batch(i + 1)
        if i % len(split) < len(split) - 2:  # the last batch of an epoch may be padding
            assert this["weights"].all()
            assert np.array_equal(this["targets"][:, -1], following["inputs"][:, 0])


@pytest.mark.parametrize("layout", ["windows", "packed"])
def test_each_epoch_is_a_permutation_in_a_new_order(config, layout):
    config = with_(config, layout=layout, batch=7)
    split = open_split(config, "train")
    assert split.rows % config.batch  # batches straddle the border of two epochs
    rows = [row for i in range(3 * len(split)) for row in split.batch(i)["targets"]]
    rows = [row.tobytes() for row in rows]
    epochs = [rows[n * split.rows : (n + 1) * split.rows] for n in range(3)]
    still = packing.lay_out(layout, flat_of(config), config.length, config.batch, 256)
    every = still.take(np.arange(still.rows), np.zeros(still.rows, np.int64))["targets"]
    expected = Counter(row.tobytes() for row in every)
    assert all(Counter(part) == expected for part in epochs[:2])
    assert len({tuple(part) for part in epochs}) == 3


def flat_of(config: Data) -> np.ndarray:
    tokenizer = pipeline.open_tokenizer(config.tokenizer)
    return token_cache.load(sources.documents(config), tokenizer, "train", config.folder).flat


def test_the_seed_changes_the_order_and_nothing_else(config):
    first, second = (open_split(with_(config, seed=seed), "train") for seed in (0, 1))
    assert not equal(first.batch(0), second.batch(0))
    assert first.fingerprint == second.fingerprint and first.tokens == second.tokens
    # Seeds must not be shifted epochs of each other.
    assert not np.array_equal(
        packing.permutation(50, seed=0, epoch=1), packing.permutation(50, seed=1, epoch=0)
    )


def test_permutations_are_permutations_and_never_change():
    for size in (1, 2, 3, 10, 1000):
        assert sorted(packing.permutation(size, 3, 4)) == list(range(size))
    assert packing.permutation(10, seed=0, epoch=0).tolist() == [5, 6, 1, 2, 3, 4, 9, 8, 0, 7]


def test_every_position_is_equally_likely():
    size, epochs = 8, 4000
    counts = np.zeros((size, size))
    for epoch in range(epochs):
        counts[np.arange(size), packing.permutation(size, 0, epoch)] += 1
    chi_squared = ((counts - epochs / size) ** 2 / (epochs / size)).sum()
    assert chi_squared < 96  # 49 degrees of freedom: p = 0.0001


@pytest.mark.parametrize("layout", packing.LAYOUTS)
@pytest.mark.parametrize("split", ["validation", "test"])
def test_held_out_splits_are_finite_and_whole(config, layout, split):
    opened = open_split(with_(config, layout=layout, batch=3), split)
    batches = list(opened.batches())
    assert len(batches) == len(opened)
    assert sum(batch["weights"].sum() for batch in batches) == opened.tokens
    lengths = opened.tokenizer.byte_lengths
    total = sum((lengths[batch["targets"]] * batch["weights"]).sum() for batch in batches)
    assert total == opened.bytes
    assert {batch["targets"].shape for batch in batches} == {(3, 64)}
    assert list(opened.batches(len(opened))) == []
    for wrong in (-1, len(opened)):
        with pytest.raises(IndexError, match=f"{split} has no batch {wrong}"):
            opened.batch(wrong)


def test_the_last_batch_is_filled_with_rows_of_padding(config):
    opened = open_split(with_(config, batch=7), "test")
    assert opened.rows % 7
    last = opened.batch(len(opened) - 1)
    assert not last["weights"][opened.rows % 7 :].any()
    assert last["weights"][: opened.rows % 7].any(axis=1).all()


@pytest.mark.parametrize("layout", packing.LAYOUTS)
def test_no_training_row_holds_held_out_bytes(config, layout):
    # Rows as long as the longest document: each document is whole in some row or cut in two.
    config = with_(config, layout=layout, length=16384)
    corpus = sources.documents(config)
    split = open_split(config, "train")
    batches = [split.batch(i) for i in range(len(split))]
    seen = documents_of(batches, 256)
    train, held = dict(corpus.read("train")), {}
    for name in ("validation", "test"):
        held |= dict(corpus.read(name))
    assert train.keys().isdisjoint(held) and len(held) > 5
    blob = b"\xff\xff\xff".join(train.values())
    assert all(piece in blob for piece in seen)
    long = [content for content in held.values() if len(content) > 100]
    assert long and not any(content in piece for piece in seen for content in long)
    if layout == "packed":
        assert seen == set(train.values())


def test_counts_and_fingerprint_are_the_corpus(config):
    found = corpora.summary(sources.documents(config))
    for name in corpora.SPLITS:
        split = open_split(config, name)
        assert split.fingerprint == found.fingerprint
        assert (split.documents, split.bytes) == (found.documents[name], found.bytes[name])
        assert split.tokens == split.bytes + split.documents
        assert split.vocabulary == 257 and 0 < split.fill <= 1


def test_a_frozen_config_serves_and_a_changed_one_does_not_reach_the_split(config):
    assert len(open_split(freeze(with_(config)), "train")) > 0
    changing = with_(config)
    split = open_split(changing, "train")
    first = split.batch(0)
    changing.batch, changing.length = 2, 4
    assert equal(first, split.batch(0))


def test_bpe_gives_the_same_bytes_in_fewer_tokens(config, bpe):
    plain, merged = open_split(config, "test"), open_split(with_(config, tokenizer=bpe), "test")
    assert merged.vocabulary == 600 and merged.tokens < plain.tokens
    assert merged.fingerprint == plain.fingerprint and merged.bytes == plain.bytes
    lengths = merged.tokenizer.byte_lengths
    total = sum((lengths[b["targets"]] * b["weights"]).sum() for b in merged.batches())
    assert total == merged.bytes


def test_large_vocabularies_are_cached_in_32_bits(config, tmp_path):
    tokenizer = pipeline.open_tokenizer("bytes")
    wide = tokenizer._replace(pieces=(b"?",) * 70_000 + (b"",), fingerprint="wide")
    tokens = token_cache.load(sources.documents(config), wide, "test", str(tmp_path))
    assert tokens.flat.dtype == np.uint32 and tokens.flat[0] == 70_000


@pytest.fixture
def cached(config, tmp_path):
    """A config with a cache of its own, that cache's folder, and the first batch."""
    config = with_(config, folder=str(tmp_path))
    batch = open_split(config, "train").batch(0)
    (home,) = (tmp_path / ".frugal-tokens").iterdir()
    assert sorted(p.name for p in home.iterdir()) == [
        "meta.json",
        "test.npy",
        "train.npy",
        "validation.npy",
    ]
    return config, home, batch


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 4
    file.write_bytes(content)


DAMAGE = {
    "flipped bit": lambda home: flip(home / "train.npy", 1000),
    "flipped header": lambda home: flip(home / "train.npy", 20),
    "truncated": lambda home: (home / "train.npy").write_bytes(
        (home / "train.npy").read_bytes()[:-7]
    ),
    "emptied": lambda home: (home / "train.npy").write_bytes(b""),
    "deleted": lambda home: (home / "train.npy").unlink(),
    "swapped": lambda home: shutil.copy(home / "test.npy", home / "train.npy"),
    "no meta": lambda home: (home / "meta.json").unlink(),
    "torn meta": lambda home: (home / "meta.json").write_text("{"),
    "list meta": lambda home: (home / "meta.json").write_text("[]"),
    "edited meta": lambda home: (home / "meta.json").write_text(
        (home / "meta.json").read_text().replace('"documents": ', '"documents": 1')
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_built_again_with_one_warning(cached, caplog, damage):
    config, home, expected = cached
    DAMAGE[damage](home)
    assert equal(open_split(config, "train").batch(0), expected)
    assert len(caplog.records) == 1 and "encoding again" in caplog.text
    caplog.clear()
    assert equal(open_split(config, "train").batch(0), expected)
    assert not caplog.records


def test_a_good_cache_is_read_and_not_written(cached, monkeypatch):
    config, _, expected = cached
    monkeypatch.setattr(token_cache, "_build", None)
    assert equal(open_split(config, "train").batch(0), expected)


def test_a_build_that_dies_leaves_nothing_that_is_used(config, tmp_path, monkeypatch):
    config = with_(config, folder=str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "_seal", lambda meta: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            open_split(config, "train")
    (home,) = (tmp_path / ".frugal-tokens").iterdir()
    assert list(home.iterdir()) == []
    assert equal(open_split(config, "train").batch(0), open_split(config, "train").batch(0))


def test_the_cache_follows_the_documents(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"document number {i}")
    config = Data(source=f"text:{tmp_path}", length=8, batch=2, folder=str(tmp_path))
    before = open_split(config, "train")
    again = open_split(config, "train")
    assert again.fingerprint == before.fingerprint  # the cache inside the folder is no document
    name = next(n for n, _ in sources.documents(config).read("train"))
    (tmp_path / name).write_text("DOCUMENT NUMBER X")
    after = open_split(config, "train")
    assert after.fingerprint != before.fingerprint
    texts = [after.tokenizer.decode(after.batch(i)["inputs"]) for i in range(len(after))]
    assert any("DOCU" in text for text in texts)


def test_a_folder_that_cannot_be_made_is_one_line(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="^cannot write token files below .*data.folder=FOLDER$"):
        open_split(with_(config, folder=str(tmp_path / "file")), "train")


@pytest.mark.parametrize(
    ("changes", "arguments", "line"),
    [
        ({}, ("valid",), "unknown split 'valid': .*; nearest: validation$"),
        ({"length": 1}, ("train",), "length 1 must be at least 2; nearest: 2$"),
        ({"batch": 0}, ("train",), "batch 0 must be at least 1; nearest: 1$"),
        ({"layout": "streams"}, ("train",), "unknown layout 'streams': .*; nearest: stream$"),
        ({"tokenizer": "byte"}, ("train",), "unknown tokenizer 'byte': .*; nearest: bytes$"),
        ({"source": "std"}, ("train",), "unknown source 'std': .*; nearest: stdlib$"),
        ({}, ("train", 0, 3), "batch 8 must be a multiple of the 3 hosts; nearest: 9$"),
        ({}, ("train", 2, 2), r"host 2 must be in 0\.\.1 for 2 hosts$"),
    ],
)
def test_wrong_values_are_one_line(config, changes, arguments, line):
    with pytest.raises(ValueError, match=f"^{line}") as error:
        open_split(with_(config, **changes), *arguments)
    assert "\n" not in str(error.value)


def test_a_split_without_documents_is_one_line(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.txt").write_text("alone")
    config = Data(source=f"text:{tmp_path}", folder=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="^split 'test' of source 'text:.*' has no documents; .*$"):
        open_split(config, "test")


def test_the_command_prints_the_source_and_the_speed_of_each_layout(config, monkeypatch, capsys):
    flags = [f"--source={config.source}", f"--folder={config.folder}", "--length=64", "--bench=5"]
    monkeypatch.setattr(sys, "argv", ["pipeline", *flags])
    pipeline.main()
    source, *layouts = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert source["fingerprint"] == corpora.summary(sources.documents(config)).fingerprint
    assert [line["layout"] for line in layouts] == list(packing.LAYOUTS)
    assert all(line["direct_Mtok_s"] > 0 and line["prefetched_Mtok_s"] > 0 for line in layouts)
