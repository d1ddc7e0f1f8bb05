"""Gated linear attention with rows and heads on several devices."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels import setting
from kernels.gated_linear import gated_linear
from kernels.gated_linear.cases import HEADS, VALUE
from tests.kernels.test_gated_linear import assert_same, draw, evaluate, slopes


def test_a_shard_of_heads_on_each_device_gives_the_same():
    arguments = draw(40, "scalar")
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    tokens, state = P("data", None, "tensor"), P("data", "tensor")
    specs = {n: state if n == "initial_state" else tokens for n in arguments}

    def run(arguments):
        return gated_linear(**arguments)

    sharded = jax.shard_map(run, mesh=mesh, in_specs=(specs,), out_specs=(tokens, state))

    @jax.jit
    def evaluate_sharded(arguments, cotangents):
        outputs, pullback = jax.vjp(sharded, arguments)
        return *outputs, pullback(cotangents)[0]

    cotangents = tuple(c.astype(np.float32) for c in slopes(arguments))
    assert_same(evaluate_sharded(arguments, cotangents), evaluate(arguments, cotangents))


@pytest.mark.parametrize("groups", [1, 2])
def test_tpu_kernels_on_a_mesh_split_rows_and_heads(groups):
    """One group is not split: its gradient is the sum of what the heads of all devices give."""
    arguments = draw(20, "scalar, bonus")
    for name in "qk":
        arguments[name] = arguments[name][:, :, :groups]
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    @jax.jit
    def evaluate_sharded(arguments, cotangents):
        outputs, pullback = jax.vjp(lambda a: gated_linear(**a, impl="pallas_tpu"), arguments)
        return *outputs, pullback(cotangents)[0]

    cotangents = tuple(c.astype(np.float32) for c in slopes(arguments))
    with jax.set_mesh(mesh), setting.interpreting():
        with setting.layout(batch=("data",), heads=("tensor",)):
            text = str(jax.make_jaxpr(evaluate_sharded)(arguments, cotangents))
            found = evaluate_sharded(arguments, cotangents)
    assert f"f32[1,20,{HEADS // 2},{VALUE}]" in text  # v's rows and heads on one device
    assert_same(found, evaluate(arguments, cotangents))
