"""What an encoder fills in depends on the row alone: not on its neighbours, hosts or batches."""

import dataclasses

import numpy as np
import pytest

from data import masking, packing
from data.pipeline import open_split

SHARE = 0.15


def draw(rows=64, length=256, seed=0):
    inputs = np.random.default_rng(seed).integers(0, 257, (rows, length)).astype(np.int32)
    return inputs, np.ones((rows, length), np.int32)


def hidden(inputs, segments, seed=0, epoch=0):
    epochs = np.full(len(inputs), epoch)
    return masking.hidden(inputs, segments, SHARE, seed=seed, epochs=epochs)


def test_a_row_hides_the_same_tokens_beside_any_other_rows():
    inputs, segments = draw()
    whole = hidden(inputs, segments)
    np.testing.assert_array_equal(hidden(inputs[5:6], segments[5:6]), whole[5:6])
    np.testing.assert_array_equal(hidden(inputs[::-1], segments[::-1]), whole[::-1])
    other, _ = draw(seed=1)
    other[5] = inputs[5]
    np.testing.assert_array_equal(hidden(other, segments)[5], whole[5])


def test_other_tokens_seeds_and_epochs_hide_other_places():
    inputs, segments = draw()
    first = hidden(inputs, segments)
    changed = inputs.copy()
    changed[:, 100] = (changed[:, 100] + 1) % 257
    swapped = inputs[:, np.r_[1, 0, 2 : inputs.shape[1]]]
    others = [hidden(changed, segments), hidden(swapped, segments)]
    others += [hidden(inputs, segments, seed=1), hidden(inputs, segments, epoch=1)]
    for other in others:  # two independent draws agree in .15^2 + .85^2 of the places
        assert np.mean(other == first) == pytest.approx(0.745, abs=0.02)


def test_the_share_holds_everywhere_and_padding_is_never_hidden():
    """Standard error of 16,384 draws: 0.0028; of 64 draws of one place: 0.045."""
    inputs, segments = draw(rows=1024, length=16)
    segments[:, 12:] = 0
    found = hidden(inputs, segments)
    assert not found[:, 12:].any()
    assert found[:, :12].mean() == pytest.approx(SHARE, abs=0.01)
    assert np.abs(found[:, :12].mean(0) - SHARE).max() < 0.05
    pairs = np.corrcoef(found[:, :12].T)[np.triu_indices(12, 1)]
    assert np.abs(pairs).max() < 0.15  # places are independent
    equal = np.zeros_like(inputs)  # equal tokens say nothing of where they are hidden
    assert 0 < hidden(equal, segments)[0].sum() < 12


@pytest.mark.parametrize("layout", packing.LAYOUTS)
def test_hosts_and_repeated_reading_change_nothing(config, layout):
    config = dataclasses.replace(config, layout=layout)
    for name in ("train", "validation"):
        whole = masking.masked(open_split(config, name), SHARE)
        parts = [masking.masked(open_split(config, name, host, 4), SHARE) for host in range(4)]
        for i in (0, len(whole) - 1):
            batch = whole.batch(i)
            assert batch["hidden"].dtype == bool and batch["hidden"].any()
            joined = np.concatenate([part.batch(i)["hidden"] for part in parts])
            np.testing.assert_array_equal(joined, batch["hidden"])
            np.testing.assert_array_equal(whole.batch(i)["hidden"], batch["hidden"])
        assert {*whole.batch(0)} - {*open_split(config, name).batch(0)} == {"hidden"}


def test_a_held_out_row_hides_the_same_tokens_in_batches_of_any_size(config):
    splits = [
        masking.masked(open_split(dataclasses.replace(config, batch=size), "validation"), SHARE)
        for size in (2, 8)
    ]
    small = np.concatenate([splits[0].batch(i)["hidden"] for i in range(4)])
    np.testing.assert_array_equal(small, splits[1].batch(0)["hidden"])


def test_each_epoch_hides_other_tokens_of_a_row(config):
    split = masking.masked(open_split(config, "train"), SHARE)
    seen = {}
    for i in range(2 * len(split)):
        batch = split.batch(i)
        for row, marks in zip(batch["inputs"], batch["hidden"], strict=True):
            seen.setdefault(row.tobytes(), []).append(marks)
    twice = [marks for marks in seen.values() if len(marks) == 2]
    assert len(twice) > len(seen) / 2
    assert np.mean([(a == b).all() for a, b in twice]) < 0.1
