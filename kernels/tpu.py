"""What all Pallas TPU kernels share: the call with its cost, and the mesh."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels import setting, vary
from programs.flops import Walk

LANE = 128


def call(
    body: Callable,
    *arrays: Any,
    grid: tuple[int, ...],
    ins: Sequence[pl.BlockSpec],
    outs: Sequence[pl.BlockSpec],
    out_types: Sequence[jax.ShapeDtypeStruct],
    semantics: str,
    scratch: Sequence[Any] = (),
    lists: Sequence[np.ndarray | jax.Array] = (),
    copies: Sequence[int] = (),
    vmem: int = 0,
    name: str | None = None,
) -> tuple[jax.Array, ...]:
    """`pl.pallas_call` with its cost derived from the body, the grid and the blocks.

    `semantics` is a letter a grid axis: p (parallel) or a (arbitrary: in order, carries scratch).
    `lists` are int32 arrays read by scalars, handed to every index map after the grid indices
    (scalar prefetch); the body gets their refs first. Where a block follows a list that is known at
    run time alone, `copies` bounds how often it is copied, one number a block (inputs, then
    outputs); without it every step counts as one. `vmem` in bytes raises the compiler's limit.
    """
    arrays = vary.together(arrays)
    kind = jax.typeof(arrays[0]).manual_axis_type if vary.axes(arrays) else None
    shapes = [
        jax.ShapeDtypeStruct(o.shape, o.dtype, manual_axis_type=kind) if kind else o
        for o in out_types
    ]
    kinds = {"p": pltpu.PARALLEL, "a": pltpu.ARBITRARY}

    def build(cost):
        return pl.pallas_call(
            body,
            out_shape=shapes,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(lists),
                grid=grid,
                in_specs=ins,
                out_specs=outs,
                scratch_shapes=scratch,
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=tuple(kinds[letter] for letter in semantics),
                vmem_limit_bytes=vmem or None,
            ),
            cost_estimate=cost,
            interpret=setting.interpreter() or False,
            name=name or getattr(body, "__name__", None),
        )

    traced = jax.make_jaxpr(build(None))(*lists, *arrays)
    steps = math.prod(grid)
    bounds = copies or [steps] * (len(ins) + len(outs))
    blocks = zip((*ins, *outs), (*arrays, *shapes), bounds, strict=True)
    moved = sum(_bytes(spec, x, grid, lists, bound) for spec, x, bound in blocks)
    return tuple(build(_cost(traced, steps, moved))(*lists, *arrays))


def _cost(traced, steps: int, moved: int) -> pl.CostEstimate:
    """Of a traced call whose `steps` steps move `moved` bytes.

    Kernels with matrix products are counted by those, as papers do.
    """
    (eqn,) = (e for e in traced.jaxpr.eqns if e.primitive.name == "pallas_call")
    flops = Walk().run(eqn.params["jaxpr"])  # of one step
    return pl.CostEstimate(
        flops=int(steps * (flops.matmul or flops.elementwise)),
        transcendentals=int(steps * flops.transcendental),
        bytes_accessed=int(moved),
    )


def _bytes(spec: Any, x: Any, grid, lists, bound: int) -> int:
    """What a block's copies move; an array that the body copies for itself counts once."""
    if spec.block_shape is None:
        return x.size * x.dtype.itemsize
    block = math.prod(size for size in spec.block_shape if size)
    return block * x.dtype.itemsize * fetches(spec, grid, lists, bound)


def fetches(spec: Any, grid: tuple[int, ...], lists: Sequence = (), bound: int = 0) -> int:
    """How often a block is copied: once for every change of its index along the grid.

    A block that follows a list known only at run time counts `bound` times, if 0 at every step.
    """
    index_map = spec.index_map
    if any(not isinstance(entries, np.ndarray) for entries in lists):
        probes = [np.zeros(entries.shape, np.int32) for entries in lists]
        if _depends_on_lists(index_map, grid, lists):
            return bound or math.prod(grid)
        lists = probes

    def block(*indices):
        with jax.ensure_compile_time_eval():
            found = index_map(*indices, *lists)
        return [np.asarray(i) for i in jax.tree.leaves(found)]

    def changes(axis):
        """Runs of equal blocks along one axis, the others at 0."""
        size = grid[axis]
        along = [np.zeros(size, np.int32) for _ in grid]
        along[axis] = np.arange(size, dtype=np.int32)
        columns = [np.broadcast_to(i, (size,)) for i in block(*along)]
        differ = np.zeros(size - 1, bool)
        for column in columns:
            differ |= np.diff(column) != 0
        return 1 + int(differ.sum())

    runs = [changes(axis) for axis in range(len(grid))]
    moving = [axis for axis, count in enumerate(runs) if count > 1]
    if not moving:
        return 1
    last = moving[-1]
    return math.prod(grid[:last]) * runs[last]


def _depends_on_lists(index_map, grid, lists) -> bool:
    indices = [jax.ShapeDtypeStruct((), jnp.int32)] * len(grid)
    traced = jax.make_jaxpr(index_map)(*indices, *lists)
    used = {v for eqn in traced.jaxpr.eqns for v in eqn.invars if not hasattr(v, "val")}
    return any(v in used for v in traced.jaxpr.invars[len(grid) :])


def unflatten(structure: Any, refs: Sequence) -> tuple[Any, list]:
    """(the arguments of a launch as the tree that they were, the refs that follow them)."""
    count = structure.num_leaves
    return jax.tree.unflatten(structure, refs[:count]), list(refs[count:])


def whole_lanes(width: int) -> int:
    """The lanes that a row of this width takes in VMEM."""
    return -(-width // LANE) * LANE


def heads_together(groups: int, heads: int, width: int, lanes: int) -> int:
    """The most heads a program, whole groups or a part of one, within `lanes`; at least one.

    `width` is of a head's widest array.
    """
    each, most = heads // groups, lanes // whole_lanes(width)
    possible = (n for n in range(1, most + 1) if heads % n == 0)
    return max((n for n in possible if n % each == 0 or each % n == 0), default=1)


def over_mesh(
    function: Callable,
    arguments: Mapping[str, Any],
    dims: Mapping[str, str],
    outputs: tuple[str, ...],
):
    """`function(**arguments)`, each device on its own rows and heads; as it is without a mesh.

    `dims` gives an array a letter a dimension: b is split over the batch axes of `setting.layout`,
    h, g (heads and the groups they share) and d (channels) over its heads axes, all others are
    whole. A dimension that does not divide evenly stays whole, and with it all heads, on every
    device; a single group stays whole and leaves its heads split.
    Mosaic kernels cannot be partitioned by the compiler, so a mesh without a `layout` raises.
    """
    mesh = jax.sharding.get_abstract_mesh()
    auto = [axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
            if kind != AxisType.Manual and mesh.shape[axis] > 1]  # fmt: skip
    arrays = {name: x for name, x in arguments.items() if name in dims and x is not None}
    rest = {name: x for name, x in arguments.items() if name not in arrays}
    letters = {name: _letters(dims[name], x.shape) for name, x in arrays.items()}
    if not auto:
        return function(**arrays, **rest)
    split_over = setting.current_layout()
    if split_over is None:
        raise ValueError(
            f"a TPU kernel is called under a mesh with axes {', '.join(auto)}, and nothing says "
            f"which of them split rows and heads; call it within kernels.setting.layout(...)."
        )
    axes = dict(zip("bh", split_over, strict=True))
    split = {"b": _that_divide(arrays, letters, "b", mesh, axes["b"])}
    heads = _that_divide(arrays, letters, "hgd", mesh, axes["h"])
    split |= dict.fromkeys("hgd", heads)

    def spec(letters):
        return P(*(split.get(letter) or None for letter in letters))

    specs = {name: spec(letters[name]) for name in arrays}
    result: tuple[P, ...] = tuple(spec(letters.split()) for letters in outputs)
    run = jax.shard_map(
        lambda given: function(**given, **rest),
        in_specs=(specs,),
        out_specs=result[0] if len(result) == 1 else result,
        check_vma=False,
    )
    return run(arrays)


def _letters(dims: str, shape: tuple[int, ...]) -> tuple[str, ...]:
    """A dimension's letter, "1" for a single group."""
    pairs = zip(dims.split(), shape, strict=True)
    return tuple("1" if pair == ("g", 1) else pair[0] for pair in pairs)


def _that_divide(arrays, dims, letters, mesh, axes) -> tuple[str, ...]:
    """`axes`, or none of them if some dimension with one of these letters does not divide."""
    axes = tuple(axis for axis in axes if axis in mesh.axis_names)
    ways = math.prod(mesh.shape[axis] for axis in axes)
    sizes = (
        size
        for name, x in arrays.items()
        for size, letter in zip(x.shape, dims[name], strict=True)
        if letter in letters
    )
    return axes if all(size % ways == 0 for size in sizes) else ()
