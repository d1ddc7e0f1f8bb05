"""Counts of FLOPs against formulas worked out by hand; only here are formulas typed in."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels import dispatch
from kernels.linear_scan import linear_scan
from kernels.long_conv import long_conv
from programs import flops, rules
from programs.flops import Flops, executed_flops, model_flops
from programs.labels import labelling
from resources.compute import xla_flops

N = 24


def executed(function, *args) -> Flops:
    return executed_flops(jax.make_jaxpr(function)(*args))


def square(seed=0, size=N):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(size, size)), jnp.float32)


def test_matmul_chain():
    a, b, c = jnp.ones((5, 7)), jnp.ones((7, 11)), jnp.ones((11, 3))
    found = executed(lambda a, b, c: a @ b @ c, a, b, c)
    assert found.matmul == 2 * 5 * 7 * 11 + 2 * 5 * 11 * 3
    assert found.by_primitive == {"dot_general": found.matmul}
    assert (found.elementwise, found.transcendental, found.notes) == (0, 0, set())


def test_einsum_with_batch_dimensions_and_an_outer_product():
    q, k = jnp.ones((2, 5, 3, 7)), jnp.ones((2, 6, 3, 7))
    scores = executed(lambda q, k: jnp.einsum("bthk,bshk->bhts", q, k), q, k)
    assert scores.total == 2 * (2 * 3 * 5 * 6) * 7
    outer = executed(lambda a, b: jnp.einsum("i,j->ij", a, b), jnp.ones(5), jnp.ones(7))
    assert outer.total == 5 * 7  # no sum: a multiplication for each element


def layers(length):
    return lambda w, x: jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=length)[0]


def test_a_scan_counts_its_length_and_xla_counts_one():
    w, x = square(0), square(1)
    for length in (1, 4, 9):
        assert executed(layers(length), w, x).total == length * 2 * N**3
    programs = [jax.jit(layers(length)).lower(w, x).compile() for length in (4, 9)]
    counts = [xla_flops(program) for program in programs]
    assert counts[0] == counts[1]
    assert counts[0] == pytest.approx(2 * N**3, rel=0.01)


def test_gradient_of_a_scan_costs_two_more():
    w, x = square(0), square(1)
    gradient = jax.grad(lambda w, x: layers(6)(w, x).sum(), argnums=(0, 1))
    assert executed(gradient, w, x).matmul == 3 * 6 * 2 * N**3
    # Without the gradient of x the first layer's product with w^T still runs: the body is one.
    assert executed(jax.grad(lambda w, x: layers(6)(w, x).sum()), w, x).matmul == 3 * 6 * 2 * N**3


def test_remat_counts_what_is_computed_again():
    def block(x, w):
        return jnp.tanh(jnp.tanh(x @ w) @ w)

    def loss(body, w, x):
        return jax.lax.scan(lambda x, _: (body(x, w), None), x, None, length=5)[0].sum()

    forward = 5 * 2 * (2 * N**3)
    for body, times in ((block, 3), (jax.checkpoint(block), 4)):
        gradient = jax.grad(functools.partial(loss, body), argnums=(0, 1))
        assert executed(gradient, square(0), square(1)).matmul == times * forward


def test_nested_scans_multiply():
    def outer(x):
        def inner(x, _):
            return jax.lax.scan(lambda x, _: (x @ x, None), x, None, length=3)

        return jax.lax.scan(inner, x, None, length=7)[0]

    assert executed(outer, square()).total == 21 * 2 * N**3


def test_cond_counts_its_dearest_branch_and_says_so():
    def choose(flag, x):
        return jax.lax.switch(flag, [lambda x: x, lambda x: x @ x @ x, lambda x: x @ x], x)

    found = executed(choose, 1, square())
    assert found.matmul == 2 * 2 * N**3
    assert any(note.startswith("cond") for note in found.notes)


def test_a_loop_of_unknown_length_counts_once_and_says_so():
    found = executed(lambda n, x: jax.lax.fori_loop(0, n, lambda _, x: x @ x, x), 5, square())
    assert found.matmul == 2 * N**3
    assert any(note.startswith("while") for note in found.notes)
    known = executed(lambda x: jax.lax.fori_loop(0, 5, lambda _, x: x @ x, x), square())
    assert known.matmul == 5 * 2 * N**3 and not known.notes


def test_vmap_multiplies_by_the_mapped_size():
    found = executed(jax.vmap(layers(4), (None, 0)), square(), jnp.ones((5, N, N)))
    assert found.total == 5 * 4 * 2 * N**3


@jax.custom_vjp
def doubled(x):
    return x @ x


doubled.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x @ x @ x,))


def test_custom_vjp_counts_the_rule_that_runs():
    assert executed(doubled, square()).total == 2 * N**3
    gradient = executed(jax.grad(lambda x: doubled(x).sum()), square())
    assert gradient.matmul == 3 * 2 * N**3  # the result itself is not read: only the rule runs


def test_what_nothing_reads_is_not_counted():
    def function(x):
        def step(carry, _):
            kept, idle = carry
            return (kept @ kept, idle @ kept @ kept), jnp.exp(idle)

        (kept, _), _ = jax.lax.scan(step, (x, x), None, length=3)
        x @ x  # noqa: B018
        return kept

    found = executed(jax.jit(function), square())
    assert (found.total, found.transcendental) == (3 * 2 * N**3, 0)


def test_a_carry_read_by_the_next_step_is_counted():
    def function(x):
        def step(carry, _):
            a, b = carry
            return (b, a @ b), None

        return jax.lax.scan(step, (x, x), None, length=4)[0][0]

    assert executed(function, square()).total == 4 * 2 * N**3


def test_elementwise_reductions_and_transcendentals_are_told_apart():
    def softmax(x):
        x = jnp.exp(x - x.max(-1, keepdims=True))
        return x / x.sum(-1, keepdims=True)

    found = executed(softmax, jnp.ones((5, 7)))
    assert found.transcendental == 35
    assert found.elementwise == 35 + 35 + 2 * 5 * 6  # subtract, divide, two reductions of 7
    assert executed(lambda x: jnp.where(x > 0, x, -1).astype(jnp.int32) + 1, jnp.ones(9)).total == 0
    assert executed(lambda x: jnp.cumsum(x) + x**3, jnp.ones(9)).total == 9 + 9 + 2 * 9


def test_convolution_and_fft():
    x, w = jnp.ones((2, 10, 6)), jnp.ones((4, 1, 6))
    dims = ("NWC", "WIO", "NWC")

    def depthwise(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (1,), [(3, 0)], dimension_numbers=dims, feature_group_count=6
        )

    assert executed(depthwise, x, w).total == 2 * (2 * 10 * 6) * 4
    both = executed(lambda x: jnp.fft.fft(x), jnp.ones((3, 64), jnp.complex64))
    half = executed(lambda x: jnp.fft.irfft(jnp.fft.rfft(x)), jnp.ones((3, 64)))
    assert both.total == 3 * 5 * 64 * 6
    assert half.matmul == both.total
    product = executed(lambda x: x * x + x, jnp.ones(7, jnp.complex64))
    assert product.total == 7 * 6 + 7 * 2


def test_triangular_solve():
    def solve(a, b):
        return jax.lax.linalg.triangular_solve(a, b, left_side=True, lower=True)

    assert executed(solve, square(), jnp.ones((N, 5))).total == N * N * 5


def test_a_pallas_kernel_counts_its_estimate_or_says_that_it_has_none():
    def kernel(x_ref, y_ref):
        y_ref[...] = jnp.exp(x_ref[...] @ x_ref[...])

    def call(x, estimate):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(kernel, shape, interpret=True, cost_estimate=estimate)(x)

    cost = pl.CostEstimate(flops=2 * N**3, transcendentals=N * N, bytes_accessed=0)
    found = executed(lambda x: call(x, cost), square())
    assert (found.matmul, found.transcendental, found.notes) == (2 * N**3, N * N, set())
    found = executed(lambda x: call(x, None), square())
    assert found.total == 0 and any("pallas_call" in note for note in found.notes)


def test_shard_map_counts_all_devices():
    mesh = jax.make_mesh((4, 2), ("rows", "rest"), axis_types=(AxisType.Auto,) * 2)
    x, w = jnp.ones((8, N)), jnp.ones((N, N))

    def sharded(spec, axes):
        specs = dict(in_specs=(spec, P()), out_specs=spec, axis_names=axes)
        return jax.shard_map(jnp.matmul, mesh=mesh, check_vma=False, **specs)

    with jax.set_mesh(mesh):
        split = executed(jax.jit(sharded(P("rows"), {"rows"})), x, w)
        copied = executed(jax.jit(sharded(P("rows"), {"rows", "rest"})), x, w)
    assert split.total == 2 * 8 * N * N
    assert copied.total == 2 * split.total  # each of the two columns of devices does all of it


def test_an_unknown_primitive_is_said():
    found = executed(jnp.linalg.eigvalsh, square())
    assert any("without a rule" in note for note in found.notes)


def test_model_flops_of_a_diagonal_recurrence_are_its_steps():
    x = jnp.ones((2, 130, 16))
    found = model_flops(lambda x: linear_scan(x, -x)[0], x)
    assert found.total == 2 * x.size  # decay and add
    mapped = model_flops(jax.vmap(lambda x: linear_scan(x, -x)[0]), jnp.ones((3, *x.shape)))
    assert mapped.total == 3 * found.total
    looped = model_flops(
        lambda x: jax.lax.fori_loop(0, 4, lambda _, x: linear_scan(x, -x)[0], x), x
    )
    assert looped.total == 4 * found.total


def test_model_flops_count_no_elementwise_work_outside_of_recurrences():
    def block(x, w):
        x = x / jnp.sqrt((x * x).mean(-1, keepdims=True)) * 2
        return jax.nn.silu(x @ w) @ w

    assert model_flops(block, square(), square()).total == 2 * 2 * N**3


def test_a_declared_cost_stands_for_the_call_also_when_mapped(monkeypatch):
    monkeypatch.setattr(dispatch, "_cost", lambda *_: lambda x, log_decay, **_: 1000 * x.shape[0])
    x = jnp.ones((2, 5, 3))
    assert model_flops(lambda x: linear_scan(x, -x)[0], x).total == 2000
    mapped = model_flops(jax.vmap(lambda x: linear_scan(x, -x)[0]), jnp.ones((7, *x.shape)))
    assert mapped.total == 7 * 2000


def test_labels_change_nothing_outside_of_their_block():
    x = jnp.ones((1, 4, 2))
    with labelling():
        inside = str(jax.make_jaxpr(lambda x: linear_scan(x, -x)[0])(x))
    outside = str(jax.make_jaxpr(lambda x: linear_scan(x, -x)[0])(x))
    assert "kernels.linear_scan.linear_scan#0" in inside
    assert "kernels.linear_scan" not in outside


def test_every_rule_names_a_primitive_once():
    groups = [rules.ARITHMETIC, rules.TRANSCENDENTAL, rules.REDUCTIONS, rules.CUMULATIVE]
    groups += [rules.FREE, flops.CALLS, frozenset(rules._CONTRACTIONS)]
    assert sum(map(len, groups)) == len(frozenset().union(*groups))


def test_model_flops_do_not_take_an_older_trace_of_another_form():
    x = jnp.ones((2, 40, 3))
    scan = jax.jit(lambda x: linear_scan(x, -x)[0])
    needed = 2 * x.size
    assert model_flops(scan, x).total == needed
    jax.make_jaxpr(scan)(x)
    assert model_flops(scan, x).total == model_flops(scan, x).total == needed
    assert model_flops(lambda x: scan(x), x).total == needed
    assert "kernels" not in str(jax.make_jaxpr(scan)(x))


def test_transforms_inside_custom_rules_are_counted():
    """long_conv's FFTs have rules of their own for vmap and for meshes."""
    x, filters = jnp.ones((2, 512, 8)), jnp.ones((512, 8))
    found = executed(lambda *a: long_conv(*a, impl="xla")[0], x, filters)
    assert found.by_primitive["fft"] > 0
    assert not found.notes
