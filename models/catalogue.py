"""Finds the architectures: every module below `models/` that defines both `Config` and `Mixer`."""

import importlib
import pkgutil
from types import ModuleType

import models


def architectures() -> dict[str, ModuleType]:
    """Module of each architecture by its dotted name without the leading "models."."""
    found = {}
    for info in pkgutil.walk_packages(models.__path__, "models."):
        module = importlib.import_module(info.name)
        if hasattr(module, "Config") and hasattr(module, "Mixer") and info.name.count(".") == 2:
            found[info.name.removeprefix("models.")] = module
    return found


def cases() -> list[tuple[str, object]]:
    """(name, config) of all that the contract is proven for: a module's `CASES`, or `Config()`."""
    return [
        (f"{name}[{i}]", config)
        for name, module in architectures().items()
        for i, config in enumerate(getattr(module, "CASES", (module.Config(),)))
    ]
