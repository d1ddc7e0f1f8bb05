"""Blocks against their equations: what is added to what, shared, reversed or passed by."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import auxiliary, catalogue, mixer
from models.attention import softmax
from models.block import (
    CASES,
    depth,
    heads,
    hyper_connections,
    ladder,
    looped,
    parallel,
    residual,
    reversible,
    shared,
    yoco,
)
from models.channel import dropless, glu
from models.convolution import mega
from models.low_rank import synthesizer
from models.recurrent import rg_lru
from tests.tolerance import assert_close

WIDTH = 16
PARTS = (rg_lru.Config(), glu.Config(hidden=24), softmax.Config(heads=2), glu.Config(hidden=24))


def stream(seed=1, length=9):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(2, length, WIDTH)), jnp.float32)


def built(config):
    return config.build(WIDTH, nnx.Rngs(0))


@functools.partial(jax.jit, static_argnums=0)
def _call(graph, params, x):
    return nnx.merge(graph, params)(x)[0]


def ran(module, x):
    """The outputs, by one program: a call that is not compiled as one is hundreds."""
    return _call(*nnx.split(module), x)


def close(got, want, what):
    assert_close(got, want, np.float32, what)


@pytest.mark.parametrize("name", CASES)
def test_a_config_says_whether_it_builds_a_block(name):
    config = CASES[name]
    assert catalogue.variants()[name] == config  # no contract for what is not found
    assert mixer.is_block(config) == (name != "heads")
    assert isinstance(nnx.eval_shape(lambda: config.build(32, nnx.Rngs(0))), mixer.Block) == (
        name != "heads"
    )


def test_mixers_are_no_blocks_wherever_they_live():
    assert mixer.is_block(mega.Config()) and "mega" in catalogue.variants()
    assert not any(map(mixer.is_block, PARTS))
    assert not mixer.is_block(synthesizer.Config(causal=True))


def test_a_pre_norm_block_adds_one_mixer_after_the_other():
    x, block = stream(), built(residual.Config(PARTS[0], PARTS[1]))
    y = x + ran(block.parts[0], x)
    close(ran(block, x), y + ran(block.parts[1], y), "pre-norm")


def test_a_sandwich_norms_what_it_adds():
    x, block = stream(), built(residual.Config(PARTS[1], norm="sandwich"))
    close(ran(block, x), x + block.norms[0](ran(block.parts[0], x)), "sandwich")


def test_a_parallel_block_reads_the_stream_once():
    x, block = stream(), built(parallel.Config(PARTS[0], PARTS[1]))
    u = block.norm(x)
    close(ran(block, x), x + ran(block.parts[0], u) + ran(block.parts[1], u), "parallel")


def test_heads_side_by_side_are_normed_and_averaged():
    x, block = stream(), built(heads.Config((PARTS[0], PARTS[2])))
    norm = lambda y: y / jnp.sqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + 1e-6)
    block.gain[...] = jnp.stack([jnp.full(WIDTH, 2.0), jnp.full(WIDTH, -1.0)])
    a, b = (ran(part, x) for part in block.parts)
    close(ran(block, x), (2 * norm(a) - norm(b)) / 2, "heads")


def test_a_looped_block_is_one_block_again_and_again():
    x, block = stream(), built(looped.Config(residual.Config(PARTS[0]), times=3))
    y = x
    for _ in range(3):
        y = ran(block.block, y)
    close(ran(block, x), y, "looped")
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.split(block)[1])) == sum(
        leaf.size for leaf in jax.tree.leaves(nnx.split(block.block)[1])
    )


def test_a_ladder_reads_the_stream_without_the_layer_just_before():
    x, block = stream(), built(ladder.Config(PARTS[:3]))
    f, g, h = (functools.partial(ran, part) for part in block.parts)
    first, second = f(x), g(x)
    close(ran(block, x), x + first + second + h(x + first), "ladder")


def test_hyper_connections_start_as_the_residual_network():
    x, block = stream(), built(hyper_connections.Config(PARTS[:2]))
    block.maps[...] = jnp.zeros_like(block.maps[...])
    y = x + ran(block.parts[0], x)
    y = y + ran(block.parts[1], y)
    assert float(jnp.max(jnp.abs(ran(block, x) - y))) < 1e-2 * float(jnp.max(jnp.abs(y)))


def test_the_map_between_streams_is_doubly_stochastic():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4, 4)) * 2, jnp.float32)
    found = np.asarray(hyper_connections.sinkhorn(logits))
    assert found.min() >= 0
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(found.sum(-2), 1, rtol=1e-2)


def plain(block, x):
    """A reversible block's equation, differentiated in the ordinary way."""
    a = b = x
    for part in block.parts:
        a, b = b, a + part(b)[0]
    return (a + b) / 2


def test_reversible_layers_have_the_ordinary_gradients():
    x, block = stream(), built(reversible.Config(PARTS))
    graph, params = nnx.split(block)
    loss = lambda run: lambda params, x: jnp.sum(jnp.sin(run(nnx.merge(graph, params), x)))
    grad = lambda run: jax.jit(jax.grad(loss(run), argnums=(0, 1)))(params, x)
    ours, want = grad(lambda block, x: block(x)[0]), grad(plain)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
        close(a, b, "gradient")


def test_reversible_layers_keep_no_activations():
    """Four times the layers take hardly more memory; in ordinary layers each takes its share."""
    x = stream(length=512)

    def peak(run, count):
        block = built(reversible.Config((glu.Config(hidden=512),) * count))
        graph, params = nnx.split(block)
        loss = lambda params, x: jnp.sum(run(nnx.merge(graph, params), x) ** 2)
        memory = jax.jit(jax.grad(loss)).lower(params, x).compile().memory_analysis()
        return memory.temp_size_in_bytes

    ours, ordinary = (
        [peak(run, count) for count in (2, 8)] for run in (lambda block, x: block(x)[0], plain)
    )
    assert ours[1] < 1.5 * ours[0] and ordinary[1] > 2.5 * ordinary[0]


def test_reversible_layers_pass_on_what_their_layers_report():
    x, block = stream(), built(reversible.Config((dropless.Config(experts=4), PARTS[1])))
    graph, params = nnx.split(block)

    def loss(params, run):
        with auxiliary.collecting() as found:
            run(nnx.merge(graph, params), x)
        return sum(found["losses"]["balance"])

    ours, want = (
        jax.jit(jax.grad(loss), static_argnums=1)(params, run)
        for run in (lambda block, x: block(x), lambda b, x: plain(b, x))
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
        assert_close(a, b, np.float32, "gradient of the loss", least=1e-6)


def test_a_shared_block_is_called_with_the_embedding_beside_the_stream():
    config = shared.Config(residual.Config(PARTS[1]), (residual.Config(PARTS[0]),) * 2)
    x, block = stream(), built(config)
    y = x
    for own, back in zip(block.blocks, block.maps, strict=True):
        both = ran(block.shared, jnp.concatenate([y, x], -1))
        y = ran(own, y + both @ back[...])
    close(ran(block, x), y, "shared")


def test_yoco_makes_keys_and_values_once():
    x = stream()
    configs = [yoco.Config((PARTS[0],), PARTS[1], above=n, heads=2) for n in (1, 3)]
    sizes = [
        sum(leaf.size for leaf in jax.tree.leaves(built(c).init_state(1, 64)["kv"]))
        for c in configs
    ]
    assert sizes[0] == sizes[1]
    assert jax.eval_shape(lambda x: built(configs[1])(x)[0], x).shape == x.shape


def passing(block, x, segments=None):
    """Which tokens a depth block lets through, by its own rule in plain Python."""
    wants = np.asarray(jnp.einsum("btd,d->bt", x, block.router[...])) > 0
    found = np.zeros(wants.shape, bool)
    for row in range(x.shape[0]):
        read = passed = 0
        for t in range(x.shape[1]):
            if segments is not None and t and segments[row, t] != segments[row, t - 1]:
                read = passed = 0
            read += 1
            found[row, t] = wants[row, t] and passed + 1 <= read * block.share / 64
            passed += found[row, t]
    return found


@pytest.mark.parametrize("capacity", [0.25, 0.75])
def test_depth_lets_a_share_of_each_document_through(capacity):
    x = stream(length=40)
    block = built(depth.Config(residual.Config(PARTS[1]), capacity=capacity))
    segments = jnp.asarray([[1] * 23 + [2] * 17] * 2)
    y, _ = jax.jit(lambda x: block(x, segments=segments))(x)
    chosen = passing(block, x, np.asarray(segments))
    changed = np.asarray(jnp.any(y != x, axis=-1))
    np.testing.assert_array_equal(changed, chosen)
    assert 0 < chosen.mean() <= capacity


def test_depth_refusals_take_no_room():
    """All 16 tokens want to pass and a quarter may: every fourth does, weighed by its product 1."""
    block = depth.Config(residual.Config(PARTS[1]), capacity=0.25).build(4, nnx.Rngs(0))
    block.router[...] = jnp.asarray([1.0, 0, 0, 0])
    x = jnp.ones((1, 16, 4))
    y = ran(block, x)
    assert np.flatnonzero(np.any(np.asarray(y != x)[0], -1)).tolist() == [3, 7, 11, 15]
    close(y[0, 3], ran(block.block, x)[0, 3], "product of 1")
    block.router[...] = jnp.asarray([0.5, 0, 0, 0])
    close(ran(block, x)[0, 3] - 1, (y[0, 3] - 1) / 2, "product of 1/2")


def test_depth_lets_about_its_share_through_at_the_start():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1024, WIDTH)), jnp.float32)
    block = built(depth.Config(residual.Config(PARTS[1]), capacity=0.25))

    @jax.jit
    def passed(x):
        with auxiliary.collecting() as found:
            block(x)
        return found["metrics"]["depth_passed"][0]

    assert 0.2 < float(passed(x)) <= 0.25


def test_depth_computes_on_its_share_alone():
    block = built(depth.Config(residual.Config(PARTS[1]), capacity=0.25))
    seen = []
    program = jax.make_jaxpr(lambda x: block(x)[0])(stream(length=40))
    for equation in program.eqns:
        seen += [v.aval.shape for v in equation.outvars if len(v.aval.shape) == 3]
    assert (2, 10, WIDTH) in seen


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (heads.Config((PARTS[0],)), "mixers holds 1 mixer; heads in parallel need at least 2."),
        (looped.Config(residual.Config(PARTS[0]), times=0), "times=0 must be at least 1."),
        (hyper_connections.Config(PARTS, streams=1), "streams=1 must be at least 2"),
        (depth.Config(residual.Config(PARTS[0]), capacity=0.0), "capacity=0.0 must be from 1/64"),
        (depth.Config(residual.Config(PARTS[0]), capacity=1.0), "capacity=1.0 must be from 1/64"),
        (ladder.Config(()), "a block holds no mixer"),
        (reversible.Config(()), "a block holds no mixer"),
        (shared.Config(residual.Config(PARTS[0]), ()), "blocks is empty"),
        (yoco.Config((PARTS[0],), PARTS[1], above=0), "above=0 must be at least 1"),
        (yoco.Config((PARTS[0],), PARTS[1], heads=4, kv_heads=3), "kv_heads=3 does not divide"),
    ],
)
def test_refusals(config, line):
    with pytest.raises(ValueError) as error:
        built(config)
    assert line in str(error.value) and "\n" not in str(error.value)
