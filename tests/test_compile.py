"""Every TPU kernel through the real TPU compiler, for every generation: pytest -m aot.

Needs the extra `aot` (libtpu) and no TPU. Both passes of every size in cases.py are compiled for
one chip of every generation; on a host of four, sharded by rows and heads, every size for v5e and
each function's first size for the others.
"""

import importlib.util

import pytest

from kernels import aot, evidence

pytestmark = pytest.mark.aot
SIZES = [
    (folder, function, label, given)
    for folder, function, sizes in evidence.subjects()
    for label, given in sizes.items()
]
NAMES = [f"{evidence.title(folder, function)}-{label}" for folder, function, label, _ in SIZES]


def test_the_compiler_is_there():
    assert importlib.util.find_spec("libtpu"), "pip install -e '.[test,aot]'"


def compile_both(folder, function, given, mesh):
    run, arguments = evidence.both_passes(folder, function, "pallas_tpu", given)
    compiled = aot.compile_for(mesh, run, arguments)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') >= 2


@pytest.mark.parametrize("generation", aot.TOPOLOGIES)
@pytest.mark.parametrize(("folder", "function", "label", "given"), SIZES, ids=NAMES)
def test_for_one_chip(folder, function, label, given, generation):
    compile_both(folder, function, given, aot.mesh(generation))


@pytest.mark.parametrize(("folder", "function", "label", "given"), SIZES, ids=NAMES)
def test_for_four_chips(folder, function, label, given):
    compile_both(folder, function, given, aot.mesh("v5e", whole=True))


@pytest.mark.parametrize("generation", [g for g in aot.TOPOLOGIES if g != "v5e"])
@pytest.mark.parametrize(
    ("folder", "function", "sizes"), list(evidence.subjects()), ids=lambda x: str(x)[:20]
)
def test_for_four_chips_of_others(folder, function, sizes, generation):
    compile_both(folder, function, next(iter(sizes.values())), aot.mesh(generation, whole=True))
