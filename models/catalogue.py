"""Finds the architectures: every module below `models/` with a `Config` and a `Mixer` or
`Block`.
"""

import copy
import importlib
import pkgutil
from types import ModuleType
from typing import Any

import models


def architectures() -> dict[str, ModuleType]:
    """Module of each architecture by its dotted name without the leading "models."."""
    found = {}
    for info in pkgutil.walk_packages(models.__path__, "models."):
        if info.name.count(".") != 2:
            continue
        module = importlib.import_module(info.name)
        if hasattr(module, "Config") and (hasattr(module, "Mixer") or hasattr(module, "Block")):
            found[info.name.removeprefix("models.")] = module
    return found


def variants() -> dict[str, Any]:
    """A Config of every variant, the caller's own, by its short name, such as "gla" or "window".

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
            found[case] = copy.deepcopy(config)  # else who freezes it does so for all
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
