"""Every operation of the kernels: its cases, random arguments, compiled programs, its comparison.

Operations are found by the `draw` functions of kernels/<folder>/cases.py: `draw` serves the public
function named like the folder, `draw_<function>` another one, here called "<folder>.<function>".
Implementations are the modules beside it. Nothing is named here, so a new folder is tested as soon
as it exists. What an operation needs:

- `kernels/<folder>/__init__.py` exports the function; it takes `impl`, and `segments` if it packs;
- `draw(rng, *, batch, length, dtype, extreme=False)` returns its keyword arguments, without
  segments, as NumPy arrays whose shapes depend on batch and length alone;
- `cases.NO_GRADIENT`, optional: names of floating arguments without a gradient;
- `cases.NO_GRADIENT_OUTPUTS`, optional: positions of outputs through which no gradient flows.
"""

import functools
import importlib
import inspect
import types
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kernels import dispatch
from tests.tolerance import TOLERANCE, assert_close, rms

FOLDER = Path(dispatch.__file__).parent


def find_operations() -> list[str]:
    found = []
    for folder in sorted(path.parent.name for path in FOLDER.glob("*/cases.py")):
        names = vars(importlib.import_module(f"kernels.{folder}.cases"))
        others = (n.removeprefix("draw_") for n in names if n.startswith("draw_"))
        found += [folder, *(f"{folder}.{other}" for other in others)]
    return found


def parts(operation: str) -> tuple[str, str]:
    """(folder, function)."""
    folder, _, function = operation.partition(".")
    return folder, function or folder


OPERATIONS = find_operations()
CASES = [
    (operation, impl)
    for operation in OPERATIONS
    for impl in dispatch.implementations(*parts(operation))
    if impl != "ref"
]
BATCH = 2
Arguments = dict[str, np.ndarray]


def public(operation: str) -> Callable:
    folder, function = parts(operation)
    return getattr(importlib.import_module(f"kernels.{folder}"), function)


def cases(operation: str) -> types.ModuleType:
    return importlib.import_module(f"kernels.{parts(operation)[0]}.cases")


def takes_segments(operation: str) -> bool:
    return "segments" in inspect.signature(public(operation)).parameters


def is_floating(value) -> bool:
    return isinstance(value, np.ndarray) and jnp.issubdtype(value.dtype, jnp.floating)


def draw(operation: str, length: int, dtype: str, *, seed=0, extreme=False, batch=BATCH) -> dict:
    rng = np.random.default_rng(seed)
    drawer = "_".join(["draw", *operation.split(".")[1:]])
    return getattr(cases(operation), drawer)(
        rng, batch=batch, length=length, dtype=jnp.dtype(dtype), extreme=extreme
    )


def pack(runs: Sequence[int], length: int, numbers: int) -> list[int]:
    """A row of documents (positive runs) and padding (negative runs), repeated until it is full.

    Documents are numbered 1 to `numbers` over and over: a number that comes back is a new document.
    """
    row, document = [], 0
    while len(row) < length:
        for run in runs:
            row += [document % numbers + 1 if run > 0 else 0] * abs(run)
            document += run > 0
    return row[:length]


def layouts(length: int) -> list[np.ndarray]:
    """Segments (BATCH, length) that cover the ways to pack a row."""
    ends = [-2, 5, 1, -3, 9, 2, max(length - 30, 1), -200]
    chunk_edges = [16, 16, 32, 64, 1, 1, -200]
    pairs = [
        (pack(ends, length, 1000), pack(chunk_edges, length, 1000)),
        (pack([1], length, 2), pack([7, -1], length, 3)),
        (pack([-200], length, 1), pack([200], length, 1)),
    ]
    return [np.asarray(pair, np.int32) for pair in pairs]


@functools.cache
def program(operation: str, impl: str, settings: tuple) -> Callable:
    """Compiled value and gradients, as a function of variables, constants and cotangents."""
    function = functools.partial(public(operation), impl=impl, **dict(settings))
    blocked = getattr(cases(operation), "NO_GRADIENT_OUTPUTS", ())

    def cotangent(position, output, value):
        if not jnp.issubdtype(output.dtype, jnp.floating):
            return np.zeros(output.shape, jax.dtypes.float0)
        return jnp.zeros_like(output) if position in blocked else value.astype(output.dtype)

    def run(variables, constants, cotangents):
        outputs, pullback = jax.vjp(lambda given: function(**given, **constants), variables)
        leaves, tree = jax.tree.flatten(outputs)
        pairs = zip(leaves, cotangents, strict=True)
        given = [cotangent(n, leaf, value) for n, (leaf, value) in enumerate(pairs)]
        return leaves, pullback(jax.tree.unflatten(tree, given))[0]

    # The reference runs a few times a program, so that most of its cost would be compilation.
    hurried = {"xla_backend_optimization_level": 0} if impl == "ref" else None
    return jax.jit(run, compiler_options=hurried)


def split(operation: str, arguments: dict) -> tuple[Arguments, Arguments, tuple]:
    """Arguments to differentiate, arrays to leave alone, and settings that are no arrays."""
    constant = getattr(cases(operation), "NO_GRADIENT", ())
    arrays = {name: value for name, value in arguments.items() if isinstance(value, np.ndarray)}
    settings = {name: value for name, value in arguments.items() if name not in arrays}
    variables = {n: v for n, v in arrays.items() if is_floating(v) and n not in constant}
    constants = {n: v for n, v in arrays.items() if n not in variables}
    return variables, constants, tuple(sorted(settings.items()))


def output_shapes(operation: str, impl: str, arguments: dict) -> list[jax.ShapeDtypeStruct]:
    variables, constants, settings = split(operation, arguments)
    function = functools.partial(public(operation), impl=impl, **dict(settings))
    return jax.tree.leaves(jax.eval_shape(lambda a: function(**a), variables | constants))


def draw_cotangents(outputs: Sequence[jax.ShapeDtypeStruct], seed: int) -> list[np.ndarray]:
    """Random, and rounded as the outputs are, so that the reference gets the same numbers."""
    rng = np.random.default_rng([seed, 1])
    floating = [jnp.issubdtype(output.dtype, jnp.floating) for output in outputs]
    dtypes = [o.dtype if f else np.float32 for o, f in zip(outputs, floating, strict=True)]
    return [rng.normal(size=o.shape).astype(d) for o, d in zip(outputs, dtypes, strict=True)]


def to_float64(arrays):
    return jax.tree.map(lambda x: x.astype(np.float64) if is_floating(x) else x, arrays)


def evaluate(operation: str, impl: str, arguments: dict, cotangents: list, *, wide=False):
    """(outputs, gradients by name) as NumPy arrays; in float64 throughout if `wide`."""
    variables, constants, settings = split(operation, arguments)
    given = (variables, constants, cotangents)
    with jax.enable_x64(wide):
        found = program(operation, impl, settings)(*(to_float64(given) if wide else given))
        return jax.tree.map(np.asarray, found)


@functools.cache
def token_arguments(operation: str) -> frozenset[str]:
    """Names of the arguments whose second axis is time."""
    short, long = (draw(operation, length, "float32") for length in (5, 6))
    arrays = [name for name, value in short.items() if isinstance(value, np.ndarray)]
    return frozenset(n for n in arrays if short[n].shape[1:2] != long[n].shape[1:2])


def assert_padding_is_silent(operation, segments, outputs, gradients) -> None:
    """The first output, if it is one value a token, and gradients of tokens are zero at padding."""
    padding = segments == 0
    values = {
        f"gradient of {n}": gradients[n] for n in gradients if n in token_arguments(operation)
    }
    if outputs[0].shape[:2] == padding.shape:
        values["output"] = outputs[0]
    for what, value in values.items():
        assert not np.any(value[padding].astype(np.float64)), f"{what} at padding is not zero."


def negligible(operation, arguments, cotangents, outputs) -> dict[str, float]:
    """For every argument, a norm of its gradient below which cancellation may end.

    With ||loss|| = sum ||cotangent|| ||output||, a gradient of norm ||loss|| / ||argument|| says
    that changing the argument by a fraction changes the loss by no more than that fraction of it.
    A twentieth of it hardly matters: the keys of a softmax that sees one key have gradient zero.
    """
    blocked = getattr(cases(operation), "NO_GRADIENT_OUTPUTS", ())
    pairs = [
        (slope, value)
        for position, (slope, value) in enumerate(zip(cotangents, outputs, strict=True))
        if position not in blocked and jnp.issubdtype(value.dtype, jnp.floating)
    ]
    loss = sum(norm(slope) * norm(value) for slope, value in pairs)
    variables, _, _ = split(operation, arguments)
    return {name: 0.05 * loss / max(norm(v), 1e-30) for name, v in variables.items()}


def usual(operation: str, arguments: dict, seed: int) -> dict[str, float]:
    """For every argument, the median norm of its gradient under other random cotangents.

    A gradient that sums a few terms may nearly vanish by chance: its error is that of the terms.
    """
    shapes = output_shapes(operation, "ref", arguments)
    others = [draw_cotangents(shapes, seed + n) for n in range(1, 10)]
    found = [evaluate(operation, "ref", arguments, other, wide=True)[1] for other in others]
    return {name: float(np.median([norm(one[name]) for one in found])) for name in found[0]}


def norm(array: np.ndarray) -> float:
    return float(np.linalg.norm(array.astype(np.float64)))


def assert_matches_reference(operation, impl, arguments, dtype, *, seed=0, wide=False) -> None:
    """Value and every gradient of one set of arguments, within the limit of `dtype`."""
    shapes = output_shapes(operation, "ref", arguments)
    cotangents = draw_cotangents(shapes, seed)
    outputs, gradients = evaluate(operation, impl, arguments, cotangents, wide=wide)
    expected, slopes = evaluate(operation, "ref", arguments, cotangents, wide=True)
    if not wide:
        assert [o.dtype for o in outputs] == [s.dtype for s in shapes]
    for position, (found, want) in enumerate(zip(outputs, expected, strict=True)):
        assert_close(found, want, dtype, f"output {position}")
    least = negligible(operation, arguments, cotangents, expected)
    for name, want in slopes.items():
        size = least[name]
        if rms(gradients[name], want, size) > TOLERANCE[dtype]:
            size = max(size, usual(operation, arguments, seed)[name])
        assert_close(gradients[name], want, dtype, f"gradient of {name}", size)
    if arguments.get("segments") is not None:
        assert_padding_is_silent(operation, arguments["segments"], outputs, gradients)
