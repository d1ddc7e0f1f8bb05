"""What all TPU kernels share: derived costs, copies of blocks, meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType

from kernels import setting, tpu

pytestmark = pytest.mark.usefixtures("interpreter")


def product(a, b, block=128):
    """A blocked matrix product with an accumulator in scratch; exp of it, so that there is one."""

    def body(a_ref, b_ref, o_ref, sum_ref):
        @pl.when(pl.program_id(2) == 0)
        def _():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        sum_ref[...] += jnp.dot(a_ref[...], b_ref[...], preferred_element_type=jnp.float32)
        o_ref[...] = jnp.exp(sum_ref[...]).astype(o_ref.dtype)

    shape = (block, block)
    (out,) = tpu.call(
        body,
        a,
        b,
        grid=(a.shape[0] // block, b.shape[1] // block, a.shape[1] // block),
        ins=[
            pl.BlockSpec(shape, lambda i, j, k: (i, k)),
            pl.BlockSpec(shape, lambda i, j, k: (k, j)),
        ],
        outs=[pl.BlockSpec(shape, lambda i, j, k: (i, j))],
        out_types=[jax.ShapeDtypeStruct((a.shape[0], b.shape[1]), a.dtype)],
        semantics="ppa",
        scratch=[pltpu.VMEM(shape, jnp.float32)],
    )
    return out


def estimate(function, *arrays):
    """The cost estimate of the one launch in a function."""
    program = jax.make_jaxpr(function)(*arrays)
    (found,) = (e for e in program.jaxpr.eqns if e.primitive.name == "pallas_call")
    return found.params["cost_estimate"]


def test_cost_is_the_products_and_the_copies_of_blocks():
    a, b = jnp.zeros((256, 384)), jnp.zeros((384, 512))
    cost = estimate(product, a, b)
    assert cost.flops == 2 * 256 * 384 * 512
    assert cost.transcendentals == 256 * 512 * 3
    reads = 4 * 256 * 384 + 2 * 384 * 512  # a once for each of 4 columns of blocks, b for 2 rows
    assert cost.bytes_accessed == 4 * (reads + 256 * 512)


def test_numbers():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=s).astype(np.float32) / 16 for s in ((256, 384), (384, 512)))
    np.testing.assert_allclose(jax.jit(product)(a, b), np.exp(a @ b), rtol=1e-4)


@pytest.mark.parametrize(
    ("index_map", "expected"),
    [
        (lambda i, j: (0, 0), 1),
        (lambda i, j: (i, 0), 6),  # kept while j runs
        (lambda i, j: (i, j), 6 * 8),
        (lambda i, j: (0, j), 6 * 8),  # comes back for every i
        (lambda i, j: (0, j // 4), 6 * 2),
    ],
)
def test_a_block_is_copied_when_its_index_changes(index_map, expected):
    assert tpu.fetches(pl.BlockSpec((8, 128), index_map), (6, 8)) == expected


def test_a_static_list_is_followed_and_a_traced_one_counts_every_step():
    spec = pl.BlockSpec((8, 128), lambda i, p, rows: (rows[p], 0))
    rows = np.array([0, 0, 0, 1, 1, 2], np.int32)
    assert tpu.fetches(spec, (4, 6), (rows,)) == 4 * 3
    assert tpu.fetches(spec, (4, 6), (jnp.asarray(rows),)) == 4 * 6
    still = pl.BlockSpec((8, 128), lambda i, p, rows: (i, 0))
    assert tpu.fetches(still, (4, 6), (jnp.asarray(rows),)) == 4


def mesh_of(data, tensor):
    devices = jax.devices()[: data * tensor]
    return jax.make_mesh(
        (data, tensor), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=devices
    )


def seen(x, weight):
    """What one device sees, as the value of its own part of the output."""
    return jnp.full(x.shape, 10 * x.shape[0] + x.shape[1], jnp.float32) + 0 * weight[0]


@pytest.mark.parametrize(
    ("shape", "mine"),
    [((4, 6), 23), ((3, 6), 33), ((4, 5), 25), ((3, 5), 35)],
)
def test_rows_and_heads_are_split_where_they_divide(shape, mine):
    x, weight = jnp.zeros(shape), jnp.zeros(2)
    run = lambda x, w: tpu.over_mesh(
        seen, {"x": x, "weight": w}, {"x": "b h", "weight": "k"}, ("b h",)
    )
    with jax.set_mesh(mesh_of(2, 2)), setting.layout(batch=("data", "fsdp"), heads=("tensor",)):
        out = jax.jit(run)(x, weight)
    np.testing.assert_array_equal(out, np.full(shape, mine))


def test_a_single_group_is_whole_and_its_heads_are_split():
    x, weight = jnp.zeros((4, 6)), jnp.zeros(1)
    run = lambda x, w: tpu.over_mesh(
        seen, {"x": x, "weight": w}, {"x": "b h", "weight": "g"}, ("b h",)
    )
    with jax.set_mesh(mesh_of(2, 2)), setting.layout(batch=("data",), heads=("tensor",)):
        out = jax.jit(run)(x, weight)
    np.testing.assert_array_equal(out, np.full((4, 6), 23))


def test_without_a_mesh_the_function_sees_all():
    x = jnp.zeros((4, 6))
    out = tpu.over_mesh(
        seen, {"x": x, "weight": jnp.zeros(2)}, {"x": "b h", "weight": "k"}, ("b h",)
    )
    np.testing.assert_array_equal(out, np.full((4, 6), 46))


def test_a_mesh_without_a_layout_raises():
    x = jnp.zeros((4, 6))
    with jax.set_mesh(mesh_of(2, 2)), pytest.raises(ValueError, match=r"axes data, tensor.*layout"):
        jax.jit(lambda x: tpu.over_mesh(seen, {"x": x}, {"x": "b h"}, ("b h",)))(x)


def test_gradients_of_what_is_whole_are_summed_over_devices():
    x, weight = jnp.arange(24.0).reshape(4, 6), jnp.array([2.0])

    def loss(x, weight):
        scale = lambda x, weight: x * weight[0]
        out = tpu.over_mesh(
            scale, {"x": x, "weight": weight}, {"x": "b h", "weight": "k"}, ("b h",)
        )
        return (out**2).sum()

    alone = jax.grad(loss, (0, 1))(x, weight)
    with jax.set_mesh(mesh_of(2, 2)), setting.layout(batch=("data",), heads=("tensor",)):
        spread = jax.jit(jax.grad(loss, (0, 1)))(x, weight)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), alone, spread)
