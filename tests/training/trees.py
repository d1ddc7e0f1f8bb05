"""What tests of checkpoints save and compare: a tree with every kind of leaf, and its bits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from training import leaves


def bits(tree) -> list[tuple]:
    """Every leaf as dtype, shape and bytes: equal lists are bit-equal trees."""
    words = [leaves.words(leaf) for leaf in jax.tree.leaves(tree)]
    return [(str(x.dtype), x.shape, np.asarray(x).tobytes()) for x in words]


def abstract(tree, sharding=None):
    """The tree's shapes and dtypes, every leaf with the same sharding."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def small_tree(seed: int):
    """Nested dicts, an optax state of NamedTuples, scalars, NaN and -0, bfloat16, random keys."""
    draw = np.random.default_rng(seed).standard_normal
    params = {
        "embed": jnp.asarray(draw((32, 8)), jnp.float32),
        "b": {"w": jnp.asarray(draw((8, 4)))},
    }
    key = jax.random.key(seed)
    return {
        "step": jnp.asarray(seed, jnp.int32),
        "params": params,
        "optimizer": optax.adamw(1e-3).init(params),
        "odd": (jnp.asarray([np.nan, -0.0, np.inf]), jnp.asarray(draw(3), jnp.bfloat16)),
        "flag": jnp.asarray(True),
        "empty": jnp.zeros((0, 3)),
        "keys": [key, jax.random.split(key, 4), jax.random.key(seed, impl="rbg")],
    }
