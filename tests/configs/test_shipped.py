"""Every shipped config file: its docstring's command, its size, and that its model can be built."""

import ast
import re
import shlex
from pathlib import Path

import jax
import pytest
from flax import nnx

from configs import loading
from tests.configs.shipped import FILES, ROOT, read
from training import loop

TINY = [
    "--config.steps=2",
    "--config.optimizer.warmup_steps=0",
    "--config.model.width=64",
    "--config.model.depth=2",
    "--config.data.length=32",
    "--config.data.batch=2",
]


def docstring(file: str) -> str:
    """The docstring of a config file."""
    return ast.get_docstring(ast.parse(Path(ROOT, file).read_text("utf-8"))) or ""


def options(program: str) -> dict:
    """The OPTIONS of a program at the root, read without running it."""
    for node in ast.parse(Path(ROOT, program).read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "OPTIONS":
            return ast.literal_eval(node.value)
    raise AssertionError(f"{program} has no OPTIONS")


def test_there_are_shipped_files():
    assert "configs/quickstart.py" in FILES and len(FILES) >= 6


@pytest.mark.parametrize("file", FILES)
def test_the_command_of_the_docstring_parses(file):
    lines = re.findall(r"^ +(python .*(?:\\\n.*)*)$", docstring(file), re.MULTILINE)
    assert lines, f"{file}: no command"
    for line in lines:
        python, program, *argv = shlex.split(line.replace("\\\n", " "))
        if program == "-m":  # a claim, named by its place
            name = file.removeprefix("configs/papers/").removesuffix(".py")
            assert argv == ["science.claims", name, "--run"]
            continue
        configs, values = loading.parse(argv, options(program))
        assert python == "python" and file in [
            given.partition(":")[0] for given in values["config"]
        ]
        assert configs[0].steps > 0


@pytest.mark.parametrize("file", FILES)
def test_the_docstring_says_how_long_and_what_to_expect(file):
    text = docstring(file)
    assert re.search(r"^Takes: \S.*\.$", text, re.MULTILINE)
    assert re.search(r"^Expected: \S.*\.$", text, re.MULTILINE)


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("configs/lm/")])
def test_the_run_has_the_steps_and_tokens_that_the_docstring_says(file):
    found = read(f"--config={file}")
    tokens = found.data.batch * found.data.length
    assert f"{found.steps:,} steps of {tokens:,} tokens" in docstring(file)


@pytest.mark.parametrize("file", [f for f in FILES if not f.startswith("configs/papers/")])
def test_the_model_has_the_parameters_that_the_docstring_says(file):
    said = re.search(r"([\d.]+)M parameters", docstring(file))
    model = read(f"--config={file}").model
    shapes = nnx.state(nnx.eval_shape(lambda: model.build(nnx.Rngs(0))), nnx.Param)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert said and said[1] == f"{count / 1e6:.1f}"


@pytest.mark.parametrize("file", FILES)
def test_a_tiny_variant_builds(file):
    config = loop.settled(read(f"--config={file}", *TINY))
    model = nnx.eval_shape(lambda: config.model.build(nnx.Rngs(0)))
    width = {leaf.shape[-1] for leaf in jax.tree.leaves(nnx.state(model.norm, nnx.Param))}
    assert config.steps == 2 and width == {64}
