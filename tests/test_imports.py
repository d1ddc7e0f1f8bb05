"""Who may import whom, and what may be imported or called nowhere, read from the source."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WHOLE = ("models.lm", "models.stacks", "models.weights")  # models, whatever is in them
ROOMS = {  # a room: which of our modules it may import beside its own
    "configs": ("models", "training.optimizers", "data.sources", "data.tasks"),
    "models": ("kernels", "parallel.sharding", "parallel.context", "programs.flops"),
    "programs": (),
    "kernels": ("programs",),
    "parallel": ("kernels",),
    "data": ("configs.schema",),
    "inference": ("models", "kernels", "parallel", "configs.schema", "data"),
    "training": ("configs.schema", *WHOLE, "parallel", "data", "inference"),
    "resources": ("programs",),
    "report": ("resources",),
    "evaluation": (
        "configs.schema",
        *WHOLE,
        "parallel",
        "training",
        "inference",
        "resources",
        "report",
    ),
    "science": (
        "configs.schema",
        "configs.sweep",
        "configs.claims",
        "configs.loading",
        "parallel",
        "training",
        "evaluation",
        "resources",
        "report",
        "data",
    ),
}
PARTS = "models.parts"
OF_CONFIGS = {"Config", "parse", "period", "is_channel"}  # what configs may use of others
PROGRAMS = ("train", "eval", "sweep")
LAUNCH = "parallel.launch"
COMMANDS = (LAUNCH, "configs.schema")  # what `python -m ROOM` may use beside its room
FORBIDDEN_NAMES = {"utils", "util", "helpers", "common", "misc"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "yaml.load", "yaml.unsafe_load", "torch.load", "pickle.loads"}
FORBIDDEN_FLAGS = {"allow_pickle", "trust_remote_code"}
LIGHT = {
    "configs.schema",
    "configs.loading",
    "configs.overrides",
    "configs.checks",
    "configs.preview",
    "configs.sweep",
    "configs.usage",
    LAUNCH,
    "training",
    "training.optimizers",
    "training.optimizers.adamw",  # the schema's default
}
SKIPPED = {"runs", "build", "dist"}
OPERATIONS = "|".join(path.parent.name for path in ROOT.glob("kernels/*/api.py"))
HOLES = {  # what may stand for a part of a module's name that is made at run time; else anything
    "operation": OPERATIONS,
    "folder": OPERATIONS,
    "self.folder": OPERATIONS,
    "impl": "ref|xla|pallas_tpu|pallas_gpu",
}


def files() -> list[Path]:
    """Every Python file of ours, relative to the root."""
    found = (path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
    return sorted(
        path
        for path in found
        if path.parts[0] not in SKIPPED and not any(part.startswith(".") for part in path.parts)
    )


def within(name: str, packages) -> bool:
    """Whether a module is one of `packages` or lies below one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def dotted(path: Path) -> str:
    """A file's module name."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, tree: ast.AST) -> set[str]:
    """All modules that a file may import, those inside functions and by importlib too.

    `from a import b` counts as a.b, whether or not b is a module.
    """
    found = set()
    package = path.parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            base = ".".join([*above, *filter(None, [node.module])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func).rpartition(".")[2]
            first = node.args[0]
            if isinstance(first, ast.JoinedStr) and first.values:
                first = first.values[0]
            if called in ("import_module", "__import__") and isinstance(first, ast.Constant):
                found.add(str(first.value).rstrip("."))
    return found


def is_architecture(name: str) -> bool:
    """models.FAMILY.NAME; models.parts holds what families share."""
    return name.startswith("models.") and name.count(".") >= 2 and not within(name, [PARTS])


def faults(path: Path, source: str) -> list[str]:
    """Every rule that a file breaks, one line each."""
    tree = ast.parse(source)
    name, room = dotted(path), path.parts[0]
    found = [f"{path} has a forbidden name" for part in path.parts if _is_vague(part)]
    for target in sorted(imports(path, tree)):
        if within(target, FORBIDDEN_MODULES) or "serialize_executable" in target:
            found.append(f"{path} imports {target}")
        if room != "tests" and within(target, [*PROGRAMS, "tests"]):
            found.append(f"{path} imports {target}, which nobody may import")
        if target == "__future__.annotations" and room in ("configs", "models"):
            found.append(f"{path} turns annotations into strings, which flags cannot read")
        if name in LIGHT and within(target, ["jax", "flax", "numpy", "models", "kernels"]):
            found.append(f"{path} imports {target}: typos would be refused late")
        may = [room, *ROOMS.get(room, ()), *(COMMANDS if path.name == "__main__.py" else ())]
        if room in ROOMS and within(target, ROOMS) and not within(target, may):
            found.append(f"{path} imports {target}: not from {room}")
        if room == "programs" and within(target, ["flax", "optax", "orbax"]):
            found.append(f"{path} imports {target}: programs need jax alone")
        if is_architecture(name) and within(target, ["models"]):
            if within(target, ["models.lm"]) or _other_architecture(target, path):
                found.append(f"{path} imports {target}: an architecture stands alone")
    return found + _calls(path, tree) + _more_than_configs(path, tree)


def _is_vague(part: str) -> bool:
    return part.removesuffix(".py").strip("_") in FORBIDDEN_NAMES


def _other_architecture(target: str, path: Path) -> bool:
    """Whether `models.FAMILY...` lies outside this file; `models.weights.weight` does not."""
    folder = target.split(".")[1] if "." in target else ""
    if within(target, [PARTS]):
        return False
    return (ROOT / "models" / folder).is_dir() and not within(target, [dotted(path)])


def _calls(path: Path, tree: ast.AST) -> list[str]:
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found = [
        f"{path}:{c.lineno} calls {n}"
        for c in calls
        if (n := ast.unparse(c.func)) in FORBIDDEN_CALLS
    ]
    for call in calls:
        for given in call.keywords:
            is_off = isinstance(given.value, ast.Constant) and given.value.value is False
            if given.arg in FORBIDDEN_FLAGS and not is_off:
                found.append(f"{path}:{call.lineno} passes {given.arg}")
    return found


def _more_than_configs(path: Path, tree: ast.AST) -> list[str]:
    """Config files take from models and optimizers nothing but their Config classes."""
    if path.parts[0] != "configs":
        return []
    modules, found = set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and within(node.module or "", ROOMS["configs"]):
            for alias in node.names:
                file = ROOT / (node.module or "").replace(".", "/") / f"{alias.name}.py"
                modules.add(alias.asname or alias.name)
                if not file.is_file():
                    found.append(f"{path} imports {alias.name}, which is no module")
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if within(alias.name, ROOMS["configs"])]
            found += [
                f"{path}: write `from {name.rpartition('.')[0]} import ...`, not import {name}"
                for name in names
            ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in modules and node.attr not in OF_CONFIGS:
                found.append(f"{path}:{node.lineno} uses {node.value.id}.{node.attr}")
    return found


def graph(sources: dict[Path, str]) -> dict[str, set[str]]:
    """Which of these modules each of them imports, a module itself rather than the package of it.

    Imports inside functions count, and so do modules whose name an f-string makes at run time. A
    package's own imports are those of its `__init__`.
    """
    modules = {dotted(path): path for path in sources}

    def module(target: str) -> str:
        while target and target not in modules:
            target = target.rpartition(".")[0]
        return target

    found = {}
    for name, path in modules.items():
        tree = ast.parse(sources[path])
        targets = {module(target) for target in imports(path, tree)}
        made = re.compile("|".join(_made_at_run_time(tree)) or "$")
        targets |= {other for other in modules if made.fullmatch(other)}
        found[name] = targets - {"", name}
    return found


def _made_at_run_time(tree: ast.AST) -> list[str]:
    """Patterns of the f-strings that are imported by importlib."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.JoinedStr):
            if ast.unparse(node.func).rpartition(".")[2] == "import_module":
                found.append("".join(map(_part, node.args[0].values)))
    return found


def _part(piece: ast.expr) -> str:
    if isinstance(piece, ast.FormattedValue):
        return f"(?:{HOLES.get(ast.unparse(piece.value), r'[^.]+')})"
    assert isinstance(piece, ast.Constant)
    return re.escape(str(piece.value))


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or by way of others."""
    reached = {name: _reached(edges, name) for name in edges}
    groups = {
        tuple(sorted(other for other in reached[name] if name in reached[other]))
        for name in edges
        if name in reached[name]
    }
    return sorted(map(list, groups))


def _reached(edges: dict[str, set[str]], start: str) -> set[str]:
    found, todo = set(), [start]
    while todo:
        for name in edges[todo.pop()] - found:
            found.add(name)
            todo.append(name)
    return found


def test_every_room_is_read():
    rooms = {path.parts[0] for path in files()}
    assert {"configs", "models", "kernels", "programs", "parallel", "data", "training"} <= rooms
    unknown = rooms - {*ROOMS, "tests", "benchmarks", "docs", *(f"{name}.py" for name in PROGRAMS)}
    assert not unknown, "name new rooms in ROOMS"


@pytest.mark.parametrize("path", files(), ids=str)
def test_rules_are_kept(path):
    assert faults(path, (ROOT / path).read_text("utf-8")) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/x/api.py", "from models import layers"),
        ("kernels/x/api.py", "def f():\n    import parallel.mesh"),
        ("kernels/x/api.py", "from ...models import layers"),
        ("programs/x.py", "from kernels import dispatch"),
        ("programs/x.py", "import flax.nnx"),
        ("kernels/x/api.py", "import importlib\nimportlib.import_module(f'models.{x}')"),
        ("parallel/context.py", "from models.mixer import State"),
        ("models/layers.py", "from parallel.mesh import make_mesh"),
        ("models/delta/new.py", "from models.linear_attention import gla"),
        ("models/delta/new.py", "from models.linear_attention.gla import Mixer"),
        ("models/delta/new.py", "from models.delta import gated_deltanet"),
        ("models/delta/new.py", "from . import gated_deltanet"),
        ("models/delta/new.py", "from models import lm"),
        ("models/delta/new.py", "import configs.schema"),
        ("data/x.py", "from configs import loading"),
        ("data/x.py", "import models.lm"),
        ("training/x.py", "from models.delta import gated_deltanet"),
        ("training/x.py", "from models import mixer"),
        ("training/x.py", "import resources"),
        ("training/x.py", "import train"),
        ("resources/x.py", "from models import lm"),
        ("inference/x.py", "from training import step"),
        ("training/x.py", "from eval import main"),
        ("benchmarks/x.py", "import sweep"),
        ("models/x.py", "from tests import tolerance"),
        ("configs/lm/x.py", "from training import step"),
        ("configs/lm/x.py", "from models.delta.gated_deltanet import Mixer"),
        ("configs/lm/x.py", "from models import lm\nlm.LM(1)"),
        ("configs/lm/x.py", "import models.lm"),
        ("configs/lm/x.py", "from training.optimizers import soap\nsoap.State(0)"),
        ("training/optimizers/adamw.py", "import jax"),
        ("configs/loading.py", "def f():\n    import jax.numpy as jnp"),
        ("configs/checks.py", "from models import lm"),
        ("kernels/utils.py", ""),
        ("models/common/x.py", ""),
        ("training/_helpers.py", ""),
        ("data/x.py", "import pickle"),
        ("data/x.py", "from cloudpickle import loads"),
        ("data/x.py", "from jax.experimental import serialize_executable"),
        ("data/x.py", "eval('1')"),
        ("data/x.py", "exec('1')"),
        ("data/x.py", "import yaml\nyaml.load(f)"),
        ("data/x.py", "np.load(f, allow_pickle=True)"),
        ("data/x.py", "np.load(f, allow_pickle=flag)"),
        ("data/x.py", "AutoModel.from_pretrained(x, trust_remote_code=True)"),
        ("models/delta/new.py", "from __future__ import annotations"),
    ],
)
def test_a_broken_rule_is_found(path, source):
    assert faults(Path(path), source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/x/api.py", "import importlib\nimportlib.import_module(f'kernels.{x}')"),
        ("kernels/x/api.py", "from . import ref\nfrom .. import segments"),
        (
            "models/delta/new.py",
            "from kernels.delta_rule import delta_rule\nfrom models import layers",
        ),
        ("models/delta/new.py", "from models.weights import weight\nfrom parallel import sharding"),
        ("models/lm.py", "from models.delta import gated_deltanet"),
        (
            "training/x.py",
            "from models import lm\nfrom models.lm import Config\nimport inference.x",
        ),
        ("configs/lm/x.py", "from models.delta import gated_deltanet as g\ng.Config()"),
        ("configs/lm/x.py", "from training.optimizers import soap\nsoap.Config()"),
        ("data/x.py", "import numpy as np\nnp.load(f, allow_pickle=False)\nmodel.eval()"),
        ("tests/x.py", "from tests import tolerance\nimport models.lm, training.step"),
    ],
)
def test_a_kept_rule_is_no_fault(path, source):
    assert faults(Path(path), source) == []


def test_no_circle():
    sources = {path: (ROOT / path).read_text("utf-8") for path in files()}
    assert circles(graph(sources)) == []


def test_a_circle_is_found_through_functions_and_packages():
    sources = {
        "a/__init__.py": "from a import one",
        "a/one.py": "from b.two import thing",
        "b/two.py": "def f():\n    from c import three",
        "c/three.py": "import importlib\nimportlib.import_module('a.one')",
        "c/four.py": "from c import three\nimport a",
    }
    found = circles(graph({Path(path): text for path, text in sources.items()}))
    assert found == [["a.one", "b.two", "c.three"]]


def test_a_circle_is_found_through_a_name_that_is_made_at_run_time():
    sources = {
        "kernels/dispatch.py": "import importlib\n"
        "importlib.import_module(f'kernels.{operation}.{impl}')",
        "kernels/norm/__init__.py": "from kernels.norm.api import norm",
        "kernels/norm/api.py": "from kernels import dispatch",
        "kernels/norm/xla.py": "from kernels import checks",
        "kernels/checks.py": "",
    }
    paths = {Path(path): text for path, text in sources.items()}
    assert circles(graph(paths)) == []
    paths[Path("kernels/checks.py")] = "from kernels import dispatch"
    assert circles(graph(paths)) == [["kernels.checks", "kernels.dispatch", "kernels.norm.xla"]]
