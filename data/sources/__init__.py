"""Sources: a file a source, whose `Config` is all that must be written (see docs/extend.md).

In settings a source is one word, the file's name and after a colon the first setting, such as
`stdlib` or `text:FOLDER`; or its `Config` itself, where it has more to set. A source of documents
has `corpus(folder)`, which gives a `data.corpora.Corpus` (`folder` is `Data.folder`). One that
makes its tokens by itself has `open(data, split, host, hosts)` instead, which gives a
`data.split.Split`. These files import nothing heavy: flags are checked by reading them.
"""

import dataclasses
import difflib
import importlib
import importlib.util
import pkgutil
from typing import Any

from configs.schema import on_disk
from data import tasks


def forms() -> tuple[str, ...]:
    """How each source is written, as "text:FOLDER"; a task by its name."""
    own, made = (
        [info.name for info in pkgutil.iter_modules(p)] for p in (__path__, tasks.__path__)
    )
    return (*map(_form, sorted(own)), *sorted(made))


def _form(name: str) -> str:
    first = next((field.name.upper() for field in dataclasses.fields(_config(name))), "")
    return f"{name}:{first}" if first else name


def _config(name: str) -> Any:
    made = importlib.util.find_spec(f"data.tasks.{name}") is not None
    return importlib.import_module(f"data.{'tasks' if made else 'sources'}.{name}").Config


def find(source: Any) -> Any:
    """The Config of a source given by its word, or as a Config; ValueError for any other."""
    if not isinstance(source, str):
        return source
    name, colon, setting = source.partition(":")
    known = {form.partition(":")[0]: form for form in forms()}
    if name not in known or (":" in known[name]) != bool(colon and setting) or source[-1:] == ":":
        near = known[difflib.get_close_matches(name, known, 1, 0)[0]]
        raise ValueError(
            f"unknown source {source!r}: it must be one of {', '.join(known.values())}; "
            f"nearest: {near}"
        )
    config = _config(name)
    return config(setting) if setting else config()


def documents(config: Any) -> Any:
    """The `data.corpora.Corpus` of `config.source`; `config` is a `configs.schema.Data`.

    ValueError in one line if the source is unknown, missing or empty, or gives no documents.
    """
    source = find(config.source)
    if not hasattr(source, "corpus"):
        raise ValueError(f"source {source} gives no documents: it makes its tokens by itself")
    on_disk(str(source), "source")
    return source.corpus(on_disk(config.folder, "folder"))
