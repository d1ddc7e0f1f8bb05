"""Both causal convolutions inside `jax.shard_map` with its checks on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels.long_conv import long_conv
from kernels.short_conv import short_conv
from tests.kernels.packed import SEGMENTS
from tests.tolerance import assert_close


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("function", "taps"), [(short_conv, 4), (long_conv, 12)])
def test_rows_split_over_devices(function, taps, packed):
    """Filters that all devices share get the sum of their gradients."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(6, 14, 3)), jnp.float32)
    filters = jnp.asarray(rng.normal(size=(taps, 3)), jnp.float32)
    segments = jnp.asarray(SEGMENTS[:6] if packed else np.ones_like(SEGMENTS[:6]))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    rows = P("data")

    def local(x, filters, segments):
        return function(x, filters, segments=segments if packed else None, impl="xla")[0]

    split = jax.shard_map(local, mesh=mesh, in_specs=(rows, P(), rows), out_specs=rows)
    total = lambda run: lambda x, filters: jnp.sum(jnp.sin(run(x, filters, segments)))
    found = jax.jit(jax.grad(total(split), (0, 1)))(x, filters)
    want = jax.jit(jax.grad(total(local), (0, 1)))(x, filters)
    for name, a, b in zip(("dx", "dfilters"), found, want, strict=True):
        assert_close(a, b, "float32", name)
