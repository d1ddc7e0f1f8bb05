"""What is known of every TPU kernel, by generation; `python -m kernels.evidence` rewrites it.

For each public function with a TPU kernel, each size of its cases.py and each generation: whether
forward and backward compile with the real TPU compiler, on one chip and on four; the temporary
bytes; the FLOPs and bytes; and the time that these bound, beside the same for the XLA form. No TPU
is needed (extra `aot`), and no time in the file was measured: seconds are the larger of bytes over
bandwidth and bfloat16 passes over the peak, of the chip's data sheet as JAX knows it. The XLA form
is compiled for the v5e alone; what it moves there stands for the others.
"""

import argparse
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("evidence.json")
REFERENCE = "v5e"


@functools.cache
def load() -> dict:
    """The committed file: function -> generation -> rows, one a size."""
    return json.loads(FILE.read_text()) if FILE.exists() else {"functions": {}}


def favours(operation: str, function: str, generation: str) -> bool:
    """Whether every recorded size compiled for the generation and is bound to less time than XLA's.

    False where nothing is recorded: dispatch then stays with XLA.
    """
    found = load()["functions"].get(title(operation, function), {}).get(generation, [])
    return bool(found) and all(r["compiled"] and r["seconds"] < r["xla_seconds"] for r in found)


def title(operation: str, function: str) -> str:
    """How the file calls a function: gated_linear, delta_rule.dplr."""
    return operation if function == operation else f"{operation}.{function}"


def subjects() -> Iterator[tuple[str, str, dict[str, dict]]]:
    """(folder, function, sizes by label) of every public function with a TPU kernel."""
    from kernels import dispatch

    for folder in sorted(path.parent.name for path in FILE.parent.glob("*/pallas_tpu.py")):
        cases = importlib.import_module(f"kernels.{folder}.cases")
        for name in sorted(n for n in vars(cases) if n == "sizes" or n.startswith("sizes_")):
            function = name.removeprefix("sizes").removeprefix("_") or folder
            if "pallas_tpu" in dispatch.implementations(folder, function):
                yield folder, function, getattr(cases, name)()


def both_passes(folder: str, function: str, impl: str, given: dict) -> tuple[Callable, dict]:
    """The function with all its gradients, and the shapes it takes: arguments and cotangents."""
    import jax
    import jax.numpy as jnp

    public = getattr(importlib.import_module(f"kernels.{folder}"), function)
    constant = getattr(importlib.import_module(f"kernels.{folder}.cases"), "NO_GRADIENT", ())
    arrays = {n: x for n, x in given.items() if isinstance(x, jax.ShapeDtypeStruct)}
    call = functools.partial(
        public, impl=impl, **{n: x for n, x in given.items() if n not in arrays}
    )
    fixed = {
        n: x
        for n, x in arrays.items()
        if n in constant or not jnp.issubdtype(x.dtype, jnp.floating)
    }
    free = {n: x for n, x in arrays.items() if n not in fixed}
    shaped = functools.partial(call, impl="xla")  # a TPU kernel is traced for a TPU alone
    outputs = jax.eval_shape(lambda free, fixed: shaped(**free, **fixed), free, fixed)

    def run(free, fixed, slopes):
        found, pull = jax.vjp(lambda free: call(**free, **fixed), free)
        return found, pull(slopes)

    return run, {"free": free, "fixed": fixed, "slopes": outputs}


def program(folder: str, function: str, impl: str, given: dict, generation: str) -> dict[str, Any]:
    """Both passes compiled for one chip of a generation: what they hold, compute and move."""
    import jax

    from kernels import aot, count, dispatch, roofline

    run, arguments = both_passes(folder, function, impl, given)
    mesh = aot.mesh(generation)
    compiled = aot.compile_for(mesh, run, arguments)
    with jax.set_mesh(mesh), dispatch.layout():
        flops = count.Walk().run(jax.make_jaxpr(run)(**arguments))
    return {
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "flops": int(flops.matmul or flops.elementwise),
        "passes": int(flops.passes),
        "bytes": roofline.hbm_bytes(compiled.as_text()),
    }


def seconds(found: dict[str, Any], generation: str) -> float:
    """The larger of bytes over bandwidth and bfloat16 passes over the peak of a generation."""
    import jax
    from jax.experimental.pallas import tpu as pltpu

    from kernels import aot

    with jax.set_mesh(aot.mesh(generation)):
        chip = pltpu.get_tpu_info()
    memory = found["bytes"] / chip.mem_bw_bytes_per_second
    return float(f"{max(memory, found['passes'] / chip.bf16_ops_per_second):.4g}")


def compile_on_four(folder: str, function: str, given: dict, generation: str) -> None:
    """Both passes of the TPU kernel on a host of four chips; raises what the compiler raises."""
    from kernels import aot

    run, arguments = both_passes(folder, function, "pallas_tpu", given)
    aot.compile_for(aot.mesh(generation, whole=True), run, arguments)


def model_flops(folder: str, function: str, given: dict) -> int:
    """Of the reference, forward and backward: three times the forward pass."""
    import jax

    from kernels import count, dispatch

    public = getattr(importlib.import_module(f"kernels.{folder}"), function)
    arrays = {n: x for n, x in given.items() if isinstance(x, jax.ShapeDtypeStruct)}
    rest = {n: x for n, x in given.items() if n not in arrays}
    with dispatch.using("ref"), dispatch.labelling() as labels:
        program = jax.make_jaxpr(lambda a: public(**a, **rest))(arrays)
    return int(3 * count.Walk(labels).run(program).total)


def rows(
    folder: str, function: str, label: str, given: dict, first: bool
) -> Iterator[tuple[str, dict]]:
    """(generation, line of the file) for one size; a size that does not compile says why.

    The XLA form is compiled for REFERENCE alone, and its time reckoned for each generation. Four
    chips are compiled for at every size there, elsewhere at a function's `first` size.
    """
    from kernels import aot

    model = model_flops(folder, function, given)
    plain = program(folder, function, "xla", given, REFERENCE)
    for generation in aot.TOPOLOGIES:
        found: dict[str, Any] = {"size": label, "model_flops": model, "compiled": False}
        try:
            kernel = program(folder, function, "pallas_tpu", given, generation)
            found |= kernel | {"seconds": seconds(kernel, generation)}
            if first or generation == REFERENCE:
                compile_on_four(folder, function, given, generation)
            found["compiled"] = True
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        found |= {f"xla_{name}": plain[name] for name in ("temp_bytes", "flops", "bytes")}
        yield generation, found | {"xla_seconds": seconds(plain, generation)}


def main() -> None:
    """Write the lines of the functions that are asked for into the committed file."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    parser = argparse.ArgumentParser(description="Rewrite kernels/evidence.json.")
    parser.add_argument("--only", nargs="*", default=[], help="functions, as gated_linear")
    options = parser.parse_args()
    for folder, function, sizes in subjects():
        name = title(folder, function)
        if options.only and name not in options.only:
            continue
        begin = time.perf_counter()
        lines: dict[str, list] = {}
        for label, given in sizes.items():
            first = label == next(iter(sizes))
            for generation, line in rows(folder, function, label, given, first):
                lines.setdefault(generation, []).append(line)
                if not line["compiled"]:
                    print(f"{name}, {label}, {generation}: {line['error']}", flush=True)
            print(f"{name}, {label}: {time.perf_counter() - begin:.0f} s", flush=True)
        write(name, lines)


def write(name: str, lines: dict[str, list]) -> None:
    """Replace one function's lines in the file."""
    everything = json.loads(FILE.read_text()) if FILE.exists() else {"functions": {}}
    everything["versions"] = {p: importlib.metadata.version(p) for p in ("jax", "libtpu")}
    everything["functions"][name] = lines
    FILE.write_text(json.dumps(everything, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
