"""Without a gradient maps of the residual stream decay, under every rule; nothing else moves."""

import dataclasses
import functools
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import training.optimizers
from configs.schema import Optimizer
from models import catalogue, lm, weights
from models.attention import bidirectional, softmax
from parallel import sharding
from training import names, update

RULES = [info.name for info in pkgutil.iter_modules(training.optimizers.__path__)]
# Weights that stand on the stream and are no maps: gains and biases, a number an expert or a head,
# and one vector a part or an expert.
STAY = {
    ("embed",),
    ("layers", "embed"),
    ("parts", "embed"),
    ("experts", "embed"),
    ("embed", "experts"),
    ("embed", "experts", "parts"),
    ("embed", "heads"),
    ("embed", "heads", "parts"),
    ("embed", "parts", "heads"),
}
MOVE = "q k v kv qkv qk rkvg o up down xy zx bc embed head".split()
NEVER = (
    "norm norms scale gain bias o_bias gate_bias forget_bias norm_bias dt_bias log_a log_dt skip "
    "log_rate sinks taps mix first_mix before router directions planes noise persistent size mask"
).split()


def rule(name):
    return __import__(f"training.optimizers.{name}", fromlist=["Config"]).Config()


def is_dims(node):
    return isinstance(node, tuple)


@functools.cache
def every_weight():
    """(variant, path of a weight, names of its dimensions) of all variants and of models."""
    model = functools.partial(lm.Config, width=64, depth=2)
    models = {
        "lm": model(head="untied", predict=2, positions="sinusoidal"),
        "encoder": model(objective="masked", pattern=(bidirectional.Config(),)),
        "unrolled": model(layers="unrolled", pattern=(softmax.Config(qk_norm=True),)),
    }
    built = {name: c.build for name, c in models.items()}
    built |= {n: functools.partial(c.build, 64) for n, c in catalogue.cases().items()}
    found = []
    for name, build in built.items():
        dims = weights.dims(nnx.eval_shape(lambda build=build: build(nnx.Rngs(0))))
        paths = jax.tree_util.tree_leaves_with_path(dims, is_leaf=is_dims)
        found += [(name, jax.tree_util.keystr(p, simple=True, separator="/"), d) for p, d in paths]
    return found


@functools.cache
def moved(name) -> set:
    """The names of dimensions with which a weight of ones moves without a gradient."""
    dims = {str(d): d for _, _, d in every_weight()}
    ones = jax.tree.map(lambda d: jnp.ones((2,) * len(d)), dims, is_leaf=is_dims)
    made = functools.partial(update.make_rule, Optimizer(rule=rule(name), weight_decay=0.5), dims)

    @jax.jit
    def two_steps(params):
        state = made().init(params)
        for _ in range(2):
            moves, state = made(0.1).update(jax.tree.map(jnp.zeros_like, params), state, params)
            params = optax.apply_updates(params, moves)
        return params

    after = two_steps(ones)
    return {dims[key] for key in dims if not np.array_equal(after[key], ones[key])}


def test_every_variant_is_read():
    assert len({variant for variant, _, _ in every_weight()}) > 130 and len(every_weight()) > 900
    assert len(RULES) >= 6


@pytest.mark.parametrize("name", RULES)
def test_without_a_gradient_maps_decay_and_nothing_else_moves(name):
    moves = moved(name)
    for variant, path, dims in every_weight():
        where = f"{variant}: {path} {dims}"
        assert (dims in moves) == ("embed" in dims and dims not in STAY), where
        last = [part for part in path.split("/") if not part.isdigit()][-1]
        if last in NEVER:
            assert dims not in moves, where
        if last in MOVE and "embed" in dims:
            assert dims in moves, where


def test_matrices_follow_from_names():
    assert names.matrix(("layers", "embed", "parts", "heads", "key")) == ((0, 2), (1,), (3, 4))
    assert names.matrix(("heads", "value", "embed")) == ((), (2,), (0, 1))
    assert names.matrix(("width", "embed", "parts", "channels")) == ((2,), (0, 1), (3,))
    assert names.matrix(("experts", "channels", "embed")) == ((0,), (2,), (1,))
    assert names.matrix(("vocab", "embed")) == ((), (1,), (0,))
    assert names.inner_matrix(("vocab", "embed")) is names.matrix(("embed", "experts")) is None
    for _, path, dims in every_weight():
        found = names.matrix(dims)
        if found:
            assert found.rows and found.columns, path
            assert sorted(sum(found, ())) == list(range(len(dims))), path
            shape = tuple(range(2, 2 + len(dims)))
            x = np.random.default_rng(0).normal(size=shape)
            np.testing.assert_array_equal(names.unfold(names.fold(x, found), found, shape), x)


def test_a_matrix_multiplies_what_an_einsum_does():
    w, x = (np.random.default_rng(i).normal(size=n) for i, n in enumerate([(3, 5, 2, 4), (5,)]))
    found = names.matrix(("parts", "embed", "heads", "key"))
    want = np.einsum("pdhk,d->phk", w, x).reshape(3, 8)
    np.testing.assert_allclose(np.einsum("nrc,r->nc", names.fold(w, found), x), want)


def test_every_name_is_known_to_one_table():
    used = {name for _, _, dims in every_weight() for name in dims}
    assert used <= set(sharding.WEIGHTS)
    assert names.FEATURES | names.SEPARATE | {"embed", "heads", "groups", "width", "router"} == set(
        sharding.WEIGHTS
    )


@pytest.mark.parametrize("name", [n for n in RULES if hasattr(rule(n), "eps")])
def test_eps_reaches_every_weight(name):
    """With an eps far above every gradient all weights move far less; Adam inside Muon too."""
    dims = {"map": ("embed", "key"), "gain": ("embed",), "table": ("vocab", "embed")}
    params = {key: jnp.ones((4,) * len(d)) for key, d in dims.items()}
    grads = jax.tree.map(lambda w: jax.random.normal(jax.random.key(0), w.shape), params)

    @jax.jit
    def size(eps):
        config = Optimizer(rule=dataclasses.replace(rule(name), eps=eps), weight_decay=0.0)
        made = functools.partial(update.make_rule, config, dims)
        state, at = made().init(params), params
        for _ in range(2):
            moves, state = made(1.0).update(grads, state, at)
            at = optax.apply_updates(at, moves)
        return {key: jnp.abs(at[key] - params[key]).max() for key in params}

    small, large = size(1e-8), size(1e6)
    assert all(large[key] < 1e-2 * small[key] for key in params), (small, large)
