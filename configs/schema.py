"""The typed config tree: an experiment is one `Experiment`; a flag can set every field of it.

A config file returns an `Experiment` from `get_config()`. It stays mutable until the command line
has been read; then `freeze` makes it constant. "Off" is 0, "" or an empty tuple, so a flag can
say it. This module imports neither JAX nor a model: a misspelt key is refused before they load.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import json
import re
from typing import Any, Literal, NamedTuple

from configs import overrides
from training.optimizers import adamw

ROOMS = ("configs\\.schema", "models", "data", "training\\.optimizers")  # where Configs are


@dataclasses.dataclass
class Data:
    """Where tokens come from and how documents are laid into rows."""

    # stdlib | packages | tfds:NAME | text:FOLDER, or a task such as mqar; in a file also a Config.
    source: Any = dataclasses.field(default="stdlib", metadata={"word": "data.tasks"})
    tokenizer: str = "bytes"  # bytes | bpe:FILE (a tokenizers JSON file)
    layout: Literal["windows", "packed", "stream"] = "windows"  # see docs/data.md
    length: int = 512  # tokens in a row
    batch: int = 16  # rows in a global batch, over all hosts
    seed: int = 0  # of the order of rows, another in each epoch
    folder: str = ""  # data_dir of TFDS, and where token files are cached ("": the user's cache)


@dataclasses.dataclass
class Optimizer:
    """How gradients move weights: a rule and what all rules share; maps alone decay."""

    rule: Any = dataclasses.field(  # a file of training/optimizers, its name by flag
        default_factory=adamw.Config, metadata={"folder": "training.optimizers"}
    )
    learning_rate: float = 3e-3  # the peak
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"  # after the warmup
    warmup_steps: int = 100  # of a linear rise from 0
    decay_fraction: float = 0.2  # wsd: share of the steps spent in the final decay
    final_fraction: float = 0.1  # learning rate at the end, as a share of the peak
    weight_decay: float = 0.1  # times the learning rate, each step; of maps of the stream
    clip_norm: float = 1.0  # largest norm of all gradients together; 0: off
    accumulation: int = 1  # microbatches summed before one update
    ema: float = 0.0  # share of the old that a mean of weights keeps; it is judged, sampled; 0: off


RENAMED = {  # keys that a command line may use as well
    "optimizer.name": "optimizer.rule",
    "optimizer.b1": "optimizer.rule.b1",
    "optimizer.b2": "optimizer.rule.b2",
    "optimizer.eps": "optimizer.rule.eps",
}


@dataclasses.dataclass
class Mesh:
    """Devices along each mesh axis; -1 on one axis takes all that the others leave."""

    data: int = -1  # copies of the model, each with rows of its own
    fsdp: int = 1  # rows of the batch, and weights split over the same devices
    tensor: int = 1  # heads and channels of each layer


@dataclasses.dataclass
class Checkpoint:
    """When to save and what to keep; every save is verified by a SHA-256 manifest."""

    every_steps: int = 200  # 0: only the last step
    keep: int = 3  # newest steps kept
    keep_best: int = 1  # steps with the best validation loss kept beside them


@dataclasses.dataclass
class Evaluation:
    """Validation during and after training."""

    every_steps: int = 200  # 0: only at the end
    batches: int = 16  # of the validation split, from its start
    length: int = 0  # tokens in its rows, as to see beyond the trained length; 0: data.length
    sample_tokens: int = 256  # tokens of the sample printed at the end; 0: none
    sample_prompt: str = "def "  # what the sample goes on from
    temperature: float = 0.7  # of the sample; 0: always the likeliest token


@dataclasses.dataclass
class Guards:
    """What to do when a step goes wrong (exit codes: 5 non-finite, 6 hang, 4 storage)."""

    max_bad_steps: int = 3  # non-finite updates are skipped; this many in a row stop the run
    hang_timeout_s: float = 0.0  # 0: off; no finished step for so long dumps all stacks and stops


@dataclasses.dataclass
class Experiment:
    """One experiment: a model, its data, and how it is trained."""

    model: Any = None  # models.lm.Config
    steps: int = 1000  # updates of the weights in all
    seed: int = 0  # of the first weights
    carry_state: bool = False  # truncated BPTT: rows go on with their state (layout "stream")
    log_every: int = 10  # steps between two lines of the log
    data: Data = dataclasses.field(default_factory=Data)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
    guards: Guards = dataclasses.field(default_factory=Guards)


FROZEN = "_frozen"  # an attribute of classes that are


@functools.cache
def _frozen(cls: type) -> type:
    def refuse(self, name, value):
        raise dataclasses.FrozenInstanceError(f"the config is frozen: cannot set {name}={value!r}")

    def plain(_, *args, **kwargs):  # dataclasses.replace of a frozen config gives a mutable one
        return cls(*args, **kwargs)

    body = {"__setattr__": refuse, "__new__": plain, "__module__": cls.__module__, FROZEN: True}
    return type(cls.__name__, (cls,), body)


def freeze(tree: Any) -> Any:
    """Make every dataclass of `tree` constant, in place, and return it; again changes nothing."""
    if isinstance(tree, (tuple, list)):
        for node in tree:
            freeze(node)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for field in dataclasses.fields(tree):
            freeze(getattr(tree, field.name))
        if not hasattr(type(tree), FROZEN):
            object.__setattr__(tree, "__class__", _frozen(type(tree)))
    return tree


def to_dict(tree: Any) -> Any:
    """`tree` as plain JSON values; each dataclass says its class under "class"."""
    if isinstance(tree, (tuple, list)):
        return [to_dict(node) for node in tree]
    if not dataclasses.is_dataclass(tree):
        return tree
    named = {f.name: to_dict(getattr(tree, f.name)) for f in dataclasses.fields(tree)}
    return {"class": f"{type(tree).__module__}.{type(tree).__name__}", **named}


def from_dict(values: Any, key: str = "") -> Any:
    """The tree that `to_dict` described; ValueError in one line where it describes none of ours.

    Nothing is run but the import of a module of this library that holds a Config: see `ROOMS`.
    """
    if isinstance(values, list):
        return tuple(from_dict(node, f"{key}[{i}]") for i, node in enumerate(values))
    if not isinstance(values, dict):
        return values
    values = _today(values)
    cls = _class(values.get("class"), key)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    given = {}
    for name, value in values.items():
        inner = overrides.join(key, name)
        if name == "class":
            continue
        if name not in fields:
            near = overrides.hint(name, fields)
            raise ValueError(f"unknown key {inner!r}{near} in a stored config.")
        given[name] = from_dict(value, inner)
        if not overrides.fits(fields[name].type, given[name]):
            raise ValueError(overrides.refusal(inner, fields[name].type, repr(value), str(value)))
    try:
        return cls(**given)
    except TypeError as error:  # a field without a default is not there
        raise ValueError(f"stored config, {key or 'outermost'}: {error}") from None


def _today(values: dict) -> dict:
    """A stored section in today's keys: an optimizer once had a name where it has a rule."""
    if values.get("class") != "configs.schema.Optimizer" or "name" not in values:
        return values
    inner = {key: values[key] for key in ("b1", "b2", "eps") if key in values}
    rule = {"class": f"training.optimizers.{values['name']}.Config", **inner}
    kept = {key: value for key, value in values.items() if key not in ("name", *inner)}
    return kept | {"rule": rule}


def _class(name: Any, key: str) -> type:
    """The dataclass `MODULE.NAME` of a module in ROOMS."""
    module, _, kind = str(name).rpartition(".")
    cls = None
    if re.fullmatch(rf"(?:{'|'.join(ROOMS)})(?:\.[a-z][a-z0-9_]*)*", module):
        with contextlib.suppress(ImportError):
            cls = vars(importlib.import_module(module)).get(kind)
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__module__ == module):
        where = f"stored config, {key or 'outermost'}"
        raise ValueError(f"{where}: {name!r} is no class of a config of this library.")
    return cls


class Change(NamedTuple):
    """A key whose value differs between two configs; classes by their last names."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key} {_shown(self.old)}, now {_shown(self.new)}"


def changes(old: Any, new: Any, key: str = "") -> list[Change]:
    """The keys in which the config `new` differs from `old`, which `to_dict` described.

    What `old` does not know, as it is older, counts as the default.
    """
    if isinstance(new, (tuple, list)):
        if not isinstance(old, list) or len(old) != len(new):
            return [Change(key, old, to_dict(new))]
        pairs = [(old[i], node, f"[{i}]") for i, node in enumerate(new)]
    elif dataclasses.is_dataclass(new):
        described, old = to_dict(new), _today(old) if isinstance(old, dict) else old
        if not isinstance(old, dict) or old.get("class") != described["class"]:
            return [Change(key, old, described)]
        pairs = [
            (old.get(field.name, to_dict(_default(field))), getattr(new, field.name), field.name)
            for field in dataclasses.fields(new)
        ]
    else:
        return [] if old == new else [Change(key, old, new)]
    return [c for was, now, part in pairs for c in changes(was, now, overrides.join(key, part))]


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _shown(value: Any) -> str:
    """A value in a line for the user."""
    if isinstance(value, dict):  # models.attention.softmax.Config: softmax
        return str(value.get("class", "?")).removesuffix(".Config").rpartition(".")[2]
    if isinstance(value, list):
        return f"({', '.join(map(_shown, value))})"
    return str(value)


def fingerprint(tree: Any) -> str:
    """First 16 hex digits of the SHA-256 of the tree's JSON: equal configs, equal fingerprints."""
    text = json.dumps(to_dict(tree), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class AddressError(ValueError, argparse.ArgumentTypeError):
    """A path that lies on no disk; a parser of options shows its text."""


def on_disk(path: str, name: str = "") -> str:
    """`path`; AddressError where it is an address such as gs://bucket/run, with a key's `name`.

    Locks, logs and token files need a file system, so that no path of any kind may be one.
    """
    found = re.search(r"[A-Za-z][A-Za-z0-9+.-]*://(\S*)", path)
    if not found:
        return path
    near = f"/mnt/{found[1].lstrip('/')}"
    raise AddressError(
        f"{name}{'=' if name else ''}{path} is an address, not a path: files lie on mounted disks. "
        f"Mount it, and give the folder, such as {near}."
    )
