"""Every implementation of every operation against its reference in float64.

`tests/operations.py` finds the operations and says what one needs. TPU kernels run in Pallas'
interpreter.
"""

import functools
import inspect

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from kernels import dispatch, setting
from tests.operations import (
    BATCH,
    CASES,
    OPERATIONS,
    assert_matches_reference,
    draw,
    draw_cotangents,
    evaluate,
    is_floating,
    layouts,
    output_shapes,
    pack,
    parts,
    program,
    public,
    split,
    takes_segments,
    token_arguments,
)
from tests.tolerance import assert_close

LENGTHS = (1, 3, 63, 64, 130)
DTYPES = ("float32", "bfloat16")
SHAPES = [(length, dtype) for length in LENGTHS for dtype in DTYPES]
# A shape is a program to compile: the normal run pairs lengths with types and reads rows of whole
# chunks in float64 alone, `long` crosses them.
PAIRED = [(130, "float32"), (1000, "float32"), (1, "bfloat16"), (63, "bfloat16")]
INTERPRETED = [(130, "float32"), (1000, "float32"), (3, "bfloat16")]  # seconds each


@pytest.fixture(autouse=True)
def interpreter():
    with setting.interpreting():
        yield


def together(cases: list[tuple[str, str]]) -> list:
    """The cases of an operation stay in one worker process: they share compiled programs."""
    return [pytest.param(*case, marks=pytest.mark.xdist_group(case[0])) for case in cases]


each_case = pytest.mark.parametrize(("operation", "impl"), together(CASES))
# What the kernels of an operation share is asked of one form, in `long` of all.
one_form = pytest.mark.parametrize(
    ("operation", "impl"),
    [
        pytest.param(
            *case.values, marks=[*case.marks, *[pytest.mark.long] * (case.values[1] != "xla")]
        )
        for case in together(CASES)
    ],
)


def is_long(impl: str, length: int, dtype: str) -> bool:
    return (length, dtype) not in (INTERPRETED if impl == "pallas_tpu" else PAIRED)


def shaped_cases(shapes: list[tuple[int, str]]) -> list:
    """Every case at every shape, those outside of the normal run marked so."""
    return [
        pytest.param(
            *case,
            *shape,
            marks=[pytest.mark.xdist_group(case[0])]
            + [pytest.mark.long] * is_long(case[1], *shape),
        )
        for case in CASES
        for shape in shapes
    ]


each_packed_case = pytest.mark.parametrize(
    ("operation", "impl"), together([case for case in CASES if takes_segments(case[0])])
)


def test_there_is_something_to_test():
    assert CASES


@pytest.mark.parametrize("operation", OPERATIONS)
def test_cases_keep_their_contract(operation):
    for length in (1, 5):
        for dtype in DTYPES:
            kinds = []
            for seed, extreme in ((0, False), (1, False), (2, True)):
                drawn = draw(operation, length, dtype, seed=seed, extreme=extreme)
                assert "segments" not in drawn and "impl" not in drawn
                assert set(drawn) <= set(inspect.signature(public(operation)).parameters)
                floating = {n: v for n, v in drawn.items() if is_floating(v)}
                assert {v.dtype.name for v in floating.values()} <= {dtype, "float32"}
                assert dtype in {v.dtype.name for v in floating.values()}
                assert all(np.isfinite(v.astype(np.float64)).all() for v in floating.values())
                kinds.append({n: getattr(v, "shape", v) for n, v in drawn.items()})
            assert kinds[0] == kinds[1] == kinds[2], "shapes depend on more than batch and length."


@pytest.mark.parametrize(("operation", "impl", "length", "dtype"), shaped_cases(SHAPES))
def test_matches_reference(operation, impl, length, dtype):
    for extreme in (False, True):
        arguments = draw(operation, length, dtype, seed=length, extreme=extreme)
        assert_matches_reference(operation, impl, arguments, dtype)
        if takes_segments(operation):
            for segments in layouts(length):
                assert_matches_reference(operation, impl, arguments | {"segments": segments}, dtype)


@pytest.mark.parametrize(
    ("operation", "impl", "length", "dtype"), shaped_cases([(1000, dtype) for dtype in DTYPES])
)
def test_matches_reference_on_long_rows(operation, impl, length, dtype):
    arguments = draw(operation, length, dtype, seed=9)
    if takes_segments(operation):
        arguments["segments"] = np.asarray(
            [pack([-3, 300, 1, -7, 500, 189], 1000, 9), pack([900, -100], 1000, 9)], np.int32
        )
    assert_matches_reference(operation, impl, arguments, dtype)


@one_form
def test_float64_in_gives_float64_accuracy(operation, impl):
    """Tells a rounding error from a wrong formula."""
    for extreme in (False, True):
        arguments = draw(operation, 64, "float32", extreme=extreme)
        if takes_segments(operation):
            arguments["segments"] = layouts(64)[0]
        assert_matches_reference(operation, impl, arguments, "float64", wide=True)


@each_case
def test_the_same_call_gives_the_same_bits(operation, impl):
    arguments = draw(operation, 130, "float32")
    if takes_segments(operation):
        arguments["segments"] = layouts(130)[0]
    cotangents = draw_cotangents(output_shapes(operation, impl, arguments), 0)
    first, second = (evaluate(operation, impl, arguments, cotangents) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@each_packed_case
def test_padding_may_hold_anything(operation, impl):
    """Other numbers at padding change no bit of any output, nor of any other token's gradient."""
    arguments = draw(operation, 130, "float32", seed=3)
    other = draw(operation, 130, "float32", seed=4, extreme=True)
    arguments["segments"] = segments = layouts(130)[0]
    changed = dict(arguments)
    for name in token_arguments(operation):
        value = arguments[name]
        padding = (segments == 0).reshape(segments.shape + (1,) * (value.ndim - 2))
        changed[name] = np.where(padding, other[name], value)
    cotangents = draw_cotangents(output_shapes(operation, impl, arguments), 0)
    first = evaluate(operation, impl, arguments, cotangents)
    second = evaluate(operation, impl, changed, cotangents)
    jax.tree.map(np.testing.assert_array_equal, first, second)


@one_form
def test_eager_equals_jit(operation, impl):
    arguments = draw(operation, 130, "float32")
    if takes_segments(operation):
        arguments["segments"] = layouts(130)[0]
    cotangents = draw_cotangents(output_shapes(operation, impl, arguments), 0)
    compiled, _ = evaluate(operation, impl, arguments, cotangents)
    arrays = {n: jnp.asarray(v) if isinstance(v, np.ndarray) else v for n, v in arguments.items()}
    eager = jax.tree.leaves(public(operation)(**arrays, impl=impl))
    for position, (found, want) in enumerate(zip(eager, compiled, strict=True)):
        assert_close(found, want, "float32", f"output {position}")


@each_case
def test_a_batch_sharded_over_devices_gives_the_same(operation, impl):
    arguments = draw(operation, 130, "float32")
    larger = draw(operation, 130, "float32", batch=2 * BATCH)
    if takes_segments(operation):
        arguments["segments"] = layouts(130)[0]
        larger["segments"] = np.concatenate([arguments["segments"]] * 2)
    cotangents = draw_cotangents(output_shapes(operation, impl, arguments), 0)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(name, value):
        if not isinstance(value, np.ndarray):
            return value
        dims = [
            "data" if a != b else None for a, b in zip(value.shape, larger[name].shape, strict=True)
        ]
        spec = jax.sharding.PartitionSpec(*dims)
        return jax.device_put(value, jax.sharding.NamedSharding(mesh, spec))

    variables, constants, settings = split(operation, arguments)
    placed = [{n: place(n, v) for n, v in group.items()} for group in (variables, constants)]
    with jax.set_mesh(mesh), setting.layout(batch=("data",)):
        outputs, gradients = program(operation, impl, settings)(*placed, cotangents)
    expected, slopes = evaluate(operation, impl, arguments, cotangents)
    for position, (found, want) in enumerate(zip(outputs, expected, strict=True)):
        assert_close(found, want, "float32", f"output {position}")
    for name, want in slopes.items():
        assert_close(gradients[name], want, "float32", f"gradient of {name}")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_unknown_implementation_raises_and_names_the_known(operation):
    drawn = draw(operation, 3, "float32")
    arrays = {n: jnp.asarray(v) if isinstance(v, np.ndarray) else v for n, v in drawn.items()}
    with pytest.raises(ValueError, match="has no implementation 'fastest'") as error:
        public(operation)(**arrays, impl="fastest")
    for impl in dispatch.implementations(*parts(operation)):
        assert impl in str(error.value)


runs = st.lists(st.one_of(st.integers(1, 70), st.integers(-9, -1)), min_size=1, max_size=8)
random_case = hypothesis.given(
    shape=st.sampled_from(SHAPES),
    extreme=st.booleans(),
    rows=st.none() | st.lists(runs, min_size=BATCH, max_size=BATCH),
    numbers=st.integers(2, 5),
    seed=st.integers(0, 2**32 - 1),
)


def check_random_case(operation, impl, shape, extreme, rows, numbers, seed):
    length, dtype = shape
    arguments = draw(operation, length, dtype, seed=seed, extreme=extreme)
    if rows is not None and takes_segments(operation):
        packed = [pack(row, length, numbers) for row in rows]
        arguments["segments"] = np.asarray(packed, np.int32)
    assert_matches_reference(operation, impl, arguments, dtype, seed=seed)


repeatable = functools.partial(
    hypothesis.settings,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)


@each_case
@repeatable(max_examples=40)
@random_case
def test_random_cases_match_reference(operation, impl, **case):
    """The programs are those of `test_matches_reference`: no shape class is compiled twice."""
    if is_long(impl, *case["shape"]):
        quick = [shape for shape in SHAPES if not is_long(impl, *shape)]
        case["shape"] = quick[case["seed"] % len(quick)]
    check_random_case(operation, impl, **case)


@pytest.mark.long
@each_case
@repeatable(max_examples=2000)
@random_case
def test_many_random_cases_match_reference(operation, impl, **case):
    check_random_case(operation, impl, **case)
