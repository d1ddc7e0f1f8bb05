"""The command line: config files, overrides of their fields, and a program's own options.

`--config=FILE[:ARG]` runs FILE (a config file is code: run only what you trust) and passes ARG to
its `get_config`; `--config=RUN/config.json` reads what a run has written, which is no code;
`--config.model.width=512` sets a field. Everything is checked before JAX is
imported, on a preview of the file; then the file is read for real, and the config is frozen.
"""

import contextlib
import importlib.util
import inspect
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from configs import checks, overrides, preview, usage
from configs.schema import RENAMED, Experiment, freeze, from_dict, on_disk

ROOT = Path(__file__).parents[1]
Pairs = list[tuple[str, str | None]]  # of a key and the text given for it; None: a bare flag
ADDRESSES = ("storage",)  # options that name no file
HELP = ("help", "h", "helpshort", "helpfull")


class UsageError(Exception):
    """The user's command line or config is wrong: one line, exit code 2."""


class ConfigFileError(UsageError):
    """The config file's own code failed."""


def run(main: Callable[[], int | None]) -> None:
    """Run a program: a UsageError becomes one line and exit code 2; other errors stay bugs."""
    try:
        sys.exit(main())
    except UsageError as error:
        if {"--debug", "-debug", "--debug=true"} & set(sys.argv):
            traceback.print_exc()
        print("config error:", " ".join(str(error).split("\n")), file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def configuration() -> Iterator[None]:
    """ValueErrors of this block are the user's: sizes that do not divide, a folder without data."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


def parse(
    argv: Sequence[str],
    options: Mapping[str, Any],
    *,
    single: bool = False,
    otherwise: Callable[[dict[str, Any]], list[str]] = lambda values: [],
) -> tuple[list[Experiment], dict[str, Any]]:
    """The frozen experiment of every `--config`, and the value of every option.

    `options` holds the program's own options with their defaults, which say the types (str, bool,
    int, float); the values come back under the same names, and the files as given under "config".
    `single` refuses a second `--config`; without any, `otherwise` names files by the options'
    values. `--help` prints the program's docstring and exits. All that is wrong is a UsageError.
    """
    files, pairs, values = _split(list(argv), options)
    files = files or otherwise(values)
    if not files:
        raise UsageError("--config is missing. Try --config=configs/quickstart.py, or --help.")
    if single and len(files) > 1:
        raise UsageError(f"--config is given {len(files)} times: {', '.join(files)}. Give one.")
    if "jax" not in sys.modules:
        _preview(files, pairs)
    return [freeze(tree) for tree in _checked(_chosen(files, pairs))], values | {"config": files}


def span(text: str) -> tuple[int, int] | None:
    """`20:25` as (20, 25); None for an empty text."""
    if not text:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or int(match[1]) > int(match[2]):
        raise UsageError(f"{text!r} is no span of steps. Write FIRST:LAST, such as 20:25.")
    return int(match[1]), int(match[2])


def _split(argv: list[str], options: Mapping[str, Any]):
    """Config files, overrides (key, text) and options; a text of None is a flag without a value."""
    files, pairs, values = [], [], dict(options)
    while argv:
        token = argv.pop(0)
        match = re.fullmatch(r"--?([A-Za-z][^=]*)(?:=(.*))?", token, re.DOTALL)
        if not match:
            raise UsageError(f"unexpected argument {token!r}: write --option=value.")
        name, text = match.groups()
        if name in HELP and name not in options:
            try:
                print(usage.text(options), flush=True)
            except BrokenPipeError:  # a reader that has seen enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        known = name == "config" or name.startswith("config.") or name in options
        if not known:
            raise UsageError(_unknown(name, options))
        is_switch = isinstance(options.get(name), bool)
        if text is None and not is_switch and argv and re.match(r"[^-]|-\.?\d|-?$", argv[0]):
            text = argv.pop(0)
        if name == "config":
            if not text:
                raise UsageError("--config needs a file: --config=configs/quickstart.py")
            with configuration():
                files.append(on_disk(text, "--config"))
        elif name in options:
            with configuration():
                values[name] = overrides.read(f"--{name}", type(options[name]), text)
                if name not in ADDRESSES:
                    on_disk(str(values[name]), f"--{name}")
        else:
            pairs.append((name.removeprefix("config."), text))
    return files, pairs, values


def _unknown(name: str, options: Mapping[str, Any]) -> str:
    head, dot, rest = name.partition(".")
    allowed = ("config", *options, "help")
    near = overrides.nearest(head, allowed)
    if name in overrides.keys(Experiment()) or head == "model":
        near, dot, rest = f"config.{name}", "", ""
    meant = f" (did you mean '--{near}{dot}{rest}'?)" if near else ""
    return f"unknown option '--{name}'{meant}. Options: {', '.join('--' + o for o in allowed)}."


def _preview(files: list[str], pairs: Pairs) -> None:
    """Raise the UsageErrors that can be found without JAX; where that takes JAX, say nothing."""
    try:
        with preview.stand_ins():
            chosen = _chosen(files, pairs)
        _checked(chosen)
    except ConfigFileError as error:
        if isinstance(error.__cause__, ValueError):  # raised by intent, not for want of JAX
            raise
    except UsageError:
        raise
    except (Exception, preview.NeedsReal):
        return


def _chosen(
    files: list[str], pairs: list[tuple[str, str | None]]
) -> list[tuple[str, Experiment, list]]:
    """Each file with what it returns, the sections that flags name in place, and the other flags.

    A chosen section is a file of code too: like the config itself, the preview reads it inertly.
    """
    today = [(RENAMED.get(key, key), text) for key, text in pairs]
    with configuration():
        return [(file, *overrides.choose(load(file), today)) for file in files]


def _checked(chosen: list[tuple[str, Experiment, list]]) -> list[Experiment]:
    """Copies of the trees with all overrides; a UsageError names the file among several."""
    done = []
    for file, tree, pairs in chosen:
        try:
            checks.check_types(tree)
            done.append(overrides.apply(tree, pairs))
            checks.check(done[-1])
        except ValueError as error:
            where = f"{file}: " if len(chosen) > 1 else ""
            raise UsageError(f"{where}{error}") from error
    return done


def load(spec: str) -> Experiment:
    """What `get_config` of FILE[:ARG] returns; UsageError if it does not return an Experiment."""
    name, colon, arg = spec.partition(":")
    path = Path(name)
    if path.suffix == ".json" and path.is_file():
        return _written(path)
    if path.suffix != ".py" or not path.is_file():
        raise UsageError(f"no config file {name!r}{_nearest_file(path)}.")
    args = (arg,) if colon else ()
    try:
        get_config = getattr(module(path), "get_config", None)
        if not callable(get_config):
            raise UsageError(f"{name} has no function get_config().")
        if not _accepts(get_config, args):
            fault = f"takes no argument; leave {colon}{arg} out" if colon else "needs an argument"
            raise UsageError(f"get_config() of {spec!r} {fault} ({name}{'' if colon else ':ARG'}).")
        tree = get_config(*args)
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        place = _place(path, error)
        if not isinstance(error, ValueError) and not place.startswith(f"{path}:"):
            raise  # a bug of ours, which must show itself
        kind = type(error).__name__
        raise ConfigFileError(f"{place}: {kind}: {error} (--debug: traceback)") from error
    if not isinstance(tree, Experiment):
        kind = type(tree).__name__
        raise ConfigFileError(f"get_config() of {name} must return an Experiment, not {kind}.")
    return tree


def sweep(spec: str, base: Experiment) -> Any:
    """What `get_sweep(base)` of the file of FILE[:ARG] returns; None where it has none."""
    path = Path(spec.partition(":")[0])
    get_sweep = getattr(module(path), "get_sweep", None) if path.suffix == ".py" else None
    return get_sweep(base) if get_sweep else None


def _written(path: Path) -> Experiment:
    """The experiment of a run's config.json; nothing of the file is run."""
    try:
        tree = from_dict(json.loads(path.read_bytes()))
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error
    if not isinstance(tree, Experiment):
        raise UsageError(f"{path} is no config.json that a run has written.")
    return tree


def module(path: Path) -> Any:
    """A config file's module: its code is run."""
    spec = importlib.util.spec_from_file_location(f"configs.given_{path.stem}", path)
    assert spec and spec.loader
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made
    spec.loader.exec_module(made)
    return made


def _accepts(function: Callable, args: tuple) -> bool:
    try:
        inspect.signature(function).bind(*args)
    except TypeError:
        return False
    return True


def _place(path: Path, error: BaseException) -> str:
    """FILE:LINE where the error was raised, or our line that called what raised it."""
    frames = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        frames.append((error.filename or "", error.lineno))
    place = str(path)
    for name, line in frames:
        file = Path(name).resolve()
        if file == path.resolve():
            place = f"{path}:{line}"
        elif ROOT in file.parents and file != Path(__file__):
            place = f"{file.relative_to(ROOT)}:{line}"
    return place


def _nearest_file(path: Path) -> str:
    folders = {
        path.parent,
        Path("configs"),
        *(p for p in Path("configs").glob("**/") if p.is_dir()),
    }
    found = {file for folder in folders for file in folder.glob("*.py")}
    configs = re.compile(r"^def get_config\b", re.MULTILINE)
    known = sorted(str(file) for file in found if configs.search(file.read_text("utf-8")))
    return overrides.hint(str(path), known, 0)
