"""A source is a file with a Config: named by a word, held as a Config, or opening its own split."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from configs import checks
from configs.schema import Data, Experiment
from data import sources
from data.pipeline import open_split
from data.sources import stdlib, text, tfds
from models import lm

ROOT = Path(__file__).parents[2]


def test_every_file_is_a_source():
    files = {
        p.stem for room in ("sources", "tasks") for p in (ROOT / "data" / room).glob("[!_]*.py")
    }
    assert {form.partition(":")[0] for form in sources.forms()} == files >= {"stdlib", "text"}


@pytest.mark.parametrize(
    ("word", "config"),
    [
        ("stdlib", stdlib.Config()),
        ("text:some:where", text.Config("some:where")),
        ("tfds:lm1b/subwords8k:text", tfds.Config("lm1b/subwords8k:text")),
    ],
)
def test_a_word_and_its_config_are_one_source(word, config):
    assert sources.find(word) == config and str(config) == word
    assert sources.find(config) is config


@pytest.mark.parametrize("word", ["stdlb", "text", "text:", "stdlib:x", "", "tfds"])
def test_wrong_words_are_one_line(word):
    with pytest.raises(ValueError, match=f"^unknown source '{word}': it must be one of .*nearest"):
        sources.find(word)


def test_a_config_file_may_hold_the_config(config, folder):
    given = dataclasses.replace(config, source=text.Config(str(folder)))
    checks.check(Experiment(model=lm.Config(), data=given))
    one, two = (open_split(data, "train") for data in (config, given))
    assert one.fingerprint == two.fingerprint and one.metric == "bits_per_byte"


@dataclasses.dataclass
class Made:
    """A source that makes its tokens by itself."""

    keys: int = 8

    def open(self, data, split, host, hosts):
        return (self.keys, data.length, split, host, hosts)


def test_a_source_may_open_its_own_split():
    data = Data(source=Made(keys=3), length=16)
    assert open_split(data, "train", 0, 2) == (3, 16, "train", 0, 2)
    with pytest.raises(ValueError, match="gives no documents"):
        sources.documents(data)


def test_reading_the_sources_loads_nothing_heavy():
    code = "import sys; from data import sources; sources.forms(); "
    code += "print(*{'numpy', 'jax', 'tensorflow_datasets', 'grain'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "" and done.returncode == 0, done.stdout + done.stderr
