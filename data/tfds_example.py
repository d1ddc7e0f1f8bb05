"""A TFDS data set of our own, written and read without TensorFlow: a pattern for new data.

`python -m data.tfds_example --folder=FOLDER` stores the documents of a source as the data set
"named_documents"; `--config.data.source=tfds:named_documents:text --config.data.folder=FOLDER`
trains on it. It has two Text features, `name` and `text`, hence the `:text`.
"""

import argparse
from pathlib import Path
from typing import Any

from configs.schema import Data, on_disk
from data import corpora, sources


def _builder_class(corpus: corpora.Corpus) -> Any:
    import tensorflow_datasets as tfds

    class NamedDocuments(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """The documents of one corpus, with its splits."""

        name = "named_documents"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            text = tfds.features.Text
            return tfds.core.DatasetInfo(
                builder=self,
                description=f"Documents of the source {corpus.source}.",
                features=tfds.features.FeaturesDict({"name": text(), "text": text()}),
            )

        def _split_generators(self, _):
            return {split: self._generate_examples(split) for split in corpora.SPLITS}

        def _generate_examples(self, split):
            for name, content in corpus.read(split):
                yield name, {"name": name, "text": content}

    return NamedDocuments


def build(folder: str | Path, source: str = "stdlib") -> Path:
    """Write the documents of `source` below the data_dir `folder`; returns the data set's folder.

    A data set that is there already stays as it is.
    """
    corpus = sources.documents(Data(source=source))
    # Only array_record is written, and read back, without TensorFlow.
    builder = _builder_class(corpus)(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)


def main() -> None:
    """Store a source as the TFDS data set "named_documents"."""
    parser = argparse.ArgumentParser(prog="python -m data.tfds_example", description=main.__doc__)
    parser.add_argument(
        "--folder", type=on_disk, required=True, help="data_dir, made if it is missing"
    )
    parser.add_argument("--source", default="stdlib", help=", ".join(sources.forms()))
    flags = parser.parse_args()
    try:
        print(build(flags.folder, flags.source))
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
