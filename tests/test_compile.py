"""Every TPU kernel through the real TPU compiler, for every generation: pytest -m aot.

Needs the extra `aot` (libtpu) and no TPU. Both passes of every size in cases.py are compiled for
one chip of every generation; on a host of four, sharded by rows and heads, every size for v5e and
each function's first size for the others. Then whole training steps, with the kernels that dispatch
chooses.
"""

import dataclasses
import importlib
import importlib.util
import pkgutil

import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

import configs.lm
from kernels import aot, evidence
from parallel import sharding
from parallel.mesh import AXES
from training.step import make_trainer

pytestmark = pytest.mark.aot
SUBJECTS = evidence.subjects()
CONFIGS = [module.name for module in pkgutil.iter_modules(configs.lm.__path__)]
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


@pytest.mark.parametrize(
    "name", [module.name for module in pkgutil.iter_modules(configs.lm.__path__)]
)
def test_a_training_step_on_four_chips(name):
    """Rows over two, weights and heads over two; the model's kernels are in the program."""
    experiment = importlib.import_module(f"configs.lm.{name}").get_config()
    model = dataclasses.replace(experiment.model, vocabulary=260)  # 257 bytes do not split
    experiment = dataclasses.replace(experiment, model=model)
    devices = aot.mesh("v5e", whole=True).devices.reshape(2, 1, 2)
    mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    trainer = make_trainer(experiment, mesh, np.ones(model.vocabulary, np.float32))
    with sharding.on(mesh):
        program = trainer.step.lower(trainer.abstract, trainer.batch).compile()
    assert program.as_text().count('custom_call_target="tpu_custom_call"') >= 2
