"""What is known of every TPU kernel, by generation; `python -m kernels.evidence` rewrites it.

For each public function with a TPU kernel, each size of its cases.py and each generation: whether
forward and backward compile with the real TPU compiler, on one chip and on four; the temporary
bytes; the FLOPs and bytes; and the time that these bound, beside the same for the XLA form. No TPU
is needed (extra `aot`), and no time in the file was measured: seconds are the larger of bytes over
bandwidth and bfloat16 passes over the peak, of the chip's data sheet as JAX knows it.
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
    outputs = jax.eval_shape(lambda free, fixed: call(**free, **fixed), free, fixed)

    def run(free, fixed, slopes):
        found, pull = jax.vjp(lambda free: call(**free, **fixed), free)
        return found, pull(slopes)

    return run, {"free": free, "fixed": fixed, "slopes": outputs}


def measure(folder: str, function: str, impl: str, given: dict, generation: str) -> dict[str, Any]:
    """Compile both passes for one chip; what the compiler says and what the time is bound by."""
    import jax
    from jax.experimental.pallas import tpu as pltpu

    from kernels import aot, count, dispatch, roofline

    run, arguments = both_passes(folder, function, impl, given)
    mesh = aot.mesh(generation)
    compiled = aot.compile_for(mesh, run, arguments)
    with jax.set_mesh(mesh), dispatch.layout(batch=("data",), heads=("tensor",)):
        flops = count.Walk().run(jax.make_jaxpr(run)(**arguments))
        chip = pltpu.get_tpu_info()
    moved = roofline.hbm_bytes(compiled.as_text())
    seconds = max(moved / chip.mem_bw_bytes_per_second, flops.passes / chip.bf16_ops_per_second)
    memory = compiled.memory_analysis()
    return {
        "temp_bytes": memory.temp_size_in_bytes,
        "flops": int(flops.matmul or flops.elementwise),
        "bytes": moved,
        "seconds": float(f"{seconds:.4g}"),
    }


def compiles(folder: str, function: str, given: dict, generation: str) -> None:
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


def row(folder: str, function: str, label: str, given: dict, generation: str) -> dict[str, Any]:
    """One line of the file; a size that does not compile says why."""
    found: dict[str, Any] = {"size": label, "compiled": False}
    try:
        found |= measure(folder, function, "pallas_tpu", given, generation)
        compiles(folder, function, given, generation)
        found["compiled"] = True
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    plain = measure(folder, function, "xla", given, generation)
    found |= {f"xla_{name}": plain[name] for name in ("temp_bytes", "flops", "bytes", "seconds")}
    return found | {"model_flops": model_flops(folder, function, given)}


def main() -> None:
    """Write the rows that are asked for into the committed file, one generation at a time."""
    from kernels import aot

    parser = argparse.ArgumentParser(description="Rewrite kernels/evidence.json.")
    parser.add_argument("--only", nargs="*", default=[], help="functions, as gated_linear")
    parser.add_argument("--generations", nargs="*", default=list(aot.TOPOLOGIES))
    options = parser.parse_args()
    for folder, function, sizes in subjects():
        name = title(folder, function)
        if options.only and name not in options.only:
            continue
        for generation in options.generations:
            begin = time.perf_counter()
            found = [
                row(folder, function, label, given, generation) for label, given in sizes.items()
            ]
            everything = json.loads(FILE.read_text()) if FILE.exists() else {"functions": {}}
            everything["versions"] = {p: importlib.metadata.version(p) for p in ("jax", "libtpu")}
            everything["functions"].setdefault(name, {})[generation] = found
            FILE.write_text(json.dumps(everything, indent=1, sort_keys=True) + "\n")
            spent = time.perf_counter() - begin
            bad = [r["size"] for r in found if not r["compiled"]]
            print(
                f"{name} {generation}: {len(found)} sizes in {spent:.0f} s {bad or ''}", flush=True
            )


if __name__ == "__main__":
    main()
