"""The gap between executed and model FLOPs by operation, against counts by hand."""

import functools

import jax
import jax.numpy as jnp
import pytest

from kernels.attention import attention
from kernels.linear_scan import linear_scan
from resources import gap
from resources.compute import executed_flops, xla_flops

B, T, H, K = 2, 96, 2, 32
N, LAYERS = 48, 5
HEADS = jax.ShapeDtypeStruct((B, T, H, K), jnp.float32)
MATRIX = jax.ShapeDtypeStruct((N, N), jnp.float32)


def by_name(*args, **kwargs):
    return {part.operation: part for part in gap.parts(*args, **kwargs)}


def attended(q, k, v):
    return attention(q, k, v, impl="ref")[0].sum()


def test_masked_pairs_of_attention():
    found = by_name(attended, (HEADS,) * 3, attended, (HEADS,) * 3, times=1)["attention"]
    visible = B * H * T * (T + 1) // 2 * 4 * K
    every = B * H * T * T * 4 * K
    assert found.model == visible
    assert found.form == pytest.approx(every - visible, rel=0.1)  # and the softmax
    assert found.executed == found.forward > every
    assert (found.backward, found.recomputed, found.other) == (0, 0, 0)


def test_gradients_belong_to_the_operation():
    program = jax.value_and_grad(attended, argnums=(0, 1, 2))
    found = by_name(program, (HEADS,) * 3, attended, (HEADS,) * 3)
    part, product = found["attention"], B * H * T * T * 2 * K
    assert part.model == 3 * B * H * T * (T + 1) // 2 * 4 * K
    # Two products forward; their four gradients backward.
    assert part.forward == pytest.approx(2 * product, rel=0.1)
    assert part.backward == pytest.approx(4 * product, rel=0.1)
    assert gap.CONTRACTIONS not in found


def test_a_recurrence_in_its_own_form_has_no_gap():
    x = jnp.ones((2, 130, 16))
    run = lambda x: linear_scan(x, -x, impl="ref")[0]
    found = by_name(run, (x,), run, (x,), times=1)["linear_scan"]
    assert found.model == found.executed == 2 * x.size
    assert found.once == 2 * x.size / 130


def loss(layer, w, x):
    return jax.lax.scan(lambda x, _: (layer(x, w), None), x, None, length=LAYERS)[0].sum()


def tanh(x, w):
    return jnp.tanh(x @ w) @ w


def update(layer, w, x):
    gradients = jax.grad(functools.partial(loss, layer), argnums=(0, 1))(w, x)
    return jax.tree.map(lambda p, g: p - 0.1 * g, (w, x), gradients)


@pytest.mark.parametrize("layer", [tanh, jax.checkpoint(tanh)], ids=["kept", "recomputed"])
def test_remat_and_the_optimizer_are_told_apart(layer):
    program = jax.jit(functools.partial(update, layer))
    forward = functools.partial(loss, layer)
    found = by_name(program, (MATRIX,) * 2, forward, (MATRIX,) * 2)
    products, rest = found[gap.CONTRACTIONS], found[gap.ARITHMETIC]
    one = LAYERS * 2 * N**3
    assert products.model == 3 * 2 * one
    assert (products.forward, products.backward) == (2 * one, 4 * one)
    assert (products.form, products.gradient, products.other) == (0, 0, 0)
    # The last product of a layer is its output, which the backward pass does not read.
    assert products.recomputed == (0 if layer is tanh else one)
    assert rest.model == 0
    assert rest.other == 2 * 2 * N * N  # p - 0.1 g, of two matrices


def test_parts_sum_to_the_whole_and_causes_to_the_gap():
    def run(w, q):
        x = linear_scan(q[:, :, 0], -jnp.square(q[:, :, 1]))[0]
        return attention(q, q, q)[0].sum() + jnp.sum(x @ w)

    args = jnp.ones((K, N)), jnp.ones((B, T, H, K))
    program = jax.jit(jax.value_and_grad(run))
    found = gap.parts(program, args, run, args)
    whole = executed_flops(program.trace(*args).jaxpr)
    assert sum(part.executed for part in found) == whole.total
    names = {part.operation for part in found}
    assert names == {"attention", "linear_scan", gap.CONTRACTIONS, gap.ARITHMETIC}
    for part in found:
        causes = part.form + part.gradient + part.recomputed + part.other
        assert causes == pytest.approx(part.executed - part.model)
    assert list(found) == sorted(found, key=lambda part: -part.executed)


def test_loops_once_are_what_xla_counts():
    program = jax.jit(functools.partial(update, jax.checkpoint(tanh)))
    args = jnp.ones((N, N)), jnp.ones((N, N))
    found = gap.parts(program, args, functools.partial(loss, tanh), args)
    by_xla = xla_flops(program.lower(*args).compile())
    once = sum(part.once for part in found)
    assert by_xla == pytest.approx(once, rel=0.02)
    assert once < sum(part.executed for part in found) / (LAYERS - 1)
