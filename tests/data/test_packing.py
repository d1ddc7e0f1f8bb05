"""Rows of tokens: every prediction once, documents kept apart, streams unbroken."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import Data
from data import packing, sources, token_cache
from data.tokenizers import open_tokenizer

SEPARATOR = 1_000_000
SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=30)
LENGTHS = st.integers(2, 24)


def flat_stream(sizes: list[int]) -> np.ndarray:
    """Documents of tokens that occur once each, so that a token says where it belongs."""
    parts, start = [np.array([SEPARATOR])], 0
    for size in sizes:
        parts += [np.arange(start, start + size), np.array([SEPARATOR])]
        start += size
    return np.concatenate(parts).astype(np.uint32)


def epoch(layout: packing.Layout, batch: int, number: int = 0) -> list[packing.Batch]:
    rows = np.arange(layout.rows).reshape(-1, batch)
    return [layout.take(chunk, np.full(batch, number)) for chunk in rows]


def runs(batch: packing.Batch):
    """(row, segment, inputs, targets) of every maximal run of one segment number in a row."""
    for row in range(len(batch["inputs"])):
        numbers = batch["segments"][row]
        borders = [0, *(np.flatnonzero(np.diff(numbers)) + 1), len(numbers)]
        for start, end in zip(borders[:-1], borders[1:], strict=True):
            here = slice(start, end)
            yield row, numbers[start], batch["inputs"][row, here], batch["targets"][row, here]


def check_batch(batch: packing.Batch, length: int) -> None:
    """What holds in every layout: dtypes, padding, and no run that crosses a document's border."""
    for key in ("inputs", "targets", "segments"):
        assert batch[key].dtype == np.int32 and batch[key].shape[1] == length
        assert batch[key].flags.c_contiguous
    assert batch["weights"].dtype == np.float32
    real = batch["segments"] > 0
    assert np.array_equal(batch["weights"], real.astype(np.float32))
    assert not batch["inputs"][~real].any() and not batch["targets"][~real].any()
    for _, number, inputs, targets in runs(batch):
        if number:
            assert SEPARATOR not in inputs[1:] and SEPARATOR not in targets[:-1]
            assert np.array_equal(inputs[1:], targets[:-1])


@settings(deadline=None, max_examples=150)
@given(sizes=SIZES, length=LENGTHS)
def test_windows_are_the_stream_in_order(sizes, length):
    flat = flat_stream(sizes)
    layout = packing.windows(flat, length, SEPARATOR)
    batches = epoch(layout, 1)
    real = [batch["segments"][0] > 0 for batch in batches]
    for key, expected in (("inputs", flat[:-1]), ("targets", flat[1:])):
        found = np.concatenate([b[key][0][r] for b, r in zip(batches, real, strict=True)])
        assert np.array_equal(found, expected)
    assert all(r.all() for r in real[:-1])
    for batch in batches:
        check_batch(batch, length)
        numbers = [number for _, number, _, _ in runs(batch) if number]
        assert numbers == list(range(1, len(numbers) + 1))


@settings(deadline=None, max_examples=150)
@given(sizes=SIZES, length=LENGTHS)
def test_packed_rows_give_back_every_document(sizes, length):
    flat = flat_stream(sizes)
    layout = packing.packed(flat, length, SEPARATOR)
    pieces = {}
    for batch in epoch(layout, 1):
        check_batch(batch, length)
        found = list(runs(batch))
        numbers = [number for _, number, _, _ in found]
        padding = [0] if numbers[-1] == 0 else []
        assert numbers == [*range(1, len(numbers) - len(padding) + 1), *padding]
        for _, number, inputs, targets in found:
            if number:
                first = inputs[0] == SEPARATOR
                key = (targets[0], 0) if first else (inputs[0], 1)
                assert key not in pieces
                pieces[key] = (inputs, targets)
    ordered = [pieces[key] for key in sorted(pieces)]
    assert np.array_equal(np.concatenate([targets for _, targets in ordered]), flat[1:])
    assert np.array_equal(np.concatenate([inputs for inputs, _ in ordered]), flat[:-1])
    assert len(ordered) == sum(-(-(size + 1) // length) for size in sizes)


@settings(deadline=None, max_examples=150)
@given(sizes=SIZES, length=LENGTHS, batch=st.integers(1, 5))
def test_streams_go_on_from_batch_to_batch(sizes, length, batch):
    flat = flat_stream(sizes)
    layout = packing.stream(flat, length, batch, SEPARATOR)
    assert layout.rows % batch == 0
    first, second = epoch(layout, batch), epoch(layout, batch, number=1)
    inputs, targets = [], []
    for row in range(batch):
        real = [b["segments"][row] > 0 for b in first]
        inputs += [b["inputs"][row][r] for b, r in zip(first, real, strict=True)]
        targets += [b["targets"][row][r] for b, r in zip(first, real, strict=True)]
        joined = np.concatenate([b["segments"][row] for b in first + second])
        tokens = np.concatenate([b["inputs"][row] for b in first + second])
        tokens, joined = tokens[joined > 0], joined[joined > 0]
        if not len(tokens):
            continue
        starts = tokens[1:] == SEPARATOR
        starts[len(tokens) // 2 - 1] = True  # the second epoch begins
        assert np.array_equal(np.diff(joined) != 0, starts)
        assert joined.min() >= 1 and joined.max() <= 2 * len(sizes)
    assert np.array_equal(np.concatenate(inputs), flat[:-1])
    assert np.array_equal(np.concatenate(targets), flat[1:])
    for b in first:
        check_batch(b, length)


def test_stream_numbers_stay_in_int32_after_any_number_of_epochs():
    layout = packing.stream(flat_stream([3] * 50), 8, 2, SEPARATOR)
    for number in (10**6, 10**9, 10**12):
        for batch in epoch(layout, 2, number):
            real = batch["segments"][batch["weights"] > 0]
            assert real.min() >= 1 and real.max() <= 2**30
            check_batch(batch, 8)


@pytest.mark.parametrize("name", packing.LAYOUTS)
def test_row_minus_one_is_padding(name):
    layout = packing.lay_out(name, flat_stream([5, 9, 2]), 6, 2, SEPARATOR)
    batch = layout.take(np.array([0, -1]), np.zeros(2, np.int64))
    assert batch["weights"][0].sum() > 0
    assert all(not batch[key][1].any() for key in batch)


@settings(deadline=None, max_examples=200)
@given(sizes=st.lists(st.integers(1, 20), max_size=60), capacity=st.integers(20, 40))
def test_best_fit_overfills_no_row_and_leaves_at_most_one_half_empty(sizes, capacity):
    rows = packing.best_fit(np.array(sizes, np.int64), capacity)
    used = np.bincount(rows, sizes) if sizes else np.zeros(0)
    assert (used <= capacity).all() and (used > 0).all()
    assert (used <= capacity / 2).sum() <= 1


def test_best_fit_takes_the_fullest_row_that_has_room():
    # 7 and 6 open rows with 3 and 4 free; the 3 must go to the row of 7, and leave room for the 4.
    assert packing.best_fit(np.array([3, 6, 4, 7]), 10).tolist() == [0, 1, 1, 0]
    assert packing.best_fit(np.array([8, 7, 6, 2, 3]), 10).tolist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("length", [512, 1024, 2048])
def test_the_standard_library_fills_its_rows(length, tmp_path):
    tokenizer = open_tokenizer("bytes")
    corpus = sources.documents(Data(source="stdlib"))
    for split in ("train", "validation", "test"):
        tokens = token_cache.load(corpus, tokenizer, split, str(tmp_path))
        layout = packing.packed(tokens.flat, length, tokenizer.separator)
        assert (len(tokens.flat) - 1) / (layout.rows * length) >= 0.95


def test_packing_is_repeatable():
    flat = flat_stream(np.random.default_rng(0).integers(1, 60, 500).tolist())
    plans = [packing.plan(flat, 32, SEPARATOR) for _ in range(2)]
    assert all(np.array_equal(a, b) for a, b in zip(*plans, strict=True))


def test_an_unknown_layout_is_one_line():
    line = "^unknown layout 'pack': .*; nearest: packed$"
    with pytest.raises(ValueError, match=line):
        packing.lay_out("pack", flat_stream([1]), 2, 1, SEPARATOR)
