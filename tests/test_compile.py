"""Every TPU kernel through the real TPU compiler, for every generation: pytest -m aot.

Needs the extra `aot` (libtpu) and no TPU. Both passes of every size in cases.py are compiled for
one chip of every generation; on a host of four, sharded by rows and heads, every size for v5e and
each function's first size for the others.
"""

import importlib.util

import pytest

from kernels import aot, evidence

pytestmark = pytest.mark.aot
SUBJECTS = evidence.subjects()
SIZES = [
    pytest.param(subject, id=f"{name}-{label}")
    for name, sizes in SUBJECTS.items()
    for label, subject in sizes.items()
]


def test_the_compiler_is_there():
    assert importlib.util.find_spec("libtpu"), "pip install -e '.[test,aot]'"


def compile_both(subject, mesh):
    _, compiled = evidence.compile_for(mesh, subject, "pallas_tpu")
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') >= 2


@pytest.mark.parametrize("generation", aot.TOPOLOGIES)
@pytest.mark.parametrize("subject", SIZES)
def test_for_one_chip(subject, generation):
    compile_both(subject, aot.mesh(generation))


@pytest.mark.parametrize("subject", SIZES)
def test_for_four_chips(subject):
    compile_both(subject, aot.mesh("v5e", whole=True))


@pytest.mark.parametrize("generation", [g for g in aot.TOPOLOGIES if g != "v5e"])
@pytest.mark.parametrize("name", SUBJECTS)
def test_for_four_chips_of_others(name, generation):
    compile_both(next(iter(SUBJECTS[name].values())), aot.mesh(generation, whole=True))
