"""Counts for real models against closed forms; formulas are typed in here and nowhere else."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from kernels import dispatch
from kernels.attention import attention
from kernels.delta_rule import delta_rule
from kernels.gated_linear import gated_linear
from kernels.linear_scan import linear_scan
from models import lm
from models.attention import softmax
from models.block import residual
from models.channel import glu
from models.delta import gated_deltanet
from models.linear_attention import gla
from models.mixer import state_bytes
from models.recurrent import rg_lru
from models.state_space import mamba2
from resources import memory
from resources.compute import Flops, executed_flops, model_flops

BATCH, LENGTH, WIDTH, HIDDEN, WORDS, DEPTH = 2, 96, 64, 160, 101, 3
TOKENS = BATCH * LENGTH


def attention_flops(config: softmax.Config) -> float:
    heads, groups = config.heads, config.kv_heads or config.heads
    key = WIDTH // heads
    pairs = sum(min(t + 1, config.window or LENGTH) for t in range(LENGTH)) / LENGTH
    projections = 2 * WIDTH * (2 * heads * key + 2 * groups * key)
    return projections + heads * pairs * 2 * (key + key)


def recurrence(key: int, value: int) -> int:
    """Of one head: decay, outer product and add on every entry of the state; read and scale."""
    return 3 * key * value + 2 * key * value + value


def gla_flops(config: gla.Config) -> float:
    heads, value, rank = config.heads, WIDTH // config.heads, config.gate_rank
    key = value // 2
    projections = 2 * WIDTH * heads * (2 * key + 2 * value) + 2 * heads * value * WIDTH
    gate = 2 * WIDTH * rank + 2 * rank * heads * key
    return projections + gate + heads * recurrence(key, value)


def convolution(channels: int, width: int, *, bias: bool, silu: bool) -> int:
    return channels * (2 * width - 1 + bias + silu)


def mamba2_flops(config: mamba2.Config) -> float:
    inner, state = config.expand * WIDTH, config.state
    heads, shared = inner // config.head_dim, 2 * config.groups * state
    projections = 2 * WIDTH * (2 * inner + shared + heads) + 2 * inner * WIDTH
    taps = convolution(inner + shared, config.conv, bias=True, silu=True)
    return projections + taps + heads * recurrence(state, config.head_dim)


def delta_flops(config: gated_deltanet.Config) -> float:
    """Decay, what the key held (K V multiply-adds), its replacement, the read."""
    heads = config.heads
    key = 3 * WIDTH // heads // 4
    value = 2 * key
    projections = 2 * WIDTH * heads * (2 * key + 2 * value + 2) + 2 * heads * value * WIDTH
    taps = convolution(heads * (2 * key + value), config.conv, bias=False, silu=True)
    step = key * value + 2 * key * value + 2 * key * value + 2 * key * value
    return projections + taps + heads * step


def rg_lru_flops(config: rg_lru.Config) -> float:
    projections = 2 * WIDTH * 2 * WIDTH + 2 * WIDTH * WIDTH
    gates = 2 * 2 * WIDTH * (WIDTH // config.blocks)
    taps = convolution(WIDTH, config.conv, bias=True, silu=False)
    return projections + gates + taps + 2 * WIDTH


MIXERS = [
    (softmax.Config(heads=4), attention_flops),
    (softmax.Config(heads=4, kv_heads=2, window=20), attention_flops),
    (gla.Config(heads=2, gate_rank=8), gla_flops),
    (mamba2.Config(head_dim=32, state=16), mamba2_flops),
    (gated_deltanet.Config(heads=2), delta_flops),
    (rg_lru.Config(), rg_lru_flops),
]
each_mixer = pytest.mark.parametrize(
    ("config", "formula"), MIXERS, ids=lambda x: getattr(x, "__module__", "").split(".")[-1]
)


def each_token(function, *args, impl: str) -> Flops:
    """Executed FLOPs of an operation's output per row, token and head (axes 0 to 2 of args[0])."""
    program = jax.make_jaxpr(lambda *args: jax.tree.leaves(function(*args, impl=impl))[0])(*args)
    found, tokens = Flops(), math.prod(args[0].shape[:3])
    found.include(executed_flops(program), 1 / tokens)
    return found


K, V = 32, 48
Q, VALUES, GATES = (jnp.ones((2, 512, 3, size)) for size in (K, V, 1))
SCALARS = -GATES[..., 0]


def test_executed_flops_of_the_references_equal_the_closed_form():
    attended = each_token(attention, Q, Q, VALUES, impl="ref")
    assert attended.matmul == 2 * 512 * (K + V)
    assert attended.transcendental == 512
    gated = each_token(gated_linear, Q, Q, VALUES, SCALARS, impl="ref")
    assert gated.total == pytest.approx(recurrence(K, V), rel=0.01)
    delta = each_token(delta_rule, Q, Q, VALUES, -SCALARS, SCALARS, impl="ref")
    assert delta.total == pytest.approx(7 * K * V + 3 * V, rel=0.01)
    for impl in ("ref", "xla"):
        assert each_token(linear_scan, Q[..., 0], SCALARS, impl=impl).total == 2


def test_executed_flops_of_chunks_equal_the_closed_form_of_one_length():
    """States cost 4 K V a token and head, pairs 2 C (K + V), sums of gates in two parts 4 C."""
    found = each_token(gated_linear, Q, Q, VALUES, SCALARS, impl="xla").matmul
    forms = [4 * K * V + 2 * chunk * (K + V) + 4 * chunk for chunk in (16, 32, 64, 128)]
    assert min(abs(found / form - 1) for form in forms) < 0.01


def model(config, **settings) -> lm.Config:
    return lm.Config(
        vocabulary=WORDS,
        width=WIDTH,
        depth=DEPTH,
        pattern=(residual.Config(config, glu.Config(hidden=HIDDEN)),),
        dtype="float32",
        **settings,
    )


def loss_of(config: lm.Config):
    """The loss as a plain function of weights, and abstract arguments for it."""
    graph, params = nnx.split(nnx.eval_shape(lambda: config.build(nnx.Rngs(0))))
    whole = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)

    def loss(params, tokens):
        weights = jnp.ones(tokens.shape, jnp.float32)
        return nnx.merge(graph, params).loss(tokens, tokens, weights)[0]

    return loss, nnx.to_pure_dict(params), whole


@each_mixer
def test_model_flops_equal_the_closed_form(config, formula):
    needed = model_flops(*loss_of(model(config))).total / TOKENS
    layer = formula(config) + 3 * 2 * WIDTH * HIDDEN
    assert needed == pytest.approx(DEPTH * layer + 2 * WIDTH * WORDS, rel=0.01)


@each_mixer
def test_layout_and_form_do_not_change_model_flops(config, formula):
    loss, params, tokens = loss_of(model(config))
    needed = model_flops(loss, params, tokens).total
    apart, weights, _ = loss_of(model(config, layers="unrolled", remat="blocks"))
    assert model_flops(apart, weights, tokens).total == needed
    with dispatch.using("xla"):
        assert model_flops(loss, params, tokens).total == needed


@each_mixer
def test_executed_flops_have_a_rule_for_everything(config, formula):
    loss, params, tokens = loss_of(model(config))
    needed = model_flops(loss, params, tokens).total
    forward = executed_flops(jax.make_jaxpr(loss)(params, tokens))
    train = executed_flops(jax.make_jaxpr(jax.grad(loss))(params, tokens))
    assert forward.notes == train.notes == set()
    assert 0.95 * needed < forward.total < 2 * needed  # heads that share q and k save a little
    assert 2.5 * needed < train.total < 7 * needed


# test_executed.py::test_executed_flops_equal_the_hand_count counts it to the last contraction.
@pytest.mark.long
@each_mixer
def test_remat_of_blocks_executes_one_more_forward(config, formula):
    plain, again = (
        executed_flops(jax.make_jaxpr(jax.grad(loss))(params, tokens)).matmul
        for loss, params, tokens in (loss_of(model(config, remat=r)) for r in ("none", "blocks"))
    )
    loss, params, tokens = loss_of(model(config))
    forward = executed_flops(jax.make_jaxpr(loss)(params, tokens)).matmul
    head = 2 * TOKENS * WIDTH * WORDS
    assert 0.5 * (forward - head) < again - plain < 1.1 * (forward - head)


def test_a_transformer_trains_at_six_flops_a_weight_and_token():
    """6 N D, and attention beside it; N without the embedding's look-up, with the tied head."""
    config = model(softmax.Config(heads=4))
    loss, params, tokens = loss_of(config)
    weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    vectors = (2 * DEPTH + 1) * WIDTH
    pairs = (LENGTH + 1) / 2
    expected = 6 * (weights - vectors) + 3 * DEPTH * pairs * 4 * WIDTH
    assert 3 * model_flops(loss, params, tokens).total / TOKENS == pytest.approx(expected, rel=0.01)


@each_mixer
@pytest.mark.parametrize("tokens", [1, 64, 1024])
def test_state_bytes_are_those_of_the_real_state(config, formula, tokens):
    def state():
        return model(config).build(nnx.Rngs(0)).init_state(1, tokens)

    size = sum(leaf.nbytes for leaf in jax.tree.leaves(jax.jit(state)()))
    assert memory.tree_bytes(state) == size
    segment = 4
    assert size == segment + DEPTH * state_bytes(config, WIDTH, tokens, jnp.float32)


@each_mixer
def test_only_unbounded_attention_grows_with_its_context(config, formula):
    sizes = [state_bytes(config, WIDTH, tokens) for tokens in (1024, 65536)]
    unbounded = isinstance(config, softmax.Config) and not config.window
    assert (sizes[1] > 60 * sizes[0]) if unbounded else (sizes[1] == sizes[0])


def test_a_window_bounds_the_state_at_its_size():
    config = softmax.Config(heads=4, window=100)
    sizes = {n: state_bytes(config, WIDTH, n) for n in (50, 100, 101, 4096)}
    assert sizes[50] < sizes[100] == sizes[101] == sizes[4096]
    full = dataclasses.replace(config, window=0)
    assert sizes[100] == state_bytes(full, WIDTH, 100)
