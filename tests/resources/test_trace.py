"""Profiles: planted programs on this device, and traces written by hand as each platform has them.

A text of the profiler's format stands for the devices that are not there.
"""

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from programs import hlo
from resources import trace
from tests.programs.texts import PROGRAM

N, LAYERS = 384, 3


def loss(w, x):
    def layer(x, _):
        with jax.named_scope("planted"):
            x = x @ w
        with jax.named_scope("around"):
            return jnp.tanh(x), None

    return jax.lax.scan(layer, x, None, length=LAYERS)[0].sum()


def profiled(function, *args, runs=1):
    """A function's profile and the text that it was compiled to."""
    program = jax.jit(function).lower(*args).compile()
    text = program.as_text() or ""
    return trace.profile(text, lambda: program(*args), runs), text


def products(found, text):
    """Operations that are a matrix product, or a fusion around one."""
    computations, _ = hlo.computations(text)
    lines = {name: line for inside in computations.values() for name, line in inside.items()}

    def is_product(line):
        fused = [one for name in line.fused for one in computations[name].values()]
        return any(one.operation == "dot" for one in (line, *fused))

    return [one for one in found.operations if is_product(lines[one.operation])]


X = jnp.ones((N, N))


@pytest.fixture(scope="module")
def planted():
    return profiled(jax.grad(loss), X, X, runs=10)  # a pause of the machine is short beside them


@pytest.fixture
def gradient(planted):
    return planted[0]


def test_a_planted_product_is_at_the_top_with_its_path(planted):
    top = planted[0].operations[0]
    assert top in products(*planted)
    assert top.path.startswith("planted/")
    # What the compiler adds, as copies, waits for the machine's other work.
    places = [one.path for one in trace.by_path(planted[0].operations)]
    assert [path for path in places if path != "unnamed"][0] == "planted"


def test_forward_and_backward_are_told_apart_and_loops_count_their_bodies(planted):
    calls = {"forward": 0.0, "backward": 0.0}
    for one in products(*planted):
        assert one.path.split("/")[0] == "planted"
        calls[one.direction] += one.calls
        assert one.bytes >= one.calls * 3 * 4 * N * N  # two operands, one result
    assert calls == {"forward": LAYERS, "backward": 2 * LAYERS}


def test_seconds_fit_into_the_wall_time_of_the_threads(gradient):
    total = sum(one.seconds for one in gradient.operations)
    assert 0 < total <= gradient.seconds * gradient.lines
    shares = sum(one.share for one in gradient.operations)
    assert shares + gradient.unmapped == pytest.approx(1)
    assert gradient.unmapped < 0.01


def test_paths_as_one_sum_up(gradient):
    for field in ("seconds", "bytes", "calls"):
        whole = sum(getattr(one, field) for one in gradient.operations)
        parts = sum(getattr(one, field) for one in trace.by_path(gradient.operations, 1))
        assert parts == pytest.approx(whole)


def test_a_program_without_scopes_has_its_lines():
    (one,) = profiled(lambda x: x @ x, X)[0].operations
    assert one.path == "dot_general" and one.direction == "forward"
    assert one.source.startswith("resources/test_trace.py:")


def test_recomputation_is_told():
    def checkpointed(w, x):
        with jax.named_scope("outer"):
            return jax.checkpoint(loss)(w, x)

    found = products(*profiled(jax.grad(checkpointed), X, X))
    calls = {"recomputed": 0.0, "backward": 0.0}
    for one in found:
        assert one.path.startswith("outer/planted/")
        calls[one.direction] += one.calls
    assert calls == {"recomputed": LAYERS, "backward": 2 * LAYERS}


NAMES = {
    "jit(step)/jvp(head)/dot_general": "head/dot_general",
    "jit(f)/jvp()/while/body/closed_call/glu/a,b->c/dot_general": "glu/a,b->c/dot_general",
    "jit(f)/transpose(jvp(a/b))/while/body/c/jit(silu)/mul": "a/b/c/silu/mul",
    "jit(f)/transpose(jvp(a))/jvp(a)/checkpoint/rematted_computation/b/sin": "a/b/sin",
    "jit(f)/while/body/closed_call/x.0/x.0/checkpoint/y/checkpoint/z/add": "x.0/y/z/add",
    "jit(f)/while/body/eval_jaxpr/glu/mul": "glu/mul",  # closed_call, as JAX 0.12 names it
    "jit(f)/a/while": "a/while",
    "jit(f)/vmap(jit(kernels.attention.attention#3))/exp": "kernels.attention.attention/exp",
    "reduce_sum": "reduce_sum",
    "": "",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_become_paths(name):
    assert trace.path(name) == NAMES[name]


def space(*planes):
    """A trace: (plane, {line: [(event, start, microseconds, {stat: value})]}) for each plane."""
    text = []
    for name, lines in planes:
        events, stats, body = {}, {}, []
        for line, found in lines.items():
            rows = []
            for event, start, duration, said in found:
                number = events.setdefault(event, len(events) + 1)
                row = f"metadata_id: {number} offset_ps: {start * 10**6}"
                row += f" duration_ps: {duration * 10**6}"
                for stat, value in said.items():
                    number = stats.setdefault(stat, len(stats) + 1)
                    row += f' stats {{ metadata_id: {number} str_value: "{value}" }}'
                rows.append(f"events {{ {row} }}")
            body.append(f'lines {{ name: "{line}" {" ".join(rows)} }}')
        for kind, table in (("event", events), ("stat", stats)):
            for key, i in table.items():
                body.append(f'{kind}_metadata {{ key: {i} value {{ id: {i} name: "{key}" }} }}')
        text.append(f'planes {{ name: "{name}" {" ".join(body)} }}')
    return ProfileData.from_serialized_xspace(
        ProfileData.text_proto_to_serialized_xspace(" ".join(text))
    )


def of(operation, module="jit_f"):
    return {"hlo_op": operation, "hlo_module": module}


CPU = (
    "/host:CPU",
    {
        "python": [("PjitFunction", 0, 100, {})],
        "worker": [
            ("loop", 0, 50, of("loop")),
            ("square", 1, 20, of("square")),
            ("end: square", 21, 1, {}),
            ("square", 22, 20, of("square")),
            ("add.1", 60, 30, of("square", "jit_another")),
            ("sum", 90, 10, of("sum")),
        ],
        "other": [("first", 5, 40, of("first"))],
    },
)
TPU = (
    "/device:TPU:0",
    {
        "XLA Modules": [("jit_f(123)", 0, 100, {})],
        "XLA Ops": [
            ("%loop = f32[16,16]{1,0} while(%square), body=%b", 0, 50, {}),
            ("%square = f32[16,16]{1,0} dot(%first, %first)", 1, 20, {}),
            ("%square = f32[16,16]{1,0} dot(%first, %first)", 22, 20, {}),
            ("%sum = f32[16,16]{1,0} add(%loop, %first)", 90, 10, {}),
            ("%first = f32[16,16]{1,0} fusion(%w)", 101, 40, {}),
        ],
    },
)
KERNELS = {
    "Stream #1": [
        ("gemm_f32", 1, 20, of("square")),
        ("gemm_f32", 22, 20, of("square")),
        ("memcpy", 42, 8, of("loop")),
        ("wrapped", 101, 40, of("first")),
    ],
    "Stream #2": [("loop_add", 60, 10, of("sum")), ("memset", 90, 5, {})],
}
OPERATIONS = {"XLA Ops": [(e[3].get("hlo_op", e[0]), *e[1:]) for e in KERNELS["Stream #1"]]}
OPERATIONS["XLA Ops"] += [("sum", 60, 10, {})]


@pytest.mark.parametrize(
    ("plane", "loop"),
    [
        (CPU, 10),
        (TPU, 10),
        (("/device:GPU:0", KERNELS), 8),
        (("/device:GPU:0", KERNELS | OPERATIONS), 8),
    ],
    ids=["cpu", "tpu", "gpu", "gpu_with_its_line_of_operations"],
)
def test_each_platform(plane, loop):
    found = trace.summed(PROGRAM, space(plane), runs=2, seconds=1e-3)
    seconds = {one.operation: round(one.seconds * 1e6, 3) for one in found.operations}
    assert seconds == {"square": 20, "first": 20, "sum": 5, "loop": loop / 2}
    by_name = {one.operation: one for one in found.operations}
    assert by_name["square"].calls == 1 and by_name["loop"].calls == 0.5
    assert by_name["square"].share == pytest.approx(40 / (90 + loop))
    directions = {name: one.direction for name, one in by_name.items()}
    assert directions == {
        "square": "backward",
        "first": "forward",
        "sum": "other",
        "loop": "other",
    }
    assert (by_name["loop"].path, by_name["sum"].path) == ("unnamed/while", "add")
    assert found.unmapped == 0


def test_what_the_program_does_not_have_is_told():
    plane = "/host:CPU", {"worker": [("a", 0, 30, of("sum")), ("b", 30, 10, of("elsewhere"))]}
    found = trace.summed(PROGRAM, space(plane), runs=1, seconds=1e-3)
    assert [one.operation for one in found.operations] == ["sum"]
    assert found.unmapped == pytest.approx(0.25)


def test_a_trace_without_the_program_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no trace \(\*\.xplane\.pb\)"):
        trace.read(PROGRAM, tmp_path, 1, 1.0)
    plane = "/host:CPU", {"worker": [("a", 0, 30, of("sum", "jit_another"))]}
    with pytest.raises(ValueError, match="no operation of 'HloModule jit_f"):
        trace.summed(PROGRAM, space(plane), 1, 1.0)
    with pytest.raises(ValueError, match="runs=0"):
        trace.profile(PROGRAM, lambda: None, runs=0)
