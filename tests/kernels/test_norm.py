"""What is particular to the fused normalisation; tests/test_kernels.py proves the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from kernels.norm import norm
from tests.tolerance import assert_close

each_impl = pytest.mark.parametrize("impl", ("ref", "xla"))
OPTIONS = [(), ("residual",), ("gate",), ("input_gate",), ("residual", "gate", "input_gate")]
each_option = pytest.mark.parametrize("options", OPTIONS, ids="+".join)


def draw(*shape, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    names = ("x", "residual", "gate", "input_gate")
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name in names}


def by_numpy(x, weight, residual=None, gate=None, input_gate=None, activation="silu", eps=1e-6):
    """The two equations in float64."""
    sigmoid = lambda z: 1 / (1 + np.exp(-z))
    act = sigmoid if activation == "sigmoid" else lambda z: z * sigmoid(z)
    u = x if input_gate is None else x * act(input_gate)
    u = u if residual is None else u + residual
    y = u / np.sqrt(np.mean(u**2, axis=-1, keepdims=True) + eps) * weight
    return y if gate is None else y * act(gate), u


@each_impl
@each_option
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_equals_its_equation(impl, options, activation):
    arrays = draw(3, 5, 8)
    chosen = {name: arrays[name] for name in ("x", *options)}
    weight = jnp.arange(1.0, 9.0)
    found = norm(**chosen, weight=weight, activation=activation, eps=0.1, impl=impl)
    wide = {name: np.asarray(value, np.float64) for name, value in chosen.items()}
    want = by_numpy(**wide, weight=np.arange(1.0, 9.0), activation=activation, eps=0.1)
    for a, b, what in zip(found, want, ("y", "u"), strict=True):
        assert_close(a, b, "float32", what)


@each_option
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_numerical_slopes(options, activation):
    with jax.enable_x64(True):
        arrays = draw(2, 3, 4, dtype=np.float64)
        chosen = {name: arrays[name] for name in ("x", *options)}
        chosen["weight"] = jnp.asarray([[1.0, 0.5, -2.0, 0.0], [3.0, 1.0, 1.0, 0.1], [1.0] * 4])

        def both(chosen):
            return norm(**chosen, activation=activation)

        check_grads(jax.jit(both), (chosen,), 1, ["rev"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_fused_sum_equals_the_sum_apart_in_every_bit(dtype):
    given = draw(4, 7, 16, dtype=dtype)
    weight = jnp.linspace(0.5, 2, 16)
    x, residual = given["x"], given["residual"]
    y, u = jax.jit(lambda x, r: norm(x, weight, residual=r))(x, residual)
    alone, same = jax.jit(lambda u: norm(u, weight))(u)
    np.testing.assert_array_equal(np.asarray(u), np.asarray(x + residual))
    np.testing.assert_array_equal(np.asarray(same), np.asarray(u))
    np.testing.assert_array_equal(np.asarray(y), np.asarray(alone))


@each_impl
def test_a_weight_a_head_equals_heads_apart(impl):
    given = draw(2, 6, 3, 8)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(3, 8)), jnp.float32)
    y, _ = norm(given["x"], weight, gate=given["gate"], impl=impl)
    for head in range(3):
        x, gate = given["x"][:, :, head], given["gate"][:, :, head]
        assert_close(y[:, :, head], norm(x, weight[head], gate=gate, impl=impl)[0], "float32", "y")


@each_impl
def test_a_row_of_zeros_is_finite_both_ways(impl):
    x = draw(2, 3, 8)["x"].at[0, 1].set(0)
    weight = jnp.ones(8)

    def total(x, weight):
        y, u = norm(x, weight, gate=x, impl=impl)
        return jnp.sum(jnp.sin(y)) + jnp.sum(u)

    y, _ = norm(x, weight, impl=impl)
    assert not np.asarray(y)[0, 1].any()
    for slope in jax.jit(jax.grad(total, (0, 1)))(x, weight):
        assert np.isfinite(np.asarray(slope)).all()


def test_between_the_passes_stay_the_sum_and_a_number_a_row():
    given = draw(4, 64, 32, dtype="bfloat16")
    weight = jnp.ones(32)
    run = lambda x, r: norm(x, weight, residual=r)[0]
    _, pullback = jax.vjp(run, given["x"], given["residual"])
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(pullback) if hasattr(leaf, "nbytes"))
    assert held <= given["x"].nbytes + 4 * 4 * 64 + weight.nbytes + 16


def test_rows_on_several_devices():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    given, weight = draw(4, 3, 8), jnp.linspace(1, 2, 8)

    def local(x, residual, weight):
        y, u = norm(x, weight, residual=residual, gate=x)
        return y + u

    spec = P("data")
    split = jax.shard_map(local, mesh=mesh, in_specs=(spec, spec, P()), out_specs=spec)
    total = lambda run: lambda *given: jnp.sum(jnp.sin(run(*given)))
    arrays = (given["x"], given["residual"], weight)
    found = jax.jit(jax.grad(total(split), (0, 1, 2)))(*arrays)
    want = jax.jit(jax.grad(total(local), (0, 1, 2)))(*arrays)
    for a, b, what in zip(found, want, ("dx", "dresidual", "dweight"), strict=True):
        assert_close(a, b, "float32", what)


def test_dtypes():
    given = draw(2, 3, 8, dtype="bfloat16")
    y, u = norm(**given, weight=jnp.ones(8))
    assert y.dtype == u.dtype == jnp.bfloat16
    slope = jax.grad(lambda w: norm(**given, weight=w)[0].sum().astype(jnp.float32))(jnp.ones(8))
    assert slope.dtype == jnp.float32


X, WEIGHT = jnp.ones((2, 3, 4)), jnp.ones(4)
FAULTS = [
    ({"x": jnp.ones(())}, "x has shape (); it must be (..., D), every size at least 1."),
    ({"x": X[:, :0]}, "x has shape (2, 0, 4); it must be (..., D), every size at least 1."),
    (
        {"weight": WEIGHT[:3]},
        "weight has shape (3,); it must be the last one or more sizes of x, as (4,).",
    ),
    (
        {"weight": jnp.ones(())},
        "weight has shape (); it must be the last one or more sizes of x, as (4,).",
    ),
    (
        {"weight": jnp.ones((2, 4))},
        "weight has shape (2, 4); it must be the last one or more sizes of x, as (4,).",
    ),
    ({"x": X.astype(int)}, "x has dtype int32; it must be floating, as float32."),
    ({"weight": WEIGHT.astype(int)}, "weight has dtype int32; it must be floating, as float32."),
    ({"residual": X[0]}, "residual has shape (3, 4); it must be x's, (2, 3, 4)."),
    ({"gate": X[:1]}, "gate has shape (1, 3, 4); it must be x's, (2, 3, 4)."),
    ({"input_gate": X[..., :1]}, "input_gate has shape (2, 3, 1); it must be x's, (2, 3, 4)."),
    ({"gate": X.astype(int)}, "gate has dtype int32; it must be floating, as float32."),
    ({"activation": "tanh"}, "activation is 'tanh'; it must be silu or sigmoid."),
    ({"eps": 0.0}, "eps is 0.0; it must be positive, as 1e-6."),
    ({"impl": "fast"}, "norm has no implementation 'fast'; it has ref, xla (or None: chosen)."),
]


@pytest.mark.parametrize(("fault", "message"), FAULTS)
def test_faults(fault, message):
    jax.eval_shape(norm, X, WEIGHT)
    with pytest.raises(ValueError) as error:
        norm(**{"x": X, "weight": WEIGHT} | fault)
    assert str(error.value) == message
