"""The text of --help: the program, its options, the config files and every field.

What an option or a field does is the comment beside it in the source; nothing is written twice,
and nothing is imported that needs JAX.
"""

import ast
import inspect
import re
import sys
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from configs import overrides, schema

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models" / "lm.py"  # read as text: importing it takes seconds
COLUMN = 33  # of a name, before the words on it


def text(options: Mapping[str, Any]) -> str:
    """Everything that --help prints, for a program whose own options are `options`."""
    program = sys.modules["__main__"]
    file = getattr(program, "__file__", None)  # a program given by -c has none
    words = _option_words(Path(file)) if file else {}
    lines = [(program.__doc__ or "").strip(), "", "Options, with their defaults:"]
    lines.append(_line("--config=FILE[:WORD]", "a config file, and a word that some of them take"))
    lines.append(_line("--config.KEY=VALUE", "set a field, as --config.model.width=512"))
    for name, default in options.items():
        shown = str(default).lower() if isinstance(default, bool) else repr(default)
        lines.append(_line(f"--{name}={shown}", words.get(name, "")))
    lines += ["", "Config files:"]
    lines += [_line(str(file), words) for file, words in config_files()]
    lines += ["", "Fields, with the defaults that a config file may change (--config.KEY=VALUE):"]
    lines += [_line(name, words) for name, words in fields()]
    return "\n".join(lines)


def _line(name: str, words: str) -> str:
    return f"  {name:{COLUMN}}  {words}".rstrip()


def config_files() -> Iterator[tuple[Path, str]]:
    """Every config file of the checkout, and the first line of its docstring."""
    for file in sorted((ROOT / "configs").rglob("*.py")):
        if re.search(r"^def get_config\b", file.read_text("utf-8"), re.MULTILINE):
            yield file.relative_to(ROOT), _first_line(file)


def _first_line(file: Path) -> str:
    """The first line of a file's docstring."""
    return (ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "").partition("\n")[0]


def fields() -> Iterator[tuple[str, str]]:
    """(KEY=DEFAULT, what it does) of every field of an experiment and of a language model.

    A field that takes the name of a file is followed by the fields of each of these files.
    """
    classes = _classes(Path(inspect.getfile(schema)))
    yield from _fields("", "Experiment", classes)
    yield from _fields("model.", "Config", _classes(MODEL))
    for file in overrides.files_of("training.optimizers"):
        yield f"optimizer.rule={file.stem}", "the update rule: " + _first_line(file)
        yield from _fields("optimizer.rule.", "Config", _classes(file))


def _fields(prefix: str, name: str, classes: dict[str, list]) -> Iterator[tuple[str, str]]:
    for field, kind, default, words in classes[name]:
        if kind in classes:
            yield from _fields(f"{prefix}{field}.", kind, classes)
        elif field not in ("model", "rule"):
            choices = re.fullmatch(r"Literal\[(.*)\]", kind)
            more = f"one of {choices[1]}".replace("'", "") if choices else ""
            yield f"{prefix}{field}={default}", "; ".join(filter(None, [words, more]))


def _classes(file: Path) -> dict[str, list[tuple[str, str, str, str]]]:
    """(name, annotation, default, comment) of the fields of every class of a file."""
    comments = _comments(file)
    return {
        node.name: [
            (a.target.id, ast.unparse(a.annotation), _default(a.value), _beside(a, comments))
            for a in node.body
            if isinstance(a, ast.AnnAssign) and isinstance(a.target, ast.Name)
        ]
        for node in ast.parse(file.read_text("utf-8")).body
        if isinstance(node, ast.ClassDef)
    }


def _option_words(file: Path) -> dict[str, str]:
    """The comment beside each entry of a program's OPTIONS."""
    comments = _comments(file)
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "OPTIONS":
            given = node.value
            assert isinstance(given, ast.Dict)
            pairs = zip(given.keys, given.values, strict=True)
            return {ast.literal_eval(k): _beside(v, comments) for k, v in pairs if k}
    return {}


def _default(value: ast.expr | None) -> str:
    """A default as a command line would say it; what a factory makes is left out."""
    if isinstance(value, ast.Constant):
        return str(value.value)
    if isinstance(value, ast.Call):
        given = next((one.value for one in value.keywords if one.arg == "default"), None)
        return _default(given) if given else ""
    return "" if value is None else ast.unparse(value)


def _beside(node: ast.expr | ast.stmt, comments: dict[int, str]) -> str:
    """The first comment on the lines of a node."""
    lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
    return next((comments[line] for line in lines if line in comments), "")


def _comments(file: Path) -> dict[int, str]:
    """Comments by the line of code that they stand behind or, alone on a line, above."""
    found: dict[int, str] = {}
    with file.open("rb") as source:
        for token in tokenize.tokenize(source.readline):
            if token.type == tokenize.COMMENT:
                alone = not token.line[: token.start[1]].strip()
                found[token.start[0] + alone] = token.string.lstrip("# ")
    return found
