"""A misspelt key: one line with the right key, exit code 2, and JAX never loaded."""

import random
import re
import resource
import string
import subprocess
import sys

import pytest

from configs import overrides
from tests.configs.shipped import FILES, ROOT, read


def typos(key: str, known: set[str], seed: int) -> list[str]:
    """`key` with one letter deleted, two neighbours swapped, one letter inserted; no other key."""
    random_ = random.Random(f"{seed} {key}")
    letters = [match.start() for match in re.finditer(r"\w(?!\])", key)]
    pairs = [i for i in letters if i + 1 in letters and key[i] != key[i + 1]]
    i, j, k = (random_.choice(places) for places in (letters, pairs, letters))
    made = [
        key[:i] + key[i + 1 :],
        key[:j] + key[j + 1] + key[j] + key[j + 2 :],
        key[:k] + random_.choice(string.ascii_lowercase) + key[k:],
    ]
    return [typo for typo in made if typo not in known]


@pytest.mark.parametrize("file", FILES)
def test_every_key_is_suggested_for_its_typos(file):
    tree = read(f"--config={file}")
    keys = overrides.keys(tree)
    known = {*keys, *overrides.sections(tree)}
    tried, wrong = 0, []
    for key in keys:
        for typo in typos(key, known, seed=0) + typos(key, known, seed=1):
            tried += 1
            with pytest.raises(ValueError) as refused:
                overrides.normal(tree, typo, "1")
            line = str(refused.value)
            assert line.startswith(f"unknown key {typo!r}") and "\n" not in line
            if f"(did you mean {key!r}?)" not in line:
                wrong.append(line)
    assert tried >= 5 * len(keys) and len(keys) > 30
    assert len(wrong) <= 0.05 * tried, wrong


KEYS = ["model.width", "optimizer.learning_rate", "steps"]
TRIED = [  # of each file one key in turn
    pytest.param(file, key, marks=[pytest.mark.long] * (n % len(KEYS) != i))
    for n, file in enumerate(FILES)
    for i, key in enumerate(KEYS)
]


def spent() -> float:
    """Processor seconds of ended children: unlike the clock, it knows of no other work."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize(("file", "key"), TRIED)
def test_the_program_refuses_typos_at_once(file, key):
    typo = typos(key, set(KEYS), seed=2)[0]
    argv = [sys.executable, "train.py", f"--config={file}", f"--config.{typo}=1"]
    start = spent()
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60)
    seconds = spent() - start
    assert done.returncode == 2, done.stderr
    assert done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"config error: unknown key {typo!r} (did you mean {key!r}?)")
    assert seconds < 1.0
