"""Keys and values of a config tree as the command line writes them: `model.pattern[0].heads=8`.

Everything wrong is a ValueError of one line that names the key, the value and what is allowed.
Neither JAX nor a model is imported here.
"""

import copy
import dataclasses
import difflib
import importlib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

NAMES = {int: "an int", float: "a number", bool: "a bool", str: "a string"}
_ROOT = Path(__file__).parents[1]
BOOLS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


def children(node: Any) -> dict[str, Any]:
    """What lies one step below: fields by name, elements of a tuple as "[0]", "[1]" ..."""
    if isinstance(node, (tuple, list)):
        return {f"[{i}]": element for i, element in enumerate(node)}
    if dataclasses.is_dataclass(node):
        return {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
    return {}


def is_section(node: Any) -> bool:
    """True for what holds keys of its own: a dataclass, or a tuple with dataclasses in it."""
    if isinstance(node, (tuple, list)):
        return any(is_section(element) for element in node)
    return dataclasses.is_dataclass(node)


def join(prefix: str, part: str) -> str:
    """The key of a child."""
    return prefix + part if part.startswith("[") or not prefix else f"{prefix}.{part}"


def sections(tree: Any, prefix: str = "") -> list[str]:
    """The key of every section, outermost first."""
    below = [
        (join(prefix, part), node) for part, node in children(tree).items() if is_section(node)
    ]
    return [key for name, node in below for key in (name, *sections(node, name))]


def keys(tree: Any, prefix: str = "") -> list[str]:
    """Every key that takes a value."""
    found = []
    for part, node in children(tree).items():
        name = join(prefix, part)
        found += keys(node, name) if is_section(node) else [name]
    return found


def nearest(word: str, words: Iterable[str], cutoff: float = 0.6) -> str:
    """The word that one edit makes of `word`, else the most similar one, else ""."""
    words = list(words)
    close = difflib.get_close_matches(word, words, len(words) or 1, cutoff)
    edited = [other for other in close if _one_edit(word, other)]
    edited = edited or [other for other in words if _one_edit(word, other)]
    return (edited or close or [""])[0]


def hint(word: str, words: Iterable[str], cutoff: float = 0.6) -> str:
    """ " (did you mean ...?)", or nothing where no word is near."""
    near = nearest(word, words, cutoff)
    return f" (did you mean {near!r}?)" if near else ""


def _one_edit(a: str, b: str) -> bool:
    """Whether one letter inserted, deleted, replaced, or two neighbours swapped, turn a into b."""
    start = 0
    while start < min(len(a), len(b)) and a[start] == b[start]:
        start += 1
    a, b = a[start:], b[start:]
    while a and b and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]
    return len(a) + len(b) == 1 or len(a) == len(b) == 1 or (len(a) == 2 and a == b[::-1])


def find(tree: Any, key: str) -> tuple[Any, str, Any]:
    """Parent of `key`, its last part, and its value; ValueError with the nearest key if unknown."""
    parts = re.findall(r"\w+|\[\d+\]", key)
    whole = ""
    for part in parts:
        whole = join(whole, part)
    if not parts or whole != key:
        raise ValueError(_unknown(tree, key, tree, ""))
    parent, value, prefix = None, tree, ""
    for part in parts:
        parent, inside = value, children(value)
        if part not in inside:
            raise ValueError(_unknown(tree, key, parent, prefix))
        value, prefix = inside[part], join(prefix, part)
    return parent, parts[-1], value


def _unknown(tree: Any, key: str, parent: Any, prefix: str) -> str:
    there = children(parent)
    if not there:
        return f"unknown key {key!r}: {prefix} is {parent!r} and holds no keys."
    known = keys(tree) + sections(tree)
    last = (re.findall(r"\w+", key) or [""])[-1]
    same = [other for other in known if re.findall(r"\w+", other)[-1] == last]
    same.sort(key=lambda other: (not other.startswith(prefix), len(other)))
    edited = [other for other in known if _one_edit(key, other)]
    alike = [join(prefix, part) for part in [nearest(last, there)] if part]
    # A slip of the finger, the right name in the wrong place, a name that is much alike.
    near = edited or ([] if last.isdigit() else same + alike)
    meant = f" (did you mean {near[0]!r}?)" if near else ""
    return f"unknown key {key!r}{meant}. Keys there: {', '.join(there)}."


def choose(
    tree: Any, pairs: Iterable[tuple[str, str | None]]
) -> tuple[Any, list[tuple[str, str | None]]]:
    """A copy of `tree` with the sections that a flag chooses by name, and the other pairs.

    A field whose metadata names a "folder" of Config files takes the name of any file there:
    `optimizer.rule=lion`. What has that class already keeps its settings. One whose metadata says
    "word" takes a word in place of a section, `data.source=text:FOLDER`, which `configs.checks`
    reads; the name of a file of the folder that it names, `data.source=mqar`, is its Config. One
    with a "parser" takes what the function `parse` of that module reads, `model.pattern=gla,rwkv7`.
    """
    tree, rest = _apart(tree), []
    for key, text in pairs:
        metadata = _metadata(tree, key)
        folder = metadata.get("folder", "")
        if not metadata:
            rest.append((key, text))
            continue
        parent, part, value = find(tree, key)
        if parser := metadata.get("parser", ""):
            parse = importlib.import_module(parser).parse
            object.__setattr__(parent, part, parse(_needed(key, text)))
            continue
        if not folder:
            word, tasks = _needed(key, text), metadata["word"]
            if word not in [file.stem for file in files_of(tasks)]:
                object.__setattr__(parent, part, word)
                continue
            folder = tasks
        module = f"{folder}.{_file(key, folder, text)}"
        if type(value).__module__ != module:
            object.__setattr__(parent, part, importlib.import_module(module).Config())
    return tree, rest


def placed(tree: Any, pairs: Iterable[tuple[str, Any]]) -> Any:
    """A copy of `tree` with each (key, section) in its place; other keys are set by `apply`."""
    tree = _apart(tree)
    for key, section in pairs:
        parent, part, _ = find(tree, key)
        if not dataclasses.is_dataclass(parent):
            raise ValueError(f"{key} is an element: set the whole tuple around it.")
        if not fits(annotation(parent, part), section):
            raise ValueError(f"{key}={section!r} does not fit its field.")
        object.__setattr__(parent, part, _apart(section))
    return tree


def _metadata(tree: Any, key: str) -> Mapping[str, Any]:
    """What the field `key` says of how it is set; nothing for other keys."""
    try:
        parent, part, _ = find(tree, key)
    except ValueError:  # for `normal` to say
        return {}
    if not dataclasses.is_dataclass(parent):
        return {}
    return next(field.metadata for field in dataclasses.fields(parent) if field.name == part)


def files_of(folder: str) -> list[Path]:
    """The files of a package of ours, by name; each defines a Config."""
    return sorted(_ROOT.joinpath(*folder.split(".")).glob("[!_]*.py"))


def _file(key: str, folder: str, text: str | None) -> str:
    """The name of a file of `folder`; ValueError with those there are."""
    files, word = [file.stem for file in files_of(folder)], _needed(key, text)
    if word not in files:
        allowed = ", ".join(files)
        raise ValueError(f"{key}={_shown(text)} must be one of {allowed}{hint(word, files, 0)}.")
    return word


def apply(tree: Any, pairs: Iterable[tuple[str, str | None]]) -> Any:
    """A copy of `tree` with each (key, text) set; nothing is set unless everything is right."""
    tree, pairs = choose(tree, pairs)
    for key, text in pairs:
        normal(tree, key, text)
    for key, text in pairs:
        tree = _set(tree, *normal(tree, key, text))
    return tree


def _apart(tree: Any) -> Any:
    """A copy that shares no section: pattern[0] of `(gla.Config(),) * 3` is then one block."""
    if isinstance(tree, (tuple, list)):
        return type(tree)(_apart(node) for node in tree)
    if not dataclasses.is_dataclass(tree):
        return tree
    new = copy.copy(tree)
    for name, node in children(tree).items():
        object.__setattr__(new, name, _apart(node))
    return new


def _set(tree: Any, key: str, value: Any) -> Any:
    # Imported once everything is known to be right: it costs as much time as all checks together.
    from absl import flags
    from ml_collections import config_flags

    config_flags.register_flag_parser_for_type(Literal, flags.ArgumentParser())
    text = value if isinstance(value, str) else repr(value)
    argv = ["", f"--config.{key}={text}"]
    values = flags.FlagValues()
    config_flags.DEFINE_config_dataclass("config", tree, flag_values=values, sys_argv=argv)
    values(argv)
    return values.config


def normal(tree: Any, key: str, text: str | None) -> tuple[str, Any]:
    """Check one override and return it as (key of a field, its new value).

    An element of a tuple of numbers becomes the whole tuple. `text` None is a bare flag: true.
    """
    parent, part, value = find(tree, key)
    if is_section(value):
        inside = ", ".join(children(value)) or "it has none"
        raise ValueError(
            f"{key}={_shown(text)} sets a whole section; set one of its keys: {inside}."
        )
    if isinstance(parent, (tuple, list)):
        whole = key[: -len(part)]
        owner, field, _ = find(tree, whole)
        if not dataclasses.is_dataclass(owner):
            raise ValueError(_file_only(key, text))
        new = list(parent)
        kind = _element(_without_none(annotation(owner, field)), parent)
        new[int(part[1:-1])] = read(key, kind, text)
        return whole, tuple(new)
    kind = _without_none(annotation(parent, part))
    if typing.get_origin(kind) is tuple or kind is tuple:
        return key, _read_tuple(key, kind, text, value)
    return key, read(key, kind, text)


def annotation(parent: Any, name: str) -> Any:
    """The annotation of a field."""
    return next(field.type for field in dataclasses.fields(parent) if field.name == name)


def _alternatives(kind: Any) -> tuple:
    """The members of a union; of any other annotation, itself."""
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if is_union else (kind,)


def _without_none(kind: Any) -> Any:
    rest = [one for one in _alternatives(kind) if one is not type(None)]
    return rest[0] if len(rest) == 1 else kind


def _element(kind: Any, values: Sequence) -> Any:
    """The type of a tuple's elements: as annotated, else as the elements that it has."""
    args = [arg for arg in typing.get_args(kind) if arg is not Ellipsis]
    held = {type(value) for value in values}
    return args[0] if args else held.pop() if len(held) == 1 else object


def _read_tuple(key: str, kind: Any, text: str | None, value: Sequence) -> tuple:
    """A tuple from `1,2`, `(1, 2)` or `[1, 2]`; an empty text or brackets mean an empty tuple."""
    inner = _needed(key, text).strip()
    if inner[:1] + inner[-1:] in ("()", "[]"):
        inner = inner[1:-1]
    pieces = [piece.strip().strip("'\"") for piece in inner.split(",")]
    if pieces[-1] == "":  # nothing at all, or the comma of (1,)
        pieces.pop()
    args = typing.get_args(kind)
    if args and Ellipsis not in args and len(pieces) != len(args):
        raise ValueError(f"{key}={_shown(text)} has {len(pieces)} values; it takes {len(args)}.")
    return tuple(read(key, _element(kind, value), piece) for piece in pieces)


def read(key: str, kind: Any, text: str | None) -> Any:
    """`text` as a value of type `kind`: int, float, bool, str or a Literal of strings."""
    if text is None and kind is bool:
        return True
    text = _needed(key, text)
    if kind is object:  # an element of a tuple that says nothing about its elements
        kind = next((k for k in (int, float) if _converted(k, text) is not None), str)
    if kind not in NAMES and typing.get_origin(kind) is not Literal:
        raise ValueError(_file_only(key, text))
    value = text if typing.get_origin(kind) is Literal else _converted(kind, text)
    if value is None or not fits(kind, value):
        raise ValueError(refusal(key, kind, _shown(text), text))
    return value


def _needed(key: str, text: str | None) -> str:
    if text is None:
        raise ValueError(f"{key} needs a value: {key}=...")
    return text


def _file_only(key: str, text: str | None) -> str:
    return f"{key}={_shown(text)}: this key is set in the config file, not by a flag."


def _converted(kind: type, text: str) -> Any:
    try:
        return BOOLS.get(text.lower()) if kind is bool else kind(text)
    except ValueError:
        return None


def fits(kind: Any, value: Any) -> bool:
    """Whether `value` may stand in a field annotated `kind`; unknown annotations accept all."""
    origin = typing.get_origin(kind)
    if len(_alternatives(kind)) > 1:
        return any(fits(one, value) for one in _alternatives(kind))
    if kind is type(None):
        return value is None
    if origin is Literal:
        return isinstance(value, str) and value in typing.get_args(kind)
    if kind is float:
        return (
            isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        )
    if kind in NAMES:
        return type(value) is kind
    if kind is tuple or origin is tuple:
        element = _element(kind, ())
        return isinstance(value, tuple) and all(fits(element, one) for one in value)
    is_section_type = isinstance(kind, type) and dataclasses.is_dataclass(kind)
    return not is_section_type or isinstance(value, kind)


def refusal(key: str, kind: Any, shown: str, text: str) -> str:
    """The line that says why `text` does not fit, and what would."""
    if typing.get_origin(kind) is Literal:
        allowed = typing.get_args(kind)
        return f"{key}={shown} must be one of {', '.join(allowed)}{hint(text, allowed, 0)}."
    use = ""
    number = _converted(float, text)
    if kind is bool:
        use = " Use true or false."
    elif kind is int and number is not None and math.isfinite(number):
        near = dict.fromkeys((math.floor(number), math.ceil(number)))
        use = f" Use {' or '.join(str(n) for n in near)}."
    elif kind is float and number is not None:
        use = " Use a finite number."
    name = NAMES.get(kind) or f"a {getattr(kind, '__name__', kind)}"
    return f"{key}={shown} is not {name}.{use}"


def _shown(text: str | None) -> str:
    """A value for a message: numbers bare, other text quoted and at most 60 characters long."""
    if text is None or _converted(float, text) is not None and len(text) <= 60:
        return text or ""
    return repr(text if len(text) <= 60 else text[:57] + "...")
