"""Tasks: definitions by hand, an oracle, a guesser; no host, batch or count changes a row."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from configs.schema import Data
from data import sources, tasks
from data.pipeline import open_split
from data.tasks import arithmetic, words
from tests.data import oracles

NAMES = sorted(path.stem for path in Path(tasks.__path__[0]).glob("[!_]*.py"))
LENGTHS = {"selective_copying": 64}
SETTINGS = [
    *((name, {}) for name in NAMES),
    ("mqar", {"filler": "random"}),
    ("parity", {"every": True}),
    ("copying", {"order": "reverse"}),
    ("copying", {"order": "sorted"}),
    ("arithmetic", {"brackets": True}),
    *(("words", {"group": group}) for group in ("S3", "A5", "A4xZ5", "Z60")),
    *(("words", {"letters": letters}) for letters in ("swaps", "three")),
]


def config(name, **settings):
    return importlib.import_module(f"data.tasks.{name}").Config(**settings)


def opened(name, split="validation", host=0, hosts=1, seed=0, batch=64, length=0, **settings):
    length = length or LENGTHS.get(name, 32)
    data = Data(source=config(name, **settings), length=length, batch=batch, seed=seed)
    return open_split(data, split, host, hosts)


def test_there_are_tasks_and_each_has_an_oracle():
    assert len(NAMES) >= 7 and set(NAMES) == set(oracles.ORACLES) == set(oracles.GUESSES)
    assert set(NAMES) < set(sources.forms())


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_an_oracle_is_always_right_and_a_guesser_at_chance(name, settings):
    task, split = config(name, **settings), opened(name, **settings)
    answer = oracles.ORACLES[name]
    right = guessed = due = 0
    rng = np.random.default_rng(0)
    for i in range(8):
        batch = split.batch(i)
        for tokens, targets, weights in zip(
            batch["inputs"], batch["targets"], batch["weights"], strict=True
        ):
            at = np.flatnonzero(weights)
            found = answer(task, tokens.tolist(), at.tolist())
            right += sum(f == t for f, t in zip(found, targets[at].tolist(), strict=True))
            guesses = oracles.GUESSES[name](task, tokens.tolist())
            guessed += sum(rng.choice(guesses) == t for t in targets[at].tolist())
            due += len(at)
    assert right == due > 0
    deviation = (task.chance * (1 - task.chance) / due) ** 0.5
    assert abs(guessed / due - task.chance) < 5 * deviation


@pytest.mark.parametrize("name", NAMES)
def test_rows_depend_on_their_number_and_the_seed_alone(name):
    whole = opened(name, "train", batch=8)
    length = whole.config.length
    halves = [opened(name, "train", host, 2, batch=8) for host in range(2)]
    for i in (0, 3):
        parts = [half.batch(i) for half in halves]
        for key, array in whole.batch(i).items():
            np.testing.assert_array_equal(array, np.concatenate([part[key] for part in parts]))
            assert array.shape[0] == 8 and (key == "answers" or array.shape[1] == length)
    held = opened(name, batch=8, held_out=12)  # as many as there are: none of them changes
    np.testing.assert_array_equal(held.batch(0)["inputs"], opened(name, batch=8).batch(0)["inputs"])
    last = held.batch(1)
    assert (
        last["segments"][4:].max() == 0 == last["weights"][4:].max() and last["weights"][:4].any()
    )
    others = [opened(name, "test", batch=8), opened(name, batch=8, seed=1), whole]
    seen = {held.batch(0)["inputs"].tobytes(), *(s.batch(0)["inputs"].tobytes() for s in others)}
    assert len(seen) == 4
    assert len({held.fingerprint, others[1].fingerprint}) == 2


@pytest.mark.parametrize("name", NAMES)
def test_a_number_of_examples_comes_again_in_another_order(name):
    split = opened(name, "train", batch=8, examples=16)
    assert len(split) == 2
    epochs = [[split.batch(2 * e + i)["inputs"] for i in range(2)] for e in range(2)]
    first, second = (np.concatenate(e) for e in epochs)
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(np.unique(first, axis=0), np.unique(second, axis=0))


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_symbols(name):
    split = opened(name)
    batch = split.batch(0)
    for key in ("inputs", "targets"):
        assert 0 <= batch[key].min() and batch[key].max() < split.vocabulary
    text = split.tokenizer.decode(batch["inputs"][0])
    np.testing.assert_array_equal(split.tokenizer.encode(text.encode()), batch["inputs"][0])


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_the_places_of_answers_are_those_with_a_weight(name, settings):
    """Each once, in order, then -1; a task that asks everywhere names none."""
    split = opened(name, "train", **settings)
    batch = split.batch(0)
    most = config(name, **settings).places(split.config.length)
    assert ("answers" in batch) == (most < split.config.length)
    for weights, answers in zip(batch["weights"], batch.get("answers", ()), strict=False):
        due = np.flatnonzero(weights)
        assert answers.tolist() == [*due.tolist(), *[-1] * (most - len(due))]


def test_mqar_asks_early_keys_early():
    """At power 0.01 the first slot is drawn about as 1 / sum of (g + 1)^-0.99."""
    split = opened("mqar", "train", batch=2000, length=64, pairs=1)
    at = split.batch(0)["weights"].argmax(axis=1)
    share = (at == 2).mean()
    want = 1 / sum((g + 1) ** -0.99 for g in range(31))
    assert abs(share - want) < 0.04
    even = opened("mqar", "train", batch=2000, length=64, pairs=1, power=1.0)
    assert abs((even.batch(0)["weights"].argmax(axis=1) == 2).mean() - 1 / 31) < 0.02


def test_mqar_may_fill_with_random_tokens():
    rows = opened("mqar", "train", filler="random").batch(0)
    assert (rows["inputs"] == 0).mean() < 0.01 < (opened("mqar").batch(0)["inputs"] == 0).mean()


def test_groups_are_groups():
    """Sizes, a neutral first element, and each element once in every row and column."""
    for group, size in dict(S3=6, S5=120, A5=60, A4xZ5=60, Z60=60).items():
        table = np.asarray(words.products(group))
        assert table.shape == (size, size) and table[0].tolist() == list(range(size))
        every = np.arange(size)
        assert (np.sort(table, 0) == every[:, None]).all() and (np.sort(table, 1) == every).all()
        a, b, c = np.random.default_rng(0).integers(0, size, (3, 500))
        np.testing.assert_array_equal(table[table[a, b], c], table[a, table[b, c]])
    assert len(words.letters("S5", "swaps")) == 11 and len(words.letters("S5", "three")) == 31


def test_a_formula_by_hand():
    task = arithmetic.Config()
    given = iter([2, 3, 4, 1]), iter([0, 2, 1]), None  # 2 + 3 * 4 - 1
    assert task.flat(4, *given) == ([2, 5, 3, 7, 4, 6, 1], 13 % 5)
    given = iter([2, 3, 4]), iter([2, 0]), iter([0.9, 0.0])  # ((2 * 3) + 4)
    assert task.nested(3, *given) == ([8, 8, 2, 7, 3, 9, 5, 4, 9], 10 % 5)


def test_parity_of_every_bit():
    rows = opened("parity", every=True).batch(0)
    np.testing.assert_array_equal(rows["weights"] > 0, rows["segments"] > 0)


@pytest.mark.parametrize(
    ("name", "settings", "text"),
    [
        ("mqar", {"pairs": 9}, "pairs=9 needs rows of 36 tokens, but data.length=32. Use pairs=8."),
        ("mqar", {"vocabulary": 8}, "vocabulary=8 has 3. Use vocabulary=10."),
        ("selective_copying", {"answers": 40}, "needs rows of 80 tokens, but data.length=64"),
        ("selective_copying", {"vocabulary": 3}, "fewer than two data tokens"),
        ("induction", {"vocabulary": 2}, "leaves nothing to recall"),
        ("induction", {"length": 2}, "needs rows of 3 tokens"),
        ("words", {"group": "A5", "letters": "swaps"}, "needs group 'S3' or 'S5', not 'A5'"),
        ("arithmetic", {"shortest": 99}, "has no formula of 99 to 31 tokens"),
        ("arithmetic", {"modulus": 1}, "must be at least 2"),
        ("copying", {"shortest": 16}, "must be in 1..15"),
        ("parity", {"shortest": 33}, "must be in 1..32"),
        ("parity", {"shortest": 0}, "must be in 1..32"),
    ],
)
def test_what_does_not_fit_is_one_line(name, settings, text):
    with pytest.raises(ValueError, match="^data.source: [^\n]*$") as caught:
        opened(name, **settings)
    assert text in str(caught.value)
