"""TFDS sources: written and read without TensorFlow, splits kept, features chosen by name."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs.schema import Data
from data import corpora, sources, tfds_example
from data.pipeline import open_split
from data.sources import tfds

ROOT = Path(__file__).parents[2]

# Import as if these were not installed.
WITHOUT = """
import sys
from importlib.machinery import PathFinder
class Others(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] not in ("tensorflow", "jax", "torch"):
            return PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Others
"""


@pytest.fixture(scope="module")
def stored(folder, tmp_path_factory):
    """The small folder as the data set named_documents, built in a process without TensorFlow."""
    data_dir = tmp_path_factory.mktemp("tfds")
    code = f"{WITHOUT}\nfrom data import tfds_example\ntfds_example.main()"
    command = [sys.executable, "-c", code, f"--folder={data_dir}", f"--source=text:{folder}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return data_dir


def contents(corpus: corpora.Corpus, split: str) -> list[bytes]:
    return sorted(content for _, content in corpus.read(split))


def test_a_data_set_of_our_own_gives_back_every_document_and_split(folder, stored):
    found = sources.documents(Data(source="tfds:named_documents:text", folder=str(stored)))
    expected = sources.documents(Data(source=f"text:{folder}"))
    for split in corpora.SPLITS:
        assert contents(found, split) == contents(expected, split) != []


def test_reading_and_batching_needs_no_tensorflow(stored):
    code = f"""{WITHOUT}
from configs.schema import Data
from data.pipeline import open_split
source = "tfds:named_documents:text"
config = Data(source=source, folder={str(stored)!r}, length=32, batch=4)
print(len(open_split(config, "train")), open_split(config, "test").batch(0)["inputs"].sum())
assert not set(sys.modules) & {{"tensorflow", "jax", "torch"}}
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    config = Data(source="tfds:named_documents:text", folder=str(stored), length=32, batch=4)
    here = (len(open_split(config, "train")), open_split(config, "test").batch(0)["inputs"].sum())
    assert done.stdout.split() == [str(value) for value in here]


def test_one_of_two_text_features_must_be_named(stored):
    config = Data(source="tfds:named_documents", folder=str(stored))
    choice = "tfds:named_documents:name, tfds:named_documents:text"
    for feature in ("", ":title"):
        config.source = f"tfds:named_documents{feature}"
        with pytest.raises(ValueError, match=f"must name one Text or Image .* of: {choice}$"):
            sources.documents(config)


def test_a_data_set_that_is_not_there_says_how_to_prepare_it(stored):
    with pytest.raises(ValueError, match="^tfds data set 'lm1b' is not prepared below") as error:
        sources.documents(Data(source="tfds:lm1b:text", folder=str(stored)))
    line = str(error.value)
    assert "\n" not in line and "needs TensorFlow, reading does not" in line
    recipe = f"tfds.builder('lm1b', data_dir='{stored}', file_format='array_record')"
    assert f"{recipe}.download_and_prepare()" in line


def test_another_file_format_says_how_to_prepare_it_again(stored, tmp_path):
    shutil.copytree(stored / "named_documents", tmp_path / "named_documents")
    info = tmp_path / "named_documents" / "1.0.0" / "dataset_info.json"
    described = json.loads(info.read_text())
    described["fileFormat"] = "tfrecord"
    info.write_text(json.dumps(described))
    with pytest.raises(ValueError, match="is stored as tfrecord, which needs TensorFlow"):
        sources.documents(Data(source="tfds:named_documents:text", folder=str(tmp_path)))


def test_configs_and_versions_are_found_on_disk(stored, tmp_path):
    version = stored / "named_documents" / "1.0.0"
    for config, number in (("plain", "1.0.0"), ("plain", "1.10.0"), ("other", "1.0.0")):
        shutil.copytree(version, tmp_path / "set" / config / number)
    assert tfds._prepared("set/plain", tmp_path).name == "1.10.0"
    assert tfds._prepared("set/plain/1.0.0", tmp_path).name == "1.0.0"
    with pytest.raises(ValueError, match="several configs; .* tfds:set/other, tfds:set/plain$"):
        tfds._prepared("set", tmp_path)
    shutil.rmtree(tmp_path / "set" / "other")
    assert tfds._prepared("set", tmp_path).parent.name == "plain"


def build_pictures(data_dir: Path, splits: dict[str, int]) -> dict[str, list[np.ndarray]]:
    """A data set of 4 x 5 colour pictures; returns their pixels."""
    import tensorflow_datasets as tfds
    from PIL import Image

    draw = np.random.default_rng(0)
    pixels = {
        split: [draw.integers(0, 256, (4, 5, 3), dtype=np.uint8) for _ in range(count)]
        for split, count in splits.items()
    }

    class Pictures(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Random pictures with a label."""

        name = "pictures"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(4, 5, 3)),
                "label": tfds.features.ClassLabel(num_classes=2),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, _):
            return {split: self._generate_examples(split) for split in pixels}

        def _generate_examples(self, split):
            for i, picture in enumerate(pixels[split]):
                file = io.BytesIO()
                Image.fromarray(picture).save(file, "PNG")
                file.seek(0)
                yield i, {"image": file, "label": i % 2}

    Pictures(data_dir=str(data_dir), file_format="array_record").download_and_prepare()
    return pixels


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Pictures with a train and a test split, and no validation."""
    data_dir = tmp_path_factory.mktemp("pictures")
    return data_dir, build_pictures(data_dir, {"train": 300, "test": 20})


def test_pictures_are_their_pixels_as_tokens(pictures):
    data_dir, pixels = pictures
    config = Data(source="tfds:pictures", folder=str(data_dir), length=61, batch=4, layout="packed")
    expected = {picture.tobytes() for picture in pixels["test"]}
    split = open_split(config, "test")
    rows = [batch["targets"][row] for batch in split.batches() for row in range(4)]
    assert {bytes(row[:-1].astype(np.uint8)) for row in rows} == expected
    assert {int(row[-1]) for row in rows} == {256}


def test_the_missing_validation_comes_out_of_train(pictures):
    data_dir, pixels = pictures
    corpus = sources.documents(Data(source="tfds:pictures:image", folder=str(data_dir)))
    train, validation, test = (set(contents(corpus, split)) for split in corpora.SPLITS)
    assert test == {picture.tobytes() for picture in pixels["test"]}
    assert train | validation == {picture.tobytes() for picture in pixels["train"]}
    assert train.isdisjoint(validation) and 4 <= len(validation) <= 30


def test_building_twice_keeps_the_first(folder, tmp_path):
    first = tfds_example.build(tmp_path, f"text:{folder}")
    stamps = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    assert tfds_example.build(tmp_path, f"text:{folder}") == first
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == stamps
