"""What is particular to the grouped product; tests/test_kernels.py proves the rest."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels import setting
from kernels.grouped_matmul import cost, grouped_matmul, pallas_tpu, xla
from programs.flops import Walk
from tests.kernels.launches import costs
from tests.tolerance import assert_close

each_impl = pytest.mark.parametrize("impl", ("ref", "xla"))
SIZES = {
    "even": (25, 25, 25, 25),
    "all in one": (0, 100, 0, 0),
    "ends empty": (0, 40, 33, 0),
    "one row each": (1, 1, 1, 1),
    "nothing": (0, 0, 0, 0),
    "many groups": tuple(i % 4 for i in range(66)),
    "one group": (97,),
}


def draw(sizes, rows=100, width=5, outputs=7, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, width)).astype(np.float32)
    weights = rng.normal(size=(len(sizes), width, outputs)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(weights), jnp.asarray(sizes, jnp.int32)


def by_groups(x, weights, sizes):
    """The definition in NumPy float64, with the gradients for a cotangent of ones."""
    x, weights = np.asarray(x, np.float64), np.asarray(weights, np.float64)
    y, dx = np.zeros((len(x), weights.shape[2])), np.zeros_like(x)
    dw, ends = np.zeros_like(weights), np.cumsum(sizes)
    for group, (size, end) in enumerate(zip(np.asarray(sizes), ends, strict=True)):
        mine = slice(end - size, end)
        y[mine] = x[mine] @ weights[group]
        dx[mine] = weights[group].sum(axis=1)
        dw[group] = x[mine].sum(axis=0)[:, None]
    return y, dx, dw


def run(impl, x, weights, sizes):
    return [np.asarray(a) for a in both(x, weights, sizes, impl)]


@functools.partial(jax.jit, static_argnames="impl")
def both(x, weights, sizes, impl):
    y, pullback = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, impl=impl), x, weights)
    return y, *pullback(jnp.ones_like(y))


@each_impl
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_equals_a_loop_over_groups(impl, sizes):
    given = draw(sizes)
    for found, want, what in zip(
        run(impl, *given), by_groups(*given), ("y", "dx", "dw"), strict=True
    ):
        assert_close(found, want, "float32", what)


@each_impl
def test_rows_of_no_group_may_hold_anything(impl):
    x, weights, sizes = draw((30, 0, 20, 0))
    dirty = x.at[50:].set(jnp.nan)
    clean, found = run(impl, x, weights, sizes), run(impl, dirty, weights, sizes)
    for a, b in zip(clean, found, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not found[0][50:].any() and not found[1][50:].any()


@each_impl
def test_an_empty_group_touches_nothing(impl):
    x, weights, sizes = draw((30, 0, 20, 0))
    spoilt = weights.at[jnp.asarray([1, 3])].set(jnp.nan)
    clean, found = run(impl, x, weights, sizes), run(impl, x, spoilt, sizes)
    for a, b in zip(clean, found, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not found[2][[1, 3]].any()


@each_impl
@pytest.mark.parametrize("sizes", [(60, 41, 0, 0), (120, 0, 0, 0), (-1, 50, 0, 0)])
def test_sizes_that_cannot_be_are_loud(impl, sizes):
    x, weights, sizes = draw(sizes)
    assert np.isnan(run(impl, x, weights, sizes)[0]).all()


@pytest.mark.parametrize("rows", [1, 7, 100, 5000])
@pytest.mark.parametrize("groups", [1, 3, 64])
def test_tiles_cover_every_row_once_and_are_few(rows, groups):
    rng = np.random.default_rng(rows + groups)
    tile = xla.tile_rows(rows, groups)
    tiles_of = jax.jit(lambda sizes: xla.tiles_of(sizes, rows, tile))
    for share in (np.ones(groups) / groups, np.eye(groups)[0], rng.dirichlet(np.ones(groups))):
        sizes = rng.multinomial(rows - rows // 10, share)
        found = tiles_of(jnp.asarray(sizes, jnp.int32))
        start, stop, group = (np.asarray(part) for part in found)
        seen = [
            (row, g)
            for a, b, g in zip(start, stop, group, strict=True)
            for row in range(a, min(b, a + tile))
        ]
        want = np.repeat(np.arange(groups), sizes)
        assert seen == list(enumerate(want))
        assert np.all(np.diff(start) >= 0), "a tile would overwrite the rows after it"
        assert len(start) * tile < rows + min(groups, rows) * tile


@pytest.mark.parametrize(("rows", "groups"), [(2048, 8), (2048, 64), (100, 64)])
def test_flops_are_those_of_the_rows_and_a_tile_a_group(rows, groups):
    width, outputs = 32, 48
    shapes = ((rows, width), (groups, width, outputs), (rows, outputs))
    given = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
    sizes = jax.ShapeDtypeStruct((groups,), np.int32)

    def forward(x, weights, dy, sizes):
        return grouped_matmul(x, weights, sizes)

    def backward(x, weights, dy, sizes):
        return jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, weights)[1](dy)

    needed = cost.grouped_matmul(jnp.zeros(shapes[0]), jnp.zeros(shapes[1]), None)
    assert needed == 2 * rows * width * outputs
    most = needed + 2 * min(groups, rows) * xla.tile_rows(rows, groups) * width * outputs
    once = Walk().run(jax.make_jaxpr(forward)(*given, sizes)).matmul
    slopes = Walk().run(jax.make_jaxpr(backward)(*given, sizes)).matmul
    assert needed <= once < most
    assert 2 * needed <= slopes < 2 * most


def test_experts_on_several_devices():
    """Each device has its own rows and all the weights: their gradient is summed over devices."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x, weights, sizes = draw((10, 0, 12), rows=100)

    def local(x, weights):
        return grouped_matmul(x, weights, sizes)

    def total(product):
        return lambda x, weights: jnp.sum(jnp.sin(product(x, weights)))

    split = jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    apart = lambda x, w: jnp.concatenate([local(part, w) for part in jnp.split(x, 4)])
    found = jax.jit(jax.grad(total(split), (0, 1)))(x, weights)
    want = jax.jit(jax.grad(total(apart), (0, 1)))(x, weights)
    for a, b, what in zip(found, want, ("dx", "dw"), strict=True):
        assert_close(a, b, "float32", what)


def test_dtypes():
    x, weights, sizes = draw((30, 50))
    y, dx, dw = jax.eval_shape(lambda *a: both(*a, None), x.astype(jnp.bfloat16), weights, sizes)
    assert y.dtype == jnp.bfloat16
    assert dx.dtype == jnp.bfloat16 and dw.dtype == jnp.float32


X, WEIGHTS, COUNTS = jnp.zeros((6, 4)), jnp.zeros((2, 4, 3)), jnp.zeros(2, jnp.int32)
FAULTS = [
    ({"x": X[0]}, "x has shape (4,), rank 1; it must have rank 2: (rows, width)."),
    (
        {"weights": WEIGHTS[0]},
        "weights has shape (4, 3), rank 2; it must have rank 3: (groups, width, outputs).",
    ),
    ({"x": X[:0]}, "x has shape (0, 4); every size must be at least 1."),
    ({"weights": WEIGHTS[:, :, :0]}, "weights has shape (2, 4, 0); every size must be at least 1."),
    ({"x": X.astype(int)}, "x has dtype int32; it must be floating, as float32."),
    ({"weights": WEIGHTS.astype(int)}, "weights has dtype int32; it must be floating, as float32."),
    (
        {"weights": WEIGHTS[:, :3]},
        "weights has shape (2, 3, 3); its second size must be x's width, 4.",
    ),
    (
        {"group_sizes": COUNTS[:1]},
        "group_sizes has shape (1,); it must be (E,) = (2,), one size for each of weights.",
    ),
    (
        {"group_sizes": jnp.zeros(2)},
        "group_sizes has dtype float32; it must be an integer, as int32.",
    ),
    ({"impl": "fast"}, "grouped_matmul has no implementation 'fast'; it has ref, xla"),
]


@pytest.mark.parametrize(("fault", "message"), FAULTS)
def test_faults(fault, message):
    good = {"x": X, "weights": WEIGHTS, "group_sizes": COUNTS}
    jax.eval_shape(grouped_matmul, **good)
    with pytest.raises(ValueError) as error:
        grouped_matmul(**good | fault)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_tpu_kernel_equals_a_loop_over_groups():
    for sizes in SIZES.values():
        given = draw(sizes)
        with setting.interpreting():
            found = run("pallas_tpu", *given)
        for a, b, what in zip(found, by_groups(*given), ("y", "dx", "dw"), strict=True):
            assert_close(a, b, "float32", what)


def test_costs_of_tpu_launches_are_the_formulas():
    """Tiles of 128 rows; a shared tile is a step for each of its groups: 4 groups + 4 tiles."""
    rows, width, outputs, groups, tile = 512, 256, 384, 4, 128
    given = {
        "x": jnp.zeros((rows, width), jnp.bfloat16),
        "weights": jnp.zeros((groups, width, outputs), jnp.bfloat16),
    }
    sizes = jnp.full(groups, rows // groups)
    found = costs(grouped_matmul, given, group_sizes=sizes)
    steps = groups + rows // tile
    assert [cost.flops for cost in found] == [2 * steps * tile * width * outputs] * 3
    # Forward, gradient of x, gradient of the weights: all read or write each row and matrix once,
    # and the rows beyond all groups are a group.
    moved = 2 * (rows * (width + outputs) + (groups + 1) * width * outputs)
    assert [cost.bytes_accessed for cost in found] == [moved] * 3


def test_float64_on_a_tpu_is_named():
    with jax.enable_x64(True):
        x, weights = jnp.ones((4, 3)), jnp.ones((2, 3, 5))
        with pytest.raises(ValueError, match="does not cover float64; the nearest dtype is"):
            pallas_tpu.grouped_matmul(x, weights, jnp.ones(2, jnp.int32))


def test_a_tpu_kernel_needs_a_tpu():
    with pytest.raises(ValueError, match="grouped_matmul as pallas_tpu needs a TPU"):
        grouped_matmul(X, WEIGHTS, COUNTS, impl="pallas_tpu")
