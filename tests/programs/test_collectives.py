"""Bytes between devices: programs of known traffic on eight devices, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from programs import collectives


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def found(mesh, function, *shapes):
    """{(kind, axes): (calls, bytes)} of the compiled function of arrays (shape, spec)."""
    arrays = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in shapes
    ]
    program = jax.jit(function).lower(*arrays).compile().as_text()
    calls = collectives.traffic(program, mesh).collectives
    return {(c.kind, c.axes): (c.calls, c.bytes) for c in calls}


def mapped(mesh, function, spec_in, spec_out):
    return jax.shard_map(function, mesh=mesh, in_specs=spec_in, out_specs=spec_out, check_vma=False)


SHARD = 4 * 8 * 16  # bytes of a device's piece in the cases below
CASES = {
    "all-reduce": (lambda x: jax.lax.psum(x, ("data", "tensor")), ("data", "tensor"), 2 * 3 / 4),
    "all-gather": (lambda x: jax.lax.all_gather(x, "fsdp"), ("fsdp",), 1),
    "reduce-scatter": (lambda x: jax.lax.psum_scatter(x, "tensor"), ("tensor",), 1 / 2),
    "all-to-all": (lambda x: jax.lax.all_to_all(x, "data", 0, 0), ("data",), 1 / 2),
    "collective-permute": (
        lambda x: jax.lax.ppermute(x, "fsdp", [(0, 1)]),  # half of the devices send
        ("fsdp",),
        1 / 2,
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_one_collective(mesh, kind):
    function, axes, share = CASES[kind]
    run = mapped(mesh, function, P(), P())
    shape = (2, 4, 16) if kind in ("reduce-scatter", "all-to-all") else (8, 16)
    assert found(mesh, run, (shape, P())) == {(kind, axes): (1, share * SHARD)}


def test_loops_multiply(mesh):
    def run(x):
        step = lambda x, _: (jax.lax.psum(jnp.sin(x), "data"), None)
        twice = lambda x, _: (jax.lax.scan(step, x, length=3)[0], None)
        return jax.lax.scan(twice, x, length=5)[0]

    calls = found(mesh, mapped(mesh, run, P(), P()), ((8, 16), P()))
    assert calls == {("all-reduce", ("data",)): (15, 15 * SHARD)}


def test_a_loop_of_unknown_length_is_told(mesh):
    def run(x):
        more = lambda x: jnp.sum(x) < 100
        return jax.lax.while_loop(more, lambda x: jax.lax.psum(x, "data"), x)

    program = jax.jit(mapped(mesh, run, P(), P())).lower(jnp.ones((8, 16))).compile().as_text()
    traffic = collectives.traffic(program, mesh)
    assert [c.calls for c in traffic.collectives] == [1]
    assert traffic.notes == {"a loop of unknown length counts once"}


def test_layers_with_their_weights_spread(mesh):
    """Four layers: weights gathered twice each, their gradients summed, outputs summed."""
    layers, rows, wide, hidden = 4, 16, 64, 128

    def loss(w, v, x):
        where = NamedSharding(mesh, P(("data", "fsdp")))

        def layer(x, weights):
            up, down = weights
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ up) @ down, where), None

        return (jax.lax.scan(layer, x, (w, v))[0] ** 2).sum()

    calls = found(
        mesh,
        jax.grad(loss, argnums=(0, 1)),
        ((layers, wide, hidden), P(None, "fsdp", "tensor")),
        ((layers, hidden, wide), P(None, "tensor", "fsdp")),
        ((rows, wide), P(("data", "fsdp"))),
    )
    weight = 4 * wide * hidden // 2  # bytes, split over tensor
    assert calls == {
        ("all-gather", ("fsdp",)): (4 * layers, 4 * layers * weight // 2),
        ("all-reduce", ("data", "fsdp")): (layers, layers * 2 * weight * 2 * 3 / 4),
        ("all-reduce", ("tensor",)): (2 * layers, 2 * layers * 4 * rows // 4 * wide),
    }


def test_one_device_sends_nothing():
    program = jax.jit(jnp.sin).lower(jnp.ones(8)).compile().as_text()
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    assert collectives.traffic(program, mesh).bytes == 0


def test_what_tpu_programs_write(mesh):
    """Four ways to name groups; a gather in two fusions; a loop whose condition has its length."""
    program = """HloModule jit_f
%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}
%first.1 (p: bf16[4,8]) -> bf16[8,8] {
  %p = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %g = bf16[8,8] all-gather(%p), channel_id=7, replica_groups=[4,2]<=[4,2]T(1,0)
}
%second.1 (p: bf16[4,8]) -> bf16[8,8] {
  %p = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %g = bf16[8,8] all-gather(%p), channel_id=7, replica_groups=[4,2]<=[4,2]T(1,0)
}
%all-reduce-scatter.3 (p: bf16[8,8]) -> bf16[4,8] {
  %p = bf16[8,8]{1,0:T(8,128)(2,1)} parameter(0)
  %r = bf16[8,8] all-reduce(%p), replica_groups=mesh['a'=4,'b'=2] {'b'}, to_apply=%add
}
%body (t: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p = bf16[4,8]{1,0:T(8,128)(2,1)} get-tuple-element(%t), index=1
  %start = (bf16[4,8]{1,0:T(8,128)(2,1)}, u32[]) fusion(%p), kind=kCustom, calls=%first.1
  %done = bf16[8,8]{1,0} fusion(%p), kind=kCustom, calls=%second.1
  %s = bf16[4,8] fusion(%done), kind=kCustom, calls=%all-reduce-scatter.3
}
%condition (t: (s32[], bf16[4,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT, metadata={op_name="while"}
}
ENTRY %main (p: bf16[8,8]) -> bf16[8,8] {
  %p = bf16[8,8]{1,0:T(8,128)(2,1)} parameter(0)
  %w = (s32[], bf16[4,8]) while(%t), condition=%condition, body=%body
  %r = bf16[8,8]{1,0} all-reduce(%p), replica_groups={}, to_apply=%add
  %ids = bf16[8,8] all-reduce(%p), replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}
  ROOT %m = bf16[8,8]{1,0} collective-permute(%r), source_target_pairs={{0,4},{4,0}}
}
"""
    traffic = collectives.traffic(program, mesh)
    assert {(c.kind, c.axes): (c.calls, c.bytes) for c in traffic.collectives} == {
        ("all-gather", ("fsdp",)): (3, 3 * 64),
        ("reduce-scatter", ("tensor",)): (3, 3 * 64),
        ("all-reduce", ("data", "fsdp", "tensor")): (1, 128 * 2 * 7 / 8),
        ("all-reduce", ("tensor",)): (1, 128),
        ("collective-permute", ("data",)): (1, 128 / 4),
    }
    assert not traffic.notes
