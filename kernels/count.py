"""FLOPs of a program, derived by walking its jaxpr.

A contraction counts 2 per multiply-add: 2 B M N K for `dot_general` (B M N when nothing is summed).
Floating-point arithmetic counts 1 per output element, a reduction 1 per element that it folds in,
an FFT 5 N log2 N; exp, log, sqrt and their like are transcendentals, counted apart. Moving,
comparing, selecting, converting and integers count nothing. Complex arithmetic counts as its real
parts do.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from kernels import dispatch

_ARITHMETIC = frozenset(
    "add sub mul div rem max min neg abs sign floor ceil round square add_any integer_pow clamp"
    " one_minus_square conj".split()
)
_TRANSCENDENTAL = frozenset(
    "exp exp2 log log2 log1p expm1 sin cos tan tanh sinh cosh asin acos atan atan2 asinh acosh"
    " atanh logistic erf erfc erf_inv pow sqrt rsqrt cbrt lgamma digamma".split()
)
_REDUCTIONS = frozenset("reduce_sum reduce_prod reduce_max reduce_min".split())
_CUMULATIVE = frozenset("cumsum cumprod cummax cummin".split())
_CALLS = frozenset(
    "jit closed_call core_call remat2 custom_jvp_call custom_vjp_call custom_vmap_call"
    " custom_partitioning shard_map".split()
)
_FREE = frozenset(
    "broadcast_in_dim reshape transpose convert_element_type bitcast_convert_type real imag complex"
    " slice dynamic_slice dynamic_update_slice concatenate split stack unstack tile pad gather"
    " scatter select_n iota squeeze expand_dims rev copy copy_p stop_gradient name sort top_k"
    " sharding_constraint device_put optimization_barrier reduce_precision pvary psum"
    " psum_invariant pmax pmin all_gather all_to_all reduce_scatter ppermute"
    " get swap addupdate program_id num_programs multiple_of roll".split()
)


Direction = Literal["forward", "backward", "recomputed", "other"]


class Place(NamedTuple):
    """Where FLOPs come from."""

    operation: str  # kernels.<operation>.<function> if its calls were labelled; "" outside of all
    direction: Direction  # of the gradient; "other" outside of it, as an optimizer


@dataclasses.dataclass
class Flops:
    """A count of FLOPs; `notes` names what the program does not say and the count had to assume."""

    matmul: float = 0.0  # contractions, convolutions, and the estimates of Pallas kernels
    elementwise: float = 0.0  # all other floating-point arithmetic
    transcendental: float = 0.0  # calls of exp and its like, in no total
    passes: float = 0.0  # `dot_general` as a TPU runs it, 6 bfloat16 passes at HIGHEST; in no total
    by_primitive: dict[str, float] = dataclasses.field(default_factory=dict)
    by_place: dict[Place, "Flops"] = dataclasses.field(default_factory=dict)
    notes: set[str] = dataclasses.field(default_factory=set)

    @property
    def total(self) -> int | float:
        """Contractions and arithmetic, without transcendentals."""
        return self.matmul + self.elementwise

    def add(self, kind: str, primitive: str, count: int | float) -> None:
        """Count `count` operations of `kind`, a field's name."""
        setattr(self, kind, getattr(self, kind) + count)
        self.by_primitive[primitive] = self.by_primitive.get(primitive, 0.0) + count

    def at(self, place: Place) -> "Flops":
        """The same count, all of it from `place`."""
        return dataclasses.replace(self, by_place={place: self})

    def include(self, other: "Flops", times: int | float = 1) -> None:
        """Add `times` the counts of `other`."""
        self.matmul += times * other.matmul
        self.elementwise += times * other.elementwise
        self.transcendental += times * other.transcendental
        self.passes += times * other.passes
        for primitive, count in other.by_primitive.items():
            self.by_primitive[primitive] = self.by_primitive.get(primitive, 0.0) + times * count
        for place, part in other.by_place.items():
            self.by_place.setdefault(place, Flops()).include(part, times)
        self.notes.update(other.notes)


def executed_flops(
    program: core.ClosedJaxpr, labels: Mapping[str, dispatch.Label] | None = None
) -> Flops:
    """FLOPs that a traced program executes, on all devices together, loops times their length.

    Results that nothing reads are not counted: the compiler drops them. A `while` of unknown length
    counts once and a `cond` as its dearest branch; both are said in `notes`, as is every primitive
    without a rule. `shard_map` counts its body once per device of its mesh axes. `by_place` tells
    operations of kernels/ apart in a program that `labelled` traced.
    """
    return Walk(labels).run(program)


def flops_of_loops_once(
    program: core.ClosedJaxpr, labels: Mapping[str, dispatch.Label] | None = None
) -> Flops:
    """`executed_flops` with the body of each loop once, which is how XLA counts."""
    return OnceWalk(labels).run(program)


def labelled(
    function: Callable, *args: Any
) -> tuple[core.ClosedJaxpr, Mapping[str, dispatch.Label]]:
    """A program and the labels of its calls of operations; their gradients bear the same labels."""
    with dispatch.labelling() as labels:
        return jax.make_jaxpr(function)(*args), labels


def model_flops(forward: Callable, *args: Any) -> Flops:
    """FLOPs that the mathematics of `forward(*args)` needs, whatever form of it runs.

    Traces `forward` with every operation in its reference form. Contractions count everywhere,
    other arithmetic only in the steps of recurrences (scans within operations), decay included.
    Where kernels/<operation>/cost.py has a formula it stands for the call: softmax attention in
    reference form computes more pairs than the mask leaves.

    By convention a training step needs 3 x forward: each product has two gradients of its size.
    """
    with dispatch.using("ref"), dispatch.labelling() as labels:
        program = jax.make_jaxpr(forward)(*args)
    return ModelWalk(labels).run(program)


class Walk:
    """One walk over a program; `labels` say which of its calls are operations of kernels/."""

    def __init__(self, labels: Mapping[str, dispatch.Label] | None = None):
        self.labels = labels or {}
        self.place = Place("", "other")
        self.inside_step = False

    def run(self, program: core.ClosedJaxpr | core.Jaxpr) -> Flops:
        """The count of all that the outputs or an effect need."""
        outputs = getattr(program, "jaxpr", program).outvars
        return self._jaxpr(program, [True] * len(outputs))[0]

    def _jaxpr(self, program: Any, live: Sequence[bool]) -> tuple[Flops, list[bool]]:
        """The count, and which inputs are read, when only the outputs in `live` are."""
        jaxpr = getattr(program, "jaxpr", program)
        needed = {v for v, on in zip(jaxpr.outvars, live, strict=True) if on and _is_variable(v)}
        total = Flops()
        for eqn in reversed(jaxpr.eqns):
            wanted = [v in needed for v in eqn.outvars]
            if not (any(wanted) or eqn.effects):
                continue
            used = self._equation(eqn, wanted, total)
            needed |= {v for v, on in zip(eqn.invars, used, strict=True) if on and _is_variable(v)}
        return total, [v in needed for v in jaxpr.invars]

    def _equation(self, eqn: core.JaxprEqn, live: list[bool], total: Flops) -> list[bool]:
        before, self.place = self.place, self._place(eqn)
        used = self._counted(eqn, live, total)
        self.place = before
        return used

    def _place(self, eqn) -> Place:
        label = self.labels.get(eqn.params.get("name"))
        operation = self.place.operation or (label.name if label else "")
        marked = direction(str(eqn.source_info.name_stack)), self.place.direction
        return Place(operation, max(marked, key=_DIRECTIONS.index))  # as in the whole name

    def _counted(self, eqn, live, total):
        name = eqn.primitive.name
        if name in _CALLS:
            return self._call(eqn, live, total)
        if name == "scan":
            return self._scan(eqn, live, total)
        if name == "cond":
            return self._cond(eqn, live, total)
        if name == "while":
            self._while(eqn, total)
        else:
            count = Flops()
            self._primitive(eqn, count)
            total.include(count.at(self.place))
        return [True] * len(eqn.invars)

    def _call(self, eqn, live, total):
        params = eqn.params
        body = next(params[name] for name in ("jaxpr", "call_jaxpr", "call") if name in params)
        count, used = self._jaxpr(body, live)
        times = 1
        if eqn.primitive.name == "shard_map":
            times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
        total.include(count, times)
        return used

    def _scan(self, eqn, live, total):
        body, length = eqn.params["jaxpr"], eqn.params["length"]
        inner = getattr(body, "jaxpr", body)
        pairs = zip(eqn.outvars, inner.outvars, strict=True)
        carries = sum(len(out.aval.shape) == len(one.aval.shape) for out, one in pairs)
        pairs = zip(eqn.invars, inner.invars, strict=True)
        consts = sum(len(v.aval.shape) == len(one.aval.shape) for v, one in pairs) - carries
        before = self.inside_step
        self.inside_step = before or bool(self.place.operation)
        wanted = list(live)
        while True:  # a carry that the next step reads is needed as well
            count, used = self._jaxpr(body, wanted)
            carried = used[consts : consts + carries] + [False] * (len(wanted) - carries)
            more = [a or b for a, b in zip(wanted, carried, strict=True)]
            if more == wanted:
                break
            wanted = more
        self.inside_step = before
        total.include(count, self._times(length))
        return used[:consts] + wanted[:carries] + used[consts + carries :]

    def _times(self, length: int) -> int:
        return length

    def _cond(self, eqn, live, total):
        found = [self._jaxpr(branch, live) for branch in eqn.params["branches"]]
        dearest = max((c for c, _ in found), key=lambda c: (c.total, c.transcendental))
        total.include(dearest)
        if len({count.total for count, _ in found}) > 1:
            total.notes.add("cond: only its dearest branch is counted")
        return [True] + [any(reads) for reads in zip(*(used for _, used in found), strict=True)]

    def _while(self, eqn, total):
        for part in ("cond_jaxpr", "body_jaxpr"):
            body = eqn.params[part]
            outputs = getattr(body, "jaxpr", body).outvars
            total.include(self._jaxpr(body, [True] * len(outputs))[0])
        total.notes.add("while: its length is not in the program, one pass is counted")

    def _primitive(self, eqn, total):
        name = eqn.primitive.name
        if name == "pallas_call":
            estimate = eqn.params["cost_estimate"]
            if estimate is None:
                total.notes.add("pallas_call: without a cost estimate, counted as nothing")
                return
            total.add("matmul", name, estimate.flops)
            steps = math.prod(eqn.params["grid_mapping"].grid)
            total.passes += steps * self.run(eqn.params["jaxpr"]).passes
            total.add("transcendental", f"{name}, transcendental", estimate.transcendentals)
        elif name in _CONTRACTIONS:
            total.add("matmul", name, _CONTRACTIONS[name](eqn))
            total.passes += _CONTRACTIONS[name](eqn) * _passes(eqn)
        else:
            self._no_contraction(eqn, total)

    def _no_contraction(self, eqn, total):
        name = eqn.primitive.name
        if name in _TRANSCENDENTAL:
            total.add("transcendental", name, _size(eqn.outvars[0]))
        elif (count := _arithmetic(eqn)) is None:
            total.notes.add(f"{name}: without a rule, counted as nothing")
        elif count:
            total.add("elementwise", name, count)


class OnceWalk(Walk):
    """The executed count with each loop's body once."""

    def _times(self, length: int) -> int:
        return 1


class ModelWalk(Walk):
    """The count of model FLOPs: declared costs stand for calls, arithmetic counts in steps only."""

    def _call(self, eqn, live, total):
        label = self.labels.get(eqn.params.get("name"))
        if label is None or label.flops is None:
            return super()._call(eqn, live, total)
        scale = sum(_size(v) for v in eqn.outvars) / label.elements  # > 1 under vmap
        count = Flops()
        count.add("matmul", label.name, scale * label.flops)
        total.include(count.at(self.place))
        return [True] * len(eqn.invars)

    def _no_contraction(self, eqn, total):
        if self.inside_step:
            super()._no_contraction(eqn, total)


def direction(name: str) -> Direction:
    """The pass that JAX's name of a computation says; "other" where it marks none.

    A gradient that a model takes within its forward pass, as test-time training does, counts as
    backward.
    """
    if "rematted_computation" in name:
        return "recomputed"
    if "transpose(" in name:
        return "backward"
    return "forward" if "jvp(" in name else "other"


def _is_variable(v) -> bool:
    return not isinstance(v, core.Literal)


def _size(v) -> int:
    return math.prod(v.aval.shape)


def _is_complex(v) -> bool:
    return jnp.issubdtype(v.aval.dtype, jnp.complexfloating)


def _dot(eqn) -> int | float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lhs, out = eqn.invars[0], eqn.outvars[0]
    summed = math.prod(lhs.aval.shape[axis] for axis in contracted)
    per_output = 2 * summed if contracted else 1
    return per_output * _size(out) * (4 if _is_complex(out) else 1)


def _passes(eqn) -> int:
    """Products of bfloat16 parts that stand for one product at the precision asked for."""
    narrow = any(v.aval.dtype.itemsize < 4 for v in eqn.invars)
    asked = eqn.params.get("precision")
    asked = asked if isinstance(asked, tuple) else (asked,)
    most = max((_PASSES.get(p, 1) for p in asked), default=1)
    return 1 if narrow else most


def _convolution(eqn) -> int | float:
    """Each output element meets every tap and every input channel of its group."""
    kernel, out = eqn.invars[1], eqn.outvars[0]
    outputs = kernel.aval.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2 * _size(out) * _size(kernel) / outputs


def _fft(eqn) -> int | float:
    """5 N log2 N per transform, half of it between real and complex."""
    lengths = eqn.params["fft_lengths"]
    points, rows = math.prod(lengths), math.prod(eqn.invars[0].aval.shape[: -len(lengths)])
    real = not (_is_complex(eqn.invars[0]) and _is_complex(eqn.outvars[0]))
    return rows * 5 * points * math.log2(max(points, 2)) * (0.5 if real else 1)


def _triangular_solve(eqn) -> int | float:
    """N^2 per right-hand side: N (N - 1) / 2 multiply-adds and N divisions."""
    matrix, right = (v.aval.shape for v in eqn.invars)
    return matrix[-1] * math.prod(right)


_DIRECTIONS: tuple[Direction, ...] = ("other", "forward", "backward", "recomputed")
_PASSES = {jax.lax.Precision.HIGH: 3, jax.lax.Precision.HIGHEST: 6}
_CONTRACTIONS = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "fft": _fft,
    "triangular_solve": _triangular_solve,
}


def _arithmetic(eqn) -> int | float | None:
    """Floating-point operations of a primitive that is no contraction; None if it has no rule."""
    name = eqn.primitive.name
    if name in _FREE or not any(jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in eqn.outvars):
        return 0.0
    out = eqn.outvars[0]
    if name in _REDUCTIONS:
        count = _size(eqn.invars[0]) - _size(out)
    elif name in ("scatter-add", "scatter_add"):
        count = _size(eqn.invars[2])
    elif name in _CUMULATIVE:
        count = _size(out)
    elif name == "integer_pow":
        power = abs(eqn.params["y"])
        count = _size(out) * max(1, power.bit_length() + power.bit_count() - 2)  # by squaring
    elif name in _ARITHMETIC:
        count = _size(out) * (2 if name == "one_minus_square" else 1)
    else:
        return None
    return count * _complex_factor(name, out)


def _complex_factor(name: str, out) -> int:
    if not _is_complex(out):
        return 1
    return 6 if name in ("mul", "div", "integer_pow", "square") else 2
