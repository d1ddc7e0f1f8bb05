"""Every TPU kernel through the real TPU compiler, for every generation: pytest -m aot.

Needs the extra `aot` (libtpu) and no TPU. Both passes of every size in cases.py are compiled, on
one chip and, sharded by rows and heads, on a host of four.
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


@pytest.mark.parametrize("chips", [1, 4])
@pytest.mark.parametrize("generation", aot.TOPOLOGIES)
@pytest.mark.parametrize(("folder", "function", "label", "given"), SIZES, ids=NAMES)
def test_both_passes_compile(folder, function, label, given, generation, chips):
    run, arguments = evidence.both_passes(folder, function, "pallas_tpu", given)
    compiled = aot.compile_for(aot.mesh(generation, whole=chips == 4), run, arguments)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') >= 2
