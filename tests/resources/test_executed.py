"""Executed FLOPs of whole models against hand counts; formulas are typed in here alone.

Contractions must agree to the last one, all arithmetic within 1 %. A hand count follows what runs
on a CPU: attention over the visible pairs of blocks, recurrences by chunks, experts by tiles of
rows, long convolutions by transforms of blocks. With C tokens a chunk and matrices of state K x V

    chunk = pairs within it (C C K and C C V products) + reads and writes of the state (2 C K V)
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from models import lm
from models.attention import softmax
from models.block import residual
from models.channel import dropless
from models.convolution import hyena
from models.delta import gated_deltanet
from models.linear_attention import gla
from models.recurrent import rg_lru
from models.state_space import mamba2
from resources.compute import Flops, executed_flops, model_flops, xla_flops

BATCH, LENGTH, WIDTH, WORDS, DEPTH = 2, 1024, 512, 256, 4


class Hand(NamedTuple):
    """One mixer, FLOPs per token."""

    forward: float  # contractions
    backward: float  # contractions of the backward pass, with what it computes again by itself
    last: float  # of `forward`: what only the residual stream reads, so no gradient needs it again
    arithmetic: float  # other floating-point operations of the forward pass


def attention(config: softmax.Config) -> Hand:
    """Blocks of 128 tokens. Forward q k and p v; backward q k again, dp, dq, dk and dv."""
    heads, key, block = config.heads, WIDTH // config.heads, 128
    back = LENGTH if not config.window else config.window + block - 1  # tokens that a block sees
    blocks = LENGTH // block
    visits = sum(min(i + 1, -(-back // block)) for i in range(blocks)) / blocks
    pairs = visits * block  # a token
    projections = 8 * WIDTH**2
    return Hand(
        projections + heads * pairs * 2 * 2 * key,
        2 * projections + heads * pairs * 5 * 2 * key,
        2 * WIDTH**2,
        # rotary turns; subtract, scale, maximum and sum of a score; the sum of each visit; divide
        3 * 2 * WIDTH + 4 * heads * pairs + 2 * visits * WIDTH + WIDTH,
    )


def gated_linear_attention(config: gla.Config) -> Hand:
    """Chunks of 32 tokens: only visible pairs form scores, as halves of halves meet at an edge."""
    heads, chunk, rank = config.heads, 32, config.gate_rank
    value = WIDTH // heads
    key = value // 2
    projections = 2 * WIDTH * heads * (2 * key + 3 * value) + 2 * rank * (WIDTH + heads * key)
    scores, below = key * (chunk + 1), key * (chunk - 1)  # 2 a pair and key dimension
    forward = scores + 2 * chunk * value + 4 * key * value
    backward = (
        scores  # again
        + 2 * below  # of q and of k
        + 2 * 2 * chunk * value  # of the scores and of v
        + 4 * 2 * key * value  # of a read and of a write, two each
        + 2 * key * (chunk + 1 + value / chunk)  # sums of the gates' gradients
    )
    levels = math.log2(chunk)
    arithmetic = (
        key * (levels + 3)  # decays of q and k at each level and of the whole chunk, scale
        + 9 * key  # bias, log of the sigmoid (7), temperature
        + (1 + 6) * value  # two parts of the output; norm and gate
        + 2 * key * value / chunk  # the state decays and is added to
    )
    return Hand(
        projections + heads * forward,
        2 * projections + heads * backward,
        2 * heads * value * WIDTH,
        heads * arithmetic,
    )


def inverse(chunk: int, base: int = 8) -> float:
    """Of a unit triangular matrix a row: series in blocks of 8, then halves two products each."""
    series = 2 * (math.log2(base) - 1) * 2 * base**2
    halves = sum(2 * half**2 for half in (base * 2**i for i in range(10)) if half < chunk)
    return series + halves


BETWEEN = 4 * 2  # sums of gradients over the gates that stand between two tokens: C products each


def gated_delta_rule(config: gated_deltanet.Config) -> Hand:
    """Chunks of 32 tokens in the WY form, whose inverse is a sequence of products."""
    heads, chunk = config.heads, 32
    key = 3 * WIDTH // heads // 4
    value = 2 * key
    projections = 2 * WIDTH * heads * (2 * key + 3 * value + 2)
    gates = 2 * 2 * chunk  # sums in two parts
    pieces = gates + 2 * 2 * chunk * key + 2 * key * value + inverse(chunk) + 2 * chunk * value
    forward = pieces + 2 * 2 * key * value + 2 * chunk * value
    backward = (
        pieces  # again
        + 4 * 2 * chunk * value  # du, dr, d of the triangle, d of the scores
        + 3 * 2 * chunk * key  # of q, and two of k
        + 6 * 2 * key * value  # of what leaves, was read twice (q, k) and enters (q, k), and k's
        + 2 * (3 * value + chunk + key)  # of beta and of the gates, row by row
        + 2 * key * value / chunk
        + BETWEEN * chunk
    )
    taps = (2 * config.conv - 1 + 1) * (2 * key + value)
    arithmetic = (
        taps
        + 3 * 2 * key  # norms of q and k
        + key  # scale
        + 8 * chunk  # decays (4), without the diagonal, and three products with scores
        + 6 * value  # error, beta, read, write
        + 2 * key * value / chunk
        + 6 * value  # norm and gate
    )
    return Hand(
        projections + heads * forward,
        2 * projections + heads * backward,
        2 * heads * value * WIDTH,
        heads * arithmetic,
    )


def state_space_duality(config: mamba2.Config) -> Hand:
    """Chunks of 64 tokens; all heads share the scores, their values lie beside each other."""
    inner, state, chunk = config.expand * WIDTH, config.state, 64
    heads = inner // config.head_dim
    projections = 2 * WIDTH * (3 * inner + 2 * state + heads)
    gates = 2 * 2 * chunk * heads
    shared, own, states = 2 * chunk * state, 2 * chunk * inner, 2 * state * inner
    backward = (
        (gates + shared)  # again
        + 2 * shared  # of q and of k
        + 2 * own  # of the scores and of v
        + 5 * states  # of a read and of a write two each, and the read again
        + 2 * 2 * inner  # rows of reads and writes, for the gates
        + states / chunk
        + BETWEEN * chunk * heads
    )
    taps = (2 * config.conv - 1 + 1 + 1) * (inner + 2 * state)
    arithmetic = (
        taps
        + 5 * chunk * heads  # decays (4) times scores
        + 12 * inner  # dt, write, read (2), skip (2), gate (2), norm (4)
        + state  # scale
        + 2 * state * inner / chunk
    )
    return Hand(
        projections + gates + shared + own + 2 * states,
        2 * projections + backward,
        2 * inner * WIDTH,
        arithmetic,
    )


def gated_recurrence(config: rg_lru.Config) -> Hand:
    """Griffin's recurrence: two numbers a channel; the rest are maps."""
    projections = 6 * WIDTH**2 + 2 * 2 * WIDTH * (WIDTH // config.blocks)
    taps = 2 * config.conv - 1 + 1
    gates, entry, gelu = 2 + 1, 2 + 2, 8
    arithmetic = WIDTH * (taps + gates + entry + 2 + gelu + 1)
    return Hand(projections, 2 * projections, 2 * WIDTH**2, arithmetic)


def experts(config: dropless.Config) -> Hand:
    """Tiles of 256 rows, as many as the worst choices need; three matrices an expert."""
    tokens, tile = BATCH * LENGTH, 256
    rows = tokens * config.top_k
    tiles = (rows + config.experts * (tile - 1)) // tile
    assert tiles * tile > 1.4 * rows  # that is what this form costs
    products = 3 * 2 * tiles * tile * WIDTH * config.hidden / tokens
    router, combine = 2 * WIDTH * config.experts, 2 * config.top_k * WIDTH
    return Hand(
        products + router + combine,
        2 * products + 2 * router + 1.5 * combine,  # of the rows: a product without a sum
        combine,
        2 * config.top_k * config.hidden + 4 * config.experts,
    )


def transform(points: int) -> float:
    """A real transform: half of 5 N log2 N."""
    return 2.5 * points * math.log2(points)


def blocks_of(size: int) -> float:
    """How many blocks of `size` tokens a row adds to the blocks after them, by token."""
    return (LENGTH // (2 * size)) / LENGTH


def filters(config: hyena.Config) -> float:
    """The network of sines, once a lag for all rows."""
    hidden, features = config.filter_hidden, 1 + 2 * config.filter_bands
    return 2 * hidden * (features + 2 * hidden + config.order * WIDTH) / BATCH


def hyena_operator(config: hyena.Config) -> Hand:
    """Blocks of 16, 32 ... 512 tokens and 16 taps: each block's transform, its filter's, back."""
    projections = 2 * WIDTH**2 * (config.order + 2)
    sizes = [2**i for i in range(4, 10)]
    rows = sum(transform(2 * size) * blocks_of(size) for size in sizes)  # one way, a channel
    once = sum(transform(2 * size) for size in sizes) / (BATCH * LENGTH)
    channels = config.order * WIDTH
    spectra = sum((6 + 2) * (size + 1) * blocks_of(size) + 1 for size in sizes)
    arithmetic = (
        channels * (2 * 16 - 1 + spectra + 1 + 2 + 1)  # taps, spectra, their sum, skip, gate
        + (config.order + 1) * WIDTH * (2 * config.conv - 1 + 1)
        + channels / BATCH  # the filters' windows
    )
    # The gradient of the maps needs the inputs' for all but the features.
    first = 2 * config.filter_hidden * (1 + 2 * config.filter_bands) / BATCH
    return Hand(
        projections + filters(config) + channels * (2 * rows + once),
        2 * projections + 2 * filters(config) - first + channels * (3 * rows + 2 * once),
        2 * WIDTH**2,
        arithmetic,
    )


MIXERS = {
    "attention": (softmax.Config(heads=8), attention),
    "window": (softmax.Config(heads=8, window=128), attention),
    "gla": (gla.Config(), gated_linear_attention),
    "gated_deltanet": (gated_deltanet.Config(), gated_delta_rule),
    "mamba2": (mamba2.Config(), state_space_duality),
    "rg_lru": (rg_lru.Config(), gated_recurrence),
    "moe": (dropless.Config(hidden=768), experts),
    "hyena": (hyena.Config(), hyena_operator),
}
each_mixer = pytest.mark.parametrize("name", MIXERS)


def model(name: str, **settings: Any) -> lm.Config:
    """Four layers of one mixer alone."""
    pattern = (residual.Config(MIXERS[name][0]),)
    sizes = {"vocabulary": WORDS, "width": WIDTH, "depth": DEPTH}
    return lm.Config(pattern=pattern, dtype="float32", **sizes, **settings)


def loss_of(config: lm.Config, batch: int = BATCH, length: int = LENGTH):
    """The loss as a plain function, and shapes for its arguments."""
    graph, params = nnx.split(nnx.eval_shape(lambda: config.build(nnx.Rngs(0))))

    def loss(params, tokens):
        return nnx.merge(graph, params).loss(tokens, tokens, jnp.ones(tokens.shape))[0]

    return loss, nnx.to_pure_dict(params), jax.ShapeDtypeStruct((batch, length), jnp.int32)


@functools.cache
def executed(name: str, kind: str) -> Flops:
    """Of one batch: kind forward, gradient, or remat, a gradient with the blocks computed again."""
    loss, *shapes = loss_of(model(name, remat="blocks" if kind == "remat" else "none"))
    return executed_flops(jax.make_jaxpr(loss if kind == "forward" else jax.grad(loss))(*shapes))


def hand(name: str) -> Hand:
    config, count = MIXERS[name]
    return count(config)


HEAD = 2 * WIDTH * WORDS  # a token; its loss forms both gradients early
AROUND = 5 * WIDTH  # norm (4) and sum with the residual stream
LOSS = 4 * WIDTH + 3 * WORDS  # the last norm; maximum, subtraction and sum of the logits


def contractions(name: str, kind: str) -> float:
    """By hand, a token."""
    mixer = hand(name)
    if kind == "forward":
        return DEPTH * mixer.forward + HEAD
    again = mixer.forward - mixer.last if kind == "remat" else 0
    return DEPTH * (mixer.forward + mixer.backward + again) + 3 * HEAD


def arithmetic(name: str, kind: str) -> float:
    """By hand, a token: forward as written out, a gradient twice as much again."""
    once = DEPTH * (hand(name).arithmetic + AROUND) + LOSS
    return once * {"forward": 1, "gradient": 3, "remat": 4}[kind]


KINDS = [  # a gradient holds the forward pass: that alone is of every second mixer in the gate
    pytest.param(name, kind, marks=[pytest.mark.long] * (kind == "forward" and n % 2))
    for n, name in enumerate(MIXERS)
    for kind in ("forward", "gradient", "remat")
]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_executed_flops_equal_the_hand_count(name, kind):
    found, tokens = executed(name, kind), BATCH * LENGTH
    by_hand = contractions(name, kind)
    assert found.notes == set()
    assert found.matmul / tokens == pytest.approx(by_hand, rel=1e-12)
    assert found.total / tokens == pytest.approx(by_hand + arithmetic(name, kind), rel=0.01)
    if kind == "forward":
        assert found.elementwise / tokens == pytest.approx(arithmetic(name, kind), rel=0.03)


def test_experts_and_long_convolutions_need_less_than_runs():
    """Experts: each row meets its own matrices. Hyena: three transforms of twice the length."""
    tokens = BATCH * LENGTH
    needed = {n: model_flops(*loss_of(model(n))).total / tokens for n in ("moe", "hyena")}
    config = MIXERS["moe"][0]
    layer = 2 * WIDTH * (config.experts + config.top_k * (3 * config.hidden + 1))
    assert needed["moe"] == pytest.approx(DEPTH * layer + HEAD, rel=1e-12)
    assert 1.4 * needed["moe"] < executed("moe", "forward").total / tokens < 1.5 * needed["moe"]

    config = MIXERS["hyena"][0]
    points = 2 * LENGTH
    spectrum = 3 * points  # of half as many complex numbers, 6 a product
    long = (2 * transform(points) + spectrum) / LENGTH + transform(points) / tokens + 2
    taps = (config.order + 1) * 2 * config.conv
    maps = 2 * WIDTH**2 * (config.order + 2) + filters(config)
    layer = maps + WIDTH * (config.order * long + taps)
    assert needed["hyena"] == pytest.approx(DEPTH * layer + HEAD, rel=0.01)
    assert needed["hyena"] < 0.95 * executed("hyena", "forward").total / tokens


def by_xla(config: lm.Config, batch: int, length: int) -> tuple[float, float]:
    """(XLA's count, ours) of the compiled loss."""
    loss, *shapes = loss_of(config, batch, length)
    traced = jax.jit(loss).trace(*shapes)
    counted = xla_flops(traced.lower().compile())
    assert counted is not None
    return counted, executed_flops(traced.jaxpr).total


@each_mixer
def test_xla_counts_less_than_half_where_layers_are_scanned(name):
    counted, ours = by_xla(model(name), BATCH, LENGTH)
    tokens, whole = BATCH * LENGTH, contractions(name, "forward") + arithmetic(name, "forward")
    print(f"{name}: by hand {whole:.4g}, executed {ours / tokens:.4g}, XLA {counted / tokens:.4g}")
    assert ours / tokens == pytest.approx(whole, rel=0.01)
    assert counted < 0.5 * ours


UNREAD = {  # the write of a last state that nothing reads: XLA drops it where nothing loops
    "attention": 0,
    "rg_lru": 0,
    "gla": 2 * WIDTH * WIDTH // 4 // 2,
    "gated_deltanet": 2 * (3 * WIDTH // 4) * 2 * (3 * WIDTH // 4) // 4,
    "mamba2": 2 * 128 * 2 * WIDTH,
}


@pytest.mark.parametrize("name", UNREAD)
def test_xla_counts_the_same_where_nothing_loops(name):
    """One block or one chunk a row, layers apart; XLA also counts the selection of elements."""
    counted, ours = by_xla(model(name, layers="unrolled"), 64, 32)
    assert counted + DEPTH * 64 * 32 * UNREAD[name] == pytest.approx(ours, rel=0.01)
