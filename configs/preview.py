"""Stand-ins for heavy modules: with them a config file is read in milliseconds, to check its keys.

Config files import architecture files, which import JAX: seconds, before a misspelt key could be
refused. Their Config classes are plain Python, so all the rest may be inert while keys are checked.
"""

import contextlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Iterator

OURS = (
    "configs",
    "models",
    "training",
)  # read as they are; every other package that is not Python's own is inert
HALF_LOADED = {"parallel"}  # programs load its `launch` first; its other modules take JAX


class NeedsReal(BaseException):
    """A value that only the real module knows was needed; no `except Exception` may hide it."""


class Inert:
    """Anything of a heavy module: called, subscripted, combined, derived from, never decided on."""

    def __getattr__(self, name: str) -> "Inert":
        return _inert(name)

    def __call__(self, *args, **kwargs) -> "Inert":
        return Inert()

    def __mro_entries__(self, bases) -> tuple:
        return ()

    def __hash__(self) -> int:
        return id(self)


def _inert(name: str) -> Inert:
    if name.startswith("__"):  # Python asks for these to learn what an object is
        raise AttributeError(name)
    return Inert()


def _combine(self, *others):
    return Inert()


def _decide(self, *others):
    raise NeedsReal


for _name in "getitem or ror add radd sub rsub mul rmul truediv rtruediv pow rpow neg".split():
    setattr(Inert, f"__{_name}__", _combine)
for _name in "bool len iter contains int float index ne lt le gt ge str format".split():
    setattr(Inert, f"__{_name}__", _decide)


def _is_form(self, other):
    """A field's type is compared with the special forms of typing, of which it is none."""
    homes = type(other).__module__, getattr(other, "__module__", "")
    return False if "typing" in homes else _decide(self)


Inert.__eq__ = _is_form


class StandIn(types.ModuleType):
    """A module whose every name is inert."""

    def __getattr__(self, name: str) -> Inert:
        return _inert(name)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Serves a stand-in for every package that is not Python's own, nor ours, nor loaded."""

    def __init__(self):
        self.real = {*sys.stdlib_module_names, *sys.modules, *OURS} - HALF_LOADED

    def find_spec(self, name, path=None, target=None):
        """A spec for a stand-in, or None: look elsewhere."""
        if name.partition(".")[0] in self.real:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec) -> StandIn:
        """An empty module."""
        return StandIn(spec.name)

    def exec_module(self, module) -> None:
        """Nothing to run."""


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """Heavy imports within the block are inert; after it all built on them is forgotten."""
    before = dict(sys.modules)
    finder = Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name not in before]:
            if name.partition(".")[0] in OURS or isinstance(sys.modules[name], StandIn):
                del sys.modules[name]
                parent, _, child = name.rpartition(".")
                if parent in before:  # `from configs import x` would find the old one there
                    vars(before[parent]).pop(child, None)
