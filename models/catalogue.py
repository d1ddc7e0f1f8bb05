"""Finds the architectures: every module below `models/` that defines both `Config` and `Mixer`."""

import dataclasses
import importlib
import inspect
import math
import pkgutil
import re
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import models
from models import mixer


def architectures() -> dict[str, ModuleType]:
    """Module of each architecture by its dotted name without the leading "models."."""
    found = {}
    for info in pkgutil.walk_packages(models.__path__, "models."):
        if info.name.count(".") != 2:
            continue
        module = importlib.import_module(info.name)
        if hasattr(module, "Config") and hasattr(module, "Mixer"):
            found[info.name.removeprefix("models.")] = module
    return found


def variants() -> dict[str, Any]:
    """Config of every variant by its short name, such as "gla" or "window".

    They are the `CASES` of the modules and, for blocks, which hold other architectures, of their
    family. ValueError where two have one name.
    """
    found = {}
    for name, module in architectures().items():
        family = importlib.import_module(module.__name__.rpartition(".")[0])
        shared = getattr(family, "CASES", {}).items()
        own = {case: c for case, c in shared if type(c).__module__ == module.__name__}
        for case, config in (
            getattr(module, "CASES", None) or own or _default(name, module)
        ).items():
            if case in found:
                raise ValueError(f"{name} names a variant {case!r}, as does another architecture.")
            found[case] = config
    return found


def _default(name, module):
    return {name.rpartition(".")[2]: module.Config()}


def cases() -> dict[str, Any]:
    """Config of each variant, by `family.file:variant`, or `family.file` where it has that name."""
    found = {}
    for case, config in variants().items():
        name = type(config).__module__.removeprefix("models.")
        found[name if name.endswith(f".{case}") else f"{name}:{case}"] = config
    return found


class Facts(NamedTuple):
    """What the code says of a variant."""

    paper: str  # arXiv id of the header
    kernels: tuple[str, ...]  # operations of kernels/ that its code calls
    states: dict[str, int | None]  # bytes after 4k and 1M tokens; None for an encoder
    work: str  # growth of a row's FLOPs with its length T


def facts(config: Any, width: int) -> Facts:
    """The facts of one variant at `width`, states in bfloat16."""
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
    source = inspect.getsource(module)
    found = set(re.findall(r"^from kernels\.(\w+) import", source, re.M))
    parts = re.findall(r"^from models\.parts\.(\w+) import", source, re.M)
    for names in re.findall(r"^from models\.parts import (.+)$", source, re.M):
        parts += names.split(", ")
    for part in parts:
        found |= _operations(importlib.import_module(f"models.parts.{part}"))
    return found


def _reaching(config: Any, tokens: int) -> Any:
    """The config for documents of so many tokens, where its weights bound their length."""
    bounded = getattr(config, "length", tokens) < tokens
    return dataclasses.replace(config, length=tokens) if bounded else config


def _growth(config: Any, width: int) -> str:
    """T, T log T, T^1.5 or T^2: which one the FLOPs of three lengths grow like, beyond a T + b."""

    def flops(length):
        fits = _reaching(config, length)
        graph, params = nnx.split(nnx.eval_shape(lambda: fits.build(width, nnx.Rngs(0))))
        x = jax.ShapeDtypeStruct((1, length, width), jnp.float32)
        run = lambda params, x: nnx.merge(graph, params)(x)[0]
        return flops.executed_flops(jax.make_jaxpr(run)(params, x)).total

    a, b, c = (flops(length) for length in (4096, 8192, 16384))
    bend, next_bend = b - 2 * a, c - 2 * b  # zero for a linear function, whatever its slope
    if next_bend < 1e-2 * c:
        return "T"
    power = math.log2(next_bend / max(bend, 1.0))
    return min((abs(power - p), name) for p, name in ((1, "T log T"), (1.5, "T^1.5"), (2, "T^2")))[
        1
    ]
