"""Facts of a variant that its code says: paper, operations, bytes of a state, growth of the work.

They are worked out by tracing, which takes half a second a variant; models/facts.json keeps those
of every variant beside a hash of the code that they come from. `python -m models --renew` writes
it.
"""

import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from models import mixer
from programs.flops import executed_flops

WIDTH = 1024  # of the residual stream whose states are counted
RECORD = Path(__file__).with_name("facts.json")


class Facts(NamedTuple):
    """What the code says of a variant."""

    paper: str  # arXiv id of the header
    kernels: tuple[str, ...]  # operations of kernels/ that its code calls
    states: dict[str, int | None]  # bytes after 4k and 1M tokens; None for an encoder
    work: str  # growth of a row's FLOPs with its length T


def known(config: Any) -> Facts | None:
    """The facts on record; None where the code of the variant has changed since."""
    found = _record().get(source_hash(config))
    if found is None:
        return None
    return Facts(found["paper"], tuple(found["kernels"]), found["states"], found["work"])


def write(found: Mapping[str, tuple[Any, Facts]], file: Path = RECORD) -> None:
    """Record the facts of variants: {name: (config, facts)}."""
    lines = {source_hash(c): {"variant": name, **f._asdict()} for name, (c, f) in found.items()}
    file.write_text(json.dumps(lines, indent=1) + "\n")


@functools.cache
def _record() -> dict[str, dict]:
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def source_hash(config: Any) -> str:
    """SHA-256 of the settings, of the architecture's file and of what it takes from models/parts.

    Operations of kernels/ are left out: how they are computed does not change what these facts say,
    and a test of the long suite works all of them out again.
    """
    module = importlib.import_module(type(config).__module__)
    texts = [repr(config), *(inspect.getsource(one) for one in _sources(module))]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:24]


@functools.cache
def _sources(module: ModuleType) -> tuple[ModuleType, ...]:
    """A module and those of models/parts that it imports, itself or through one of them."""
    source = inspect.getsource(module)
    parts = re.findall(r"^from models\.parts\.(\w+) import", source, re.M)
    for names in re.findall(r"^from models\.parts import (.+)$", source, re.M):
        parts += names.split(", ")
    below = [_sources(importlib.import_module(f"models.parts.{part}")) for part in sorted(parts)]
    return tuple(dict.fromkeys([module, *(one for found in below for one in found)]))


def facts(config: Any, width: int = WIDTH) -> Facts:
    """The facts of one variant at `width`, states in bfloat16, worked out now."""
    module = importlib.import_module(type(config).__module__)
    named = re.search(r"arXiv[: ]?(\d{4}\.\d{4,5})", module.__doc__ or "")
    causal = nnx.eval_shape(lambda: config.build(width, nnx.Rngs(0))).causal
    states = {
        name: mixer.state_bytes(_reaching(config, tokens), width, tokens) if causal else None
        for name, tokens in (("4k", 4096), ("1M", 1 << 20))
    }
    paper = named.group(1) if named else "-"
    return Facts(paper, tuple(sorted(_operations(module))), states, _growth(config, 64))


def _operations(module: ModuleType) -> set[str]:
    """Operations of kernels/ that a module imports, itself or through models.parts."""
    sources = map(inspect.getsource, _sources(module))
    return {n for text in sources for n in re.findall(r"^from kernels\.(\w+) import", text, re.M)}


def _reaching(config: Any, tokens: int) -> Any:
    """The config for documents of so many tokens, where its weights bound their length."""
    bounded = getattr(config, "length", tokens) < tokens
    return dataclasses.replace(config, length=tokens) if bounded else config


def _growth(config: Any, width: int) -> str:
    """T, T log T, T^1.5 or T^2: which one the FLOPs of three lengths grow like, beyond a T + b."""

    def work(length):
        reaching = _reaching(config, length)
        graph, params = nnx.split(nnx.eval_shape(lambda: reaching.build(width, nnx.Rngs(0))))
        x = jax.ShapeDtypeStruct((1, length, width), jnp.float32)
        run = lambda params, x: nnx.merge(graph, params)(x)[0]
        return executed_flops(jax.make_jaxpr(run)(params, x)).total

    a, b, c = (work(length) for length in (4096, 8192, 16384))
    bend, next_bend = b - 2 * a, c - 2 * b  # zero for a linear function, whatever its slope
    if next_bend < 1e-2 * c:
        return "T"
    power = math.log2(next_bend / max(bend, 1.0))
    powers = ((1, "T log T"), (1.5, "T^1.5"), (2, "T^2"))
    return min((abs(power - p), name) for p, name in powers)[1]
