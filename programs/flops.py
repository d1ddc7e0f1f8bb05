"""FLOPs of a program, derived by walking its jaxpr; what one equation counts is in rules.py.

    executed_flops   what runs: loops times their length, recomputation included
    model_flops      what the mathematics of a forward pass needs, whatever form of it runs

A walk goes backwards, as liveness does: an equation whose results nothing reads counts nothing.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
from jax.extend import core

from programs import rules
from programs.labels import Label, labelling

CALLS = frozenset(  # primitives whose body runs as it stands
    "jit closed_call core_call eval_jaxpr remat2 custom_jvp_call custom_vjp_call"
    " custom_vmap_call custom_partitioning shard_map".split()
)
Direction = Literal["forward", "backward", "recomputed", "other"]
DIRECTIONS: tuple[Direction, ...] = ("other", "forward", "backward", "recomputed")
Labels = Mapping[str, Label]


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


def executed_flops(program: core.ClosedJaxpr, labels: Labels | None = None) -> Flops:
    """FLOPs that a traced program executes, on all devices together, loops times their length.

    Results that nothing reads are not counted: the compiler drops them. A `while` of unknown length
    counts once and a `cond` as its dearest branch; both are said in `notes`, as is every primitive
    without a rule. `shard_map` counts its body once per device of its mesh axes. `by_place` tells
    operations of kernels/ apart in a program that `labelled` traced.
    """
    return Walk(labels).run(program)


def flops_of_loops_once(program: core.ClosedJaxpr, labels: Labels | None = None) -> Flops:
    """`executed_flops` with the body of each loop once, which is how XLA counts."""
    return OnceWalk(labels).run(program)


def labelled(function: Callable, *args: Any) -> tuple[core.ClosedJaxpr, Labels]:
    """A program and the labels of its calls of operations; their gradients bear the same labels."""
    with labelling() as labels:
        return jax.make_jaxpr(function)(*args), labels


def model_flops(forward: Callable, *args: Any) -> Flops:
    """FLOPs that the mathematics of `forward(*args)` needs, whatever form of it runs.

    Traces `forward` with every operation in its reference form. Contractions count everywhere,
    other arithmetic only in the steps of recurrences (scans within operations), decay included.
    Where kernels/<operation>/cost.py has a formula it stands for the call: softmax attention in
    reference form computes more pairs than the mask leaves.

    By convention a training step needs 3 x forward: each product has two gradients of its size.
    """
    with labelling("ref") as labels:
        program = jax.make_jaxpr(forward)(*args)
    return ModelWalk(labels).run(program)


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


Reads = list[bool]  # which inputs of an equation or of a body something needs


class Walk:
    """One walk over a program; `labels` say which of its calls are operations of kernels/."""

    def __init__(self, labels: Labels | None = None):
        self.labels = labels or {}
        self.place = Place("", "other")  # of the equation at hand
        self.inside_step = False  # of a recurrence: a scan within an operation

    def run(self, program: core.ClosedJaxpr | core.Jaxpr) -> Flops:
        """The count of all that the outputs or an effect need."""
        return self._body(program, [True] * len(_inner(program).outvars))[0]

    def _body(self, program: Any, live: Sequence[bool]) -> tuple[Flops, Reads]:
        """The count, and which inputs are read, when only the outputs in `live` are."""
        jaxpr = _inner(program)
        needed = {v for v, on in zip(jaxpr.outvars, live, strict=True) if on and _is_variable(v)}
        total = Flops()
        for eqn in reversed(jaxpr.eqns):
            wanted = [v in needed for v in eqn.outvars]
            if not (any(wanted) or eqn.effects):
                continue
            around, self.place = self.place, self._place(eqn)
            count, reads, times = self._equation(eqn, wanted)
            self.place = around
            total.include(count, times)
            needed |= {v for v, on in zip(eqn.invars, reads, strict=True) if on and _is_variable(v)}
        return total, [v in needed for v in jaxpr.invars]

    def _place(self, eqn: Any) -> Place:
        label = self.labels.get(eqn.params.get("name"))
        operation = self.place.operation or (label.name if label else "")
        marked = direction(str(eqn.source_info.name_stack)), self.place.direction
        return Place(operation, max(marked, key=DIRECTIONS.index))  # as in the whole name

    def _equation(self, eqn: Any, live: list[bool]) -> tuple[Flops, Reads, int]:
        """(the count of one run, which inputs it reads, how often it runs)."""
        name = eqn.primitive.name
        if name in CALLS:
            return self._call(eqn, live)
        if name == "scan":
            return self._scan(eqn, live)
        if name == "cond":
            return *self._cond(eqn, live), 1
        if name == "while":
            count = self._while(eqn)
        elif name == "pallas_call":
            count = self._kernel(eqn).at(self.place)
        else:
            count = self._primitive(eqn).at(self.place)
        return count, [True] * len(eqn.invars), 1

    def _call(self, eqn: Any, live: list[bool]) -> tuple[Flops, Reads, int]:
        params = eqn.params
        body = next(params[name] for name in ("jaxpr", "call_jaxpr", "call") if name in params)
        times = 1
        if eqn.primitive.name == "shard_map":
            times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
        return *self._body(body, live), times

    def _scan(self, eqn: Any, live: list[bool]) -> tuple[Flops, Reads, int]:
        """Inputs are constants, carries, slices; outputs carries, slices.

        A carry that the next step reads is needed as well: `live` grows until that is so.
        """
        body, length = eqn.params["jaxpr"], eqn.params["length"]
        carries = _of_equal_rank(eqn.outvars, _inner(body).outvars)
        consts = _of_equal_rank(eqn.invars, _inner(body).invars) - carries
        around = self.inside_step
        self.inside_step = around or bool(self.place.operation)
        wanted = list(live)
        while True:
            count, reads = self._body(body, wanted)
            carried = reads[consts : consts + carries] + [False] * (len(wanted) - carries)
            more = [a or b for a, b in zip(wanted, carried, strict=True)]
            if more == wanted:
                break
            wanted = more
        self.inside_step = around
        reads = reads[:consts] + wanted[:carries] + reads[consts + carries :]
        return count, reads, self._runs(length)

    def _runs(self, length: int) -> int:
        """How often the body of a loop of this length counts."""
        return length

    def _cond(self, eqn: Any, live: list[bool]) -> tuple[Flops, Reads]:
        found = [self._body(branch, live) for branch in eqn.params["branches"]]
        totals = {count.total for count, _ in found}
        dearest = max((c for c, _ in found), key=lambda c: (c.total, c.transcendental))
        if len(totals) > 1:
            dearest.notes.add("cond: only its dearest branch is counted")
        return dearest, [True] + [any(reads) for reads in zip(*(r for _, r in found), strict=True)]

    def _while(self, eqn: Any) -> Flops:
        count = Flops(notes={"while: its length is not in the program, one pass is counted"})
        for part in ("cond_jaxpr", "body_jaxpr"):
            count.include(self.run(eqn.params[part]))
        return count

    def _kernel(self, eqn: Any) -> Flops:
        """What a Pallas kernel's cost estimate says; passes are those of its body, step by step."""
        count, name, estimate = Flops(), eqn.primitive.name, eqn.params["cost_estimate"]
        if estimate is None:
            count.notes.add("pallas_call: without a cost estimate, counted as nothing")
            return count
        count.add("matmul", name, estimate.flops)
        steps = math.prod(eqn.params["grid_mapping"].grid)
        count.passes += steps * self.run(eqn.params["jaxpr"]).passes
        count.add("transcendental", f"{name}, transcendental", estimate.transcendentals)
        return count

    def _primitive(self, eqn: Any) -> Flops:
        flops = rules.contraction(eqn)
        if flops is None:
            return self._no_contraction(eqn)
        count = Flops(passes=flops * rules.passes(eqn))
        count.add("matmul", eqn.primitive.name, flops)
        return count

    def _no_contraction(self, eqn: Any) -> Flops:
        count, name = Flops(), eqn.primitive.name
        if name in rules.TRANSCENDENTAL:
            count.add("transcendental", name, rules.size(eqn.outvars[0]))
        elif (flops := rules.arithmetic(eqn)) is None:
            count.notes.add(f"{name}: without a rule, counted as nothing")
        elif flops:
            count.add("elementwise", name, flops)
        return count


class OnceWalk(Walk):
    """The executed count with each loop's body once."""

    def _runs(self, length: int) -> int:
        return 1


class ModelWalk(Walk):
    """The count of model FLOPs: declared costs stand for calls, arithmetic counts in steps only."""

    def _call(self, eqn: Any, live: list[bool]) -> tuple[Flops, Reads, int]:
        label = self.labels.get(eqn.params.get("name"))
        if label is None or label.flops is None:
            return super()._call(eqn, live)
        scale = sum(rules.size(v) for v in eqn.outvars) / label.elements  # > 1 under vmap
        count = Flops()
        count.add("matmul", label.name, scale * label.flops)
        return count.at(self.place), [True] * len(eqn.invars), 1

    def _no_contraction(self, eqn: Any) -> Flops:
        return super()._no_contraction(eqn) if self.inside_step else Flops()


def _inner(program: Any) -> Any:
    """The jaxpr of a closed one, or itself."""
    return getattr(program, "jaxpr", program)


def _is_variable(v: Any) -> bool:
    return not isinstance(v, core.Literal)


def _of_equal_rank(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    """How many variables of a loop are the same in its body; of the others it sees slices."""
    pairs = zip(outside, inside, strict=True)
    return sum(len(one.aval.shape) == len(other.aval.shape) for one, other in pairs)
