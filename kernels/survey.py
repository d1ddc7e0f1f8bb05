"""Asks the TPU compiler about every TPU kernel; `python -m kernels.survey` writes evidence.json.

For each public function with a TPU kernel, each size of its cases.py and each generation: whether
forward and backward compile with the real TPU compiler, on one chip and on four; the temporary
bytes; the FLOPs and bytes; and the time that these bound, beside the same for the XLA form. No TPU
is needed (extra `aot`), and no time in the file was measured: seconds are the larger of bytes over
bandwidth and bfloat16 passes over the peak, of the chip's data sheet as JAX knows it. The XLA form
is compiled for the v5e alone; what it moves there stands for the others.
"""

import argparse
import importlib
import importlib.metadata
import json
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental.layout import Format, Layout
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels import dispatch, setting
from kernels.evidence import FILE, title
from kernels.subject import Subject, both_passes
from programs import flops, topology
from programs.moved import hbm_bytes

PAGE = FILE.parents[1] / "docs" / "kernel_evidence.md"
REFERENCE = "v5e"
PREAMBLE = """# What the TPU compiler says of the kernels

Written by `python -m kernels.survey` ({versions}), from kernels/evidence.json; no TPU was at hand
and nothing was timed. Each line is one call of model size, forward and backward, bfloat16. Bytes
are those of the program compiled for {reference}: moved between HBM and the chip, tiles padded, and
held beside arguments and results. Under each generation stands the time that bytes and matrix
passes bound for the chunked XLA form, over the same for the TPU kernel: above 1 the kernel is
bound to less time. `impl=None` runs a function's kernel where the geometric mean of its lines is
above 1.

Bounds are no times: they leave out latency, scalar and vector work. Very large ratios, as those of
block_sparse_attention, are loops of the chunked form into which the TPU compiler puts copies of
whole arrays.

"""


def subjects() -> dict[str, dict[str, Subject]]:
    """Calls of model size of every public function with a TPU kernel: title -> label -> call."""
    found: dict[str, dict[str, Subject]] = {}
    for folder in sorted(path.parent.name for path in FILE.parent.glob("*/pallas_tpu.py")):
        cases = importlib.import_module(f"kernels.{folder}.cases")
        for name in sorted(n for n in vars(cases) if n == "sizes" or n.startswith("sizes_")):
            function = name.removeprefix("sizes").removeprefix("_") or folder
            if "pallas_tpu" in dispatch.implementations(folder, function):
                sizes = getattr(cases, name)().items()
                found[title(folder, function)] = {
                    label: Subject(folder, function, given) for label, given in sizes
                }
    return found


def compile_for(mesh: Mesh, subject: Subject, impl: str) -> tuple[Any, Any]:
    """(jaxpr, compiled program) of both passes for a mesh of `data` (rows) and `tensor` (heads).

    The compiler chooses the layouts of arguments and results, as it does within a model.
    """
    free, fixed = subject.parts()
    run = both_passes(subject.call(impl))
    arguments = dict(free=free, fixed=fixed, slopes=subject.outputs())
    ways = mesh.shape[topology.ROWS]

    def place(x):
        rows = P(topology.ROWS) if x.ndim > 1 and x.shape[0] % ways == 0 else P()
        return Format(Layout.AUTO, NamedSharding(mesh, rows))

    with jax.set_mesh(mesh), setting.layout(batch=(topology.ROWS,), heads=(topology.HEADS,)):
        traced = jax.jit(
            lambda given: run(**given),
            in_shardings=(jax.tree.map(place, arguments),),
            out_shardings=Format(Layout.AUTO),
        ).trace(arguments)
        return traced.jaxpr, traced.lower().compile()


def program(subject: Subject, impl: str, generation: str) -> dict[str, Any]:
    """Both passes compiled for one chip of a generation: what they hold, compute and move."""
    jaxpr, compiled = compile_for(topology.chip(generation), subject, impl)
    count = flops.executed_flops(jaxpr)
    return {
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "flops": int(count.matmul or count.elementwise),
        "passes": int(count.passes),
        "bytes": hbm_bytes(compiled.as_text()),
    }


def seconds(found: dict[str, Any], generation: str) -> float:
    """The larger of bytes over bandwidth and bfloat16 passes over the peak of a generation."""
    with jax.set_mesh(topology.chip(generation)):
        chip = pltpu.get_tpu_info()
    memory = found["bytes"] / chip.mem_bw_bytes_per_second
    return float(f"{max(memory, found['passes'] / chip.bf16_ops_per_second):.4g}")


def model_flops(subject: Subject) -> int:
    """Of both passes by the reference, three times the forward pass."""
    forward = subject.call()
    return int(3 * flops.model_flops(lambda arrays: forward(**arrays), subject.arrays).total)


def rows(subject: Subject, label: str, first: bool) -> Iterator[tuple[str, dict]]:
    """(generation, line of the file) for one size; a size that does not compile says why.

    The XLA form is compiled for REFERENCE alone, and its time reckoned for each generation. Four
    chips are compiled for at every size there, elsewhere at a function's `first` size.
    """
    model = model_flops(subject)
    plain = program(subject, "xla", REFERENCE)
    for generation in topology.HOSTS:
        found: dict[str, Any] = {"size": label, "model_flops": model, "compiled": False}
        try:
            kernel = program(subject, "pallas_tpu", generation)
            found |= kernel | {"seconds": seconds(kernel, generation)}
            if first or generation == REFERENCE:
                compile_for(topology.host(generation), subject, "pallas_tpu")
            found["compiled"] = True
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        found |= {f"xla_{name}": plain[name] for name in ("temp_bytes", "flops", "bytes")}
        yield generation, found | {"xla_seconds": seconds(plain, generation)}


def main() -> None:
    """Write the lines of the functions that are asked for into the committed file."""
    jax.config.update("jax_platforms", "cpu")
    parser = argparse.ArgumentParser(description="Rewrite kernels/evidence.json.")
    parser.add_argument("--only", nargs="*", default=[], help="functions, as gated_linear")
    options = parser.parse_args()
    for name, sizes in subjects().items():
        if options.only and name not in options.only:
            continue
        begin = time.perf_counter()
        lines: dict[str, list] = {}
        for label, subject in sizes.items():
            first = label == next(iter(sizes))
            for generation, line in rows(subject, label, first):
                lines.setdefault(generation, []).append(line)
                if not line["compiled"]:
                    print(f"{name}, {label}, {generation}: {line['error']}", flush=True)
            print(f"{name}, {label}: {time.perf_counter() - begin:.0f} s", flush=True)
        write(name, lines)


def write(name: str, lines: dict[str, list]) -> None:
    """Replace one function's lines in the file, and write the page anew."""
    everything = json.loads(FILE.read_text()) if FILE.exists() else {"functions": {}}
    everything["versions"] = {p: importlib.metadata.version(p) for p in ("jax", "libtpu")}
    everything["functions"][name] = lines
    FILE.write_text(json.dumps(everything, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(page(everything))


def page(everything: dict) -> str:
    """The table of all functions, sizes and generations in Markdown."""
    functions, generations = everything["functions"], list(topology.HOSTS)
    head = ["function", "size", "model GFLOP", "MB moved", "XLA moves", "MB held", "XLA holds"]
    rows = [[*head, *generations], ["---"] * (len(head) + len(generations))]
    for name in sorted(functions):
        for lines in zip(*(functions[name][g] for g in generations), strict=True):
            rows.append([name, *_figures(lines[generations.index(REFERENCE)])])
            rows[-1] += [_ratio(line) for line in lines]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    versions = ", ".join(f"{package} {v}" for package, v in sorted(everything["versions"].items()))
    return PREAMBLE.format(reference=REFERENCE, versions=versions) + table + "\n"


def _figures(line: dict) -> list[str]:
    found = [line["size"], f"{line['model_flops'] / 1e9:.0f}"]
    names = ("bytes", "xla_bytes", "temp_bytes", "xla_temp_bytes")
    return found + [f"{line[name] / 1e6:.0f}" if name in line else "" for name in names]


def _ratio(line: dict) -> str:
    """XLA's bound over the kernel's; what failed to compile says so."""
    if not line["compiled"]:
        return "does not compile"
    return f"{line['xla_seconds'] / line['seconds']:.2f}"


if __name__ == "__main__":
    main()
