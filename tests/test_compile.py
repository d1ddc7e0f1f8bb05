"""Every TPU kernel through the real TPU compiler, for every generation: pytest -m aot.

Needs the extra `aot` (libtpu) and no TPU. Both passes of every size in cases.py are compiled for
one chip of every generation; on a host of four, sharded by rows and heads, every size for v5e and
each function's first size for the others. Then whole training steps, with the kernels that dispatch
chooses, and every variant of every architecture: on one chip, and on sixteen.
"""

import dataclasses
import importlib
import importlib.util
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding

import configs.lm
from kernels import survey
from models import catalogue
from models import weights as named_weights
from parallel import sharding
from parallel.mesh import AXES
from programs import topology
from training.step import make_trainer

pytestmark = pytest.mark.aot
SUBJECTS = survey.subjects()
FOUND = pkgutil.walk_packages(configs.lm.__path__, "configs.lm.")
CONFIGS = [module.name for module in FOUND if not module.ispkg]
VARIANTS = catalogue.cases()
SIZES = [
    pytest.param(subject, id=f"{name}-{label}")
    for name, sizes in SUBJECTS.items()
    for label, subject in sizes.items()
]


def test_the_compiler_is_there():
    assert importlib.util.find_spec("libtpu"), "pip install -e '.[test,aot]'"


def compile_both(subject, mesh):
    _, compiled = survey.compile_for(mesh, subject, "pallas_tpu")
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') >= 2


@pytest.mark.parametrize("generation", topology.HOSTS)
@pytest.mark.parametrize("subject", SIZES)
def test_for_one_chip(subject, generation):
    compile_both(subject, topology.chip(generation))


@pytest.mark.parametrize("subject", SIZES)
def test_for_four_chips(subject):
    compile_both(subject, topology.host("v5e"))


@pytest.mark.parametrize("generation", [g for g in topology.HOSTS if g != "v5e"])
@pytest.mark.parametrize("name", SUBJECTS)
def test_for_four_chips_of_others(name, generation):
    compile_both(next(iter(SUBJECTS[name].values())), topology.host(generation))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_training_step_on_four_chips(name):
    """Rows over two, weights and heads over two; the model's kernels are in the program."""
    experiment = importlib.import_module(name).get_config()
    model = dataclasses.replace(experiment.model, vocabulary=260)  # 257 bytes do not split
    experiment = dataclasses.replace(experiment, model=model)
    mesh = mesh_of(topology.host("v5e").devices.reshape(2, 1, 2))
    trainer = make_trainer(experiment, mesh, np.ones(model.vocabulary, np.float32))
    with sharding.on(mesh):
        program = trainer.step.lower(trainer.abstract, trainer.batch).compile()
    assert program.as_text().count('custom_call_target="tpu_custom_call"') >= 2


def mesh_of(devices):
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def compile_gradients(config, mesh):
    """Both passes of one mixer on packed bfloat16 rows, weights and rows split over the mesh."""
    graph, weights = nnx.split(nnx.eval_shape(lambda: config.build(256, nnx.Rngs(0))))
    dims = named_weights.dims(nnx.merge(graph, weights))

    def place(leaf, names):
        where = sharding.weight_sharding(mesh, "weight", leaf.shape, names)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    params = jax.tree.map(place, nnx.to_pure_dict(weights), dims)
    rows = NamedSharding(mesh, sharding.batch_spec(2))
    x = jax.ShapeDtypeStruct((16, 512, 256), jnp.bfloat16, sharding=rows)
    ids = jax.ShapeDtypeStruct((16, 512), jnp.int32, sharding=rows)

    def loss(params, x, ids):
        y, _ = nnx.merge(graph, params)(x, segments=ids)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    with sharding.on(mesh):
        jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x, ids).compile()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_on_one_chip(name):
    compile_gradients(VARIANTS[name], mesh_of(topology.devices("v5e:2x2")[:1].reshape(1, 1, 1)))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_on_sixteen_chips(name):
    """fsdp 8 x tensor 2."""
    compile_gradients(VARIANTS[name], mesh_of(topology.devices("v5e:4x4").reshape(1, 8, 2)))
