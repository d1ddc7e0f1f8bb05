"""The TPU kernels of gated linear attention: heads of a program, chunks, costs, limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import setting
from kernels.gated_linear import gated_linear, pallas_tpu
from tests.kernels.crossed import crossed
from tests.kernels.launches import costs
from tests.kernels.test_gated_linear import assert_same, evaluate, evaluate_exactly, slopes


def draw_wide(gate, dtype, *, length, groups, heads, key, value):
    """Heads of which a TPU program takes some, as in a model."""
    rng = np.random.default_rng(0)
    shapes = {
        "q": (1, length, groups, key),
        "k": (1, length, groups, key),
        "v": (1, length, heads, value),
        "log_decay": (1, length, heads, key) if "vector" in gate else (1, length, heads),
        "initial_state": (1, heads, key, value),
    }
    if "bonus" in gate:
        shapes["bonus"] = (heads, key)
    arrays = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    arrays["log_decay"] = -np.logaddexp(0, -arrays["log_decay"] - 2)
    wide = ("log_decay", "bonus", "initial_state")
    return {n: x.astype("float32" if n in wide else jnp.dtype(dtype)) for n, x in arrays.items()}


SIZES = {
    "parts share q and k": (1, 8, 128, 64),
    "a head a program": (2, 4, 128, 256),
    "some groups a program": (8, 8, 32, 32),
    "odd widths": (12, 12, 12, 12),
}


@pytest.mark.parametrize(
    ("gate", "size"),
    crossed(
        ["scalar, bonus", "vector"],
        list(SIZES),
        gate=[
            ("scalar, bonus", "parts share q and k"),
            ("vector", "a head a program"),
            ("vector", "some groups a program"),
            ("scalar, bonus", "odd widths"),
        ],
    ),
)
def test_tpu_programs_of_some_heads_give_the_same(gate, size):
    groups, heads, key, value = SIZES[size]
    arguments = draw_wide(
        gate, "float32", length=20, groups=groups, heads=heads, key=key, value=value
    )
    room = pallas_tpu.VECTOR if gate == "vector" else pallas_tpu.SCALAR
    assert pallas_tpu.heads_together(groups, heads, key, value, room) < heads
    segments = np.asarray([[1] * 5 + [2] * 12 + [0] * 3], np.int32)
    with setting.interpreting():
        found = evaluate(arguments, slopes(arguments), segments, impl="pallas_tpu")
    assert_same(found, evaluate_exactly(arguments, slopes(arguments), segments))


@pytest.mark.parametrize(
    ("groups", "heads", "key", "value", "together"),
    [
        (16, 16, 64, 64, (4, 2)),
        (16, 16, 128, 128, (4, 2)),
        (8, 8, 256, 256, (2, 1)),
        (8, 8, 256, 512, (1, 1)),
        (1, 80, 128, 64, (4, 2)),
        (4, 16, 64, 64, (4, 2)),
        (4, 12, 64, 64, (3, 1)),  # whole groups of three, or one head: not two
        (2, 4, 12, 20, (4, 2)),
    ],
)
def test_heads_of_a_tpu_program_make_whole_blocks(groups, heads, key, value, together):
    rooms = (pallas_tpu.SCALAR, pallas_tpu.VECTOR)
    found = tuple(pallas_tpu.heads_together(groups, heads, key, value, room) for room in rooms)
    assert found == together


def test_short_rows_have_two_tpu_chunks():
    lengths = [pallas_tpu.chunk_length(n, 128) for n in (1, 8, 16, 17, 24, 64, 130, 256, 5000)]
    assert lengths == [8, 8, 8, 16, 16, 32, 128, 128, 128]
    assert pallas_tpu.chunk_length(5000, 64) == 64


@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_costs_of_tpu_launches_are_the_formulas(gate):
    """FLOPs of the products and bytes of the copies, per chunk, by hand."""
    length, heads, key, value = 512, 8, 64, 128
    arguments = draw_wide(
        gate, "bfloat16", length=length, groups=heads, heads=heads, key=key, value=value
    )
    forward, backward = costs(gated_linear, arguments)
    chunk, programs = 128, 2 if gate == "scalar" else 4
    count, square, state = length // chunk, chunk * chunk, key * value
    levels = 0 if gate == "scalar" else 7
    scores = 2 * square * key * (1 + levels)
    one = heads * (scores + 2 * square * value + 4 * chunk * state)
    two = heads * (scores + 4 * square * (key + value) + 10 * chunk * state)
    if gate == "scalar":
        sums = 4 * heads * square
        one, two = one + sums, two + sums + 6 * heads * square + 2 * heads * chunk
    else:  # q's and k's gradients at each level, no scores' own; sums over gates
        two += heads * (4 * square * key * (levels - 1) + 2 * square * key - 2 * chunk * state)
    assert forward.flops == count * one
    assert backward.flops == count * two

    marks = count * programs * 3 * chunk * 4
    tokens = 2 * length * heads * (2 * key + value)
    gates = 4 * length * heads * (1 if gate == "scalar" else key)
    once, entering, bonus = 4 * heads * state, 4 * heads * state * count, 4 * heads * key
    o = 2 * length * heads * value
    assert forward.bytes_accessed == marks + tokens + gates + bonus + 2 * once + entering + o
    assert backward.bytes_accessed == (
        marks + 2 * tokens + 2 * gates + 2 * bonus + 2 * once + entering + o
    )


@pytest.mark.parametrize(
    ("gate", "dtype", "key", "value", "message"),
    [
        ("scalar", "bfloat16", 1024, 512, r"key dim 1024 and value dim 512: .* 262144"),
        ("vector", "float32", 512, 512, r"key dim 512 and value dim 512: .* 131072"),
    ],
)
def test_states_too_large_for_the_tpu_kernel_are_named(gate, dtype, key, value, message):
    arguments = draw_wide(gate, dtype, length=3, groups=4, heads=4, key=key, value=value)
    with setting.interpreting(), pytest.raises(ValueError, match=message) as error:
        gated_linear(**jax.tree.map(jnp.asarray, arguments), impl="pallas_tpu")
    assert "\n" not in str(error.value) and "or use xla" in str(error.value)


def test_float64_on_a_tpu_is_named():
    with jax.enable_x64(True):
        tokens = [jnp.ones(shape) for shape in [(1, 3, 2, 8)] * 3 + [(1, 3, 2)]]
        message = "does not cover float64; the nearest dtype is float32"
        with pytest.raises(ValueError, match=message):
            pallas_tpu.gated_linear(*tokens)
    assert not pallas_tpu.uncovered("gated_linear", *(x.astype(jnp.float32) for x in tokens))
