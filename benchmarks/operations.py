"""Operations side by side: any implementations and peers, in one process, in turn.

    python benchmarks/operations.py                                    # every operation, xla
    python benchmarks/operations.py --only gated_linear --impl ref xla # names by prefix
    python benchmarks/operations.py --impl xla torch transformers associative_scan --markdown FILE
    python benchmarks/operations.py --sizes model --impl xla pallas_tpu        # on a TPU

An implementation is ref, xla, pallas_tpu (on a TPU), associative_scan (linear_scan), torch
(attention) or transformers (delta_rule); the last two need those packages, and the file must then
be run as a file, not with -m. Every side's outputs and gradients are compared with the first
side's before it is timed; more than the limit ends the run with exit code 1.

"CPU ms" are of all threads. The floor of a call is the larger of its model FLOPs over the device's
measured matmul rate and its bytes (arguments and results, once) over the measured copy rate; the
share is floor over time.
"""

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
wanted = {"torch", "transformers"} & set(sys.argv)
if wanted:  # before the root is on the path: transformers must not find our `kernels`
    import _operation_peers as peers
sys.path.insert(0, str(ROOT))

from parallel import launch  # noqa: E402

launch.prepare()

import _operation_subjects as subjects  # noqa: E402
import _table as table  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from configs.schema import on_disk  # noqa: E402
from kernels import dispatch, survey  # noqa: E402
from kernels.subject import Subject, both_passes  # noqa: E402
from parallel import host  # noqa: E402

LIMIT = {"float32": 1e-4, "bfloat16": 2e-2}
HEAD = ("operation", "pass", "implementation", "ms (p20 to p80)", "times the first", "CPU ms",
        "temporary MB", "share of the roofline", "differs by")  # fmt: skip


def main() -> int:
    """Time what is asked for; 1 if a side's numbers differ from the first side's."""
    args = arguments()
    if not args.plain_memory:
        host.keep_memory()  # as train.py does
    if "torch" in wanted or "transformers" in wanted:
        peers.torch.set_num_threads(args.threads)
    setting, rates = describe(), measured_rates()
    print(f"{setting}\nmatmul {rates[0] / 1e9:.0f} GFLOP/s, copy {rates[1] / 1e9:.1f} GB/s\n")
    lines, failed = [], False
    for name, subject in chosen(args).items():
        for both in (False, True):
            for line in compare(name, subject, both, args, rates):
                lines.append(line)
                failed |= not line["agrees"]
                print(" | ".join(cells(line)), flush=True)
    text = markdown(lines, setting, rates)
    if args.json:
        Path(args.json).write_text(json.dumps({"setting": setting, "lines": lines}, indent=1))
    if args.markdown:
        Path(args.markdown).write_text(text)
    return int(failed)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[""], help="operations, by prefix")
    parser.add_argument("--impl", nargs="*", default=["xla"], help="sides, the first is the base")
    parser.add_argument("--sizes", choices=("cpu", "model"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--least", type=float, default=0.3, help="seconds a side a round")
    parser.add_argument(
        "--plain_memory", action="store_true", help="do not keep freed memory, as JAX alone"
    )
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    for option, value in dict(batch=1, length=4096, heads=4, dim=64, width=1024).items():
        parser.add_argument(f"--{option}", type=int, default=value)
    parser.add_argument("--json", type=on_disk, help="write the figures here")
    parser.add_argument("--markdown", type=on_disk, help="write the table here")
    return parser.parse_args()


def chosen(args: argparse.Namespace) -> dict[str, Subject]:
    """The subjects whose names begin with one of `--only`."""
    sizes = (args.batch, args.length, args.heads, args.dim, args.width)
    found = subjects.cpu_subjects(*sizes) if args.sizes == "cpu" else subjects.model_subjects()
    picked = {n: s for n, s in found.items() if n.startswith(tuple(args.only))}
    if not picked:
        raise SystemExit(f"no operation begins with {args.only}; there are: {', '.join(found)}")
    return picked


def compare(name, subject, both, args, rates):
    """One line a side, timed in turn with the others."""
    rng = np.random.default_rng(0)
    subject = subjects.fill(subject, rng)
    sides = {impl: side(name, subject, impl, both) for impl in args.impl}
    sides = {impl: made for impl, made in sides.items() if made is not None}
    results = {impl: [np.asarray(x) for x in run()] for impl, (run, _) in sides.items()}
    base = next(iter(results.values()), [])
    taken = table.interleave({i: run for i, (run, _) in sides.items()}, args.rounds, args.least)
    floor = roofline(subject, base, both, rates)
    medians = {}
    for impl, (_, temporary) in sides.items():
        seconds = np.concatenate([turn["wall"] for turn in taken[impl]])
        fast, middle, slow = np.percentile(seconds, [20, 50, 80])
        medians[impl] = middle
        error = max(difference(a, b) for a, b in zip(results[impl], base, strict=False))
        limit = LIMIT["bfloat16" if base[0].dtype == jnp.bfloat16 else "float32"]
        yield {
            "operation": name,
            "pass": "forward + backward" if both else "forward",
            "implementation": impl,
            "ms": [1e3 * x for x in (fast, middle, slow)],
            "cpu_ms": 1e3 * float(np.median([turn["cpu"] for turn in taken[impl]])),
            "ratio": medians[next(iter(medians))] / middle,
            "temporary_mb": None if temporary is None else temporary / 1e6,
            "share": floor / middle,
            "error": error,
            "agrees": bool(error <= limit),
        }


def side(name, subject, impl, both):
    """(callable, temporary bytes) of one implementation; None where it has none of this."""
    if impl in subjects.TORCH_PEERS.get(name, {}):
        slopes = cotangents(subject) if both else None
        arrays = {name: np.asarray(x) for name, x in subject.arrays.items()}
        return peers.runner(subjects.TORCH_PEERS[name][impl], arrays, slopes), None
    function = subjects.JAX_PEERS.get(name, {}).get(impl)
    if function is None:
        if impl not in dispatch.implementations(subject.folder, subject.function):
            return None
        function = subject.call(impl)

    def forward(free, fixed, slopes):
        return function(**free, **fixed)

    free, fixed = subject.parts()
    slopes = jax.tree.unflatten(jax.tree.structure(subject.outputs()), cotangents(subject))
    placed = jax.tree.map(jnp.asarray, (free, fixed, slopes))
    run = jax.jit(both_passes(function) if both else forward).lower(*placed).compile()
    temporary = run.memory_analysis().temp_size_in_bytes
    return (lambda: jax.block_until_ready(jax.tree.leaves(run(*placed)))), temporary


def cotangents(subject) -> list[np.ndarray]:
    """Random slopes of all outputs, the same for every side."""
    rng = np.random.default_rng(1)
    outputs = jax.tree.leaves(subject.outputs())
    return [rng.normal(size=o.shape).astype(o.dtype) for o in outputs]


def roofline(subject, results, both, rates) -> float:
    """Seconds below which the call cannot go at the measured rates."""
    flops = survey.model_flops(subject) / (1 if both else 3)
    moved = sum(x.size * x.dtype.itemsize for x in (*subject.arrays.values(), *results))
    return max(flops / rates[0], moved / rates[1])


def measured_rates() -> tuple[float, float]:
    """FLOP/s of a large product and bytes/s of an update in place, best of several."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a: a @ a)
    long = jnp.ones(1 << 26, jnp.float32)
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)
    fastest = min(_seconds(lambda: product(a)) for _ in range(5))
    moves = []
    for _ in range(5):
        begin = time.perf_counter()
        long = jax.block_until_ready(copy(long))
        moves.append(time.perf_counter() - begin)
    return 2 * size**3 / fastest, 2 * long.nbytes / min(moves)


def _seconds(run) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - begin


def difference(found: np.ndarray, want: np.ndarray) -> float:
    """||found - want|| / ||want|| in float64."""
    found, want = found.astype(np.float64), want.astype(np.float64)
    return float(np.linalg.norm(found - want) / max(np.linalg.norm(want), 1e-30))


def describe() -> str:
    """The device and the versions."""
    device = jax.devices()[0]
    versions = [f"jax {jax.__version__}"]
    if wanted:
        versions.append(f"torch {peers.torch.__version__}")
    kind = platform.processor() or platform.machine() if device.platform == "cpu" else ""
    cores = f", {os.cpu_count()} cores" if device.platform == "cpu" else ""
    return f"{device.device_kind} {kind}{cores}; Python {platform.python_version()}, " + ", ".join(
        versions
    )


def cells(line: dict) -> list[str]:
    """One line of the table as text."""
    fast, middle, slow = line["ms"]
    temporary = "" if line["temporary_mb"] is None else f"{line['temporary_mb']:.1f}"
    return [
        line["operation"],
        line["pass"],
        line["implementation"],
        f"{middle:.1f} ({fast:.1f} to {slow:.1f})",
        f"{line['ratio']:.2f}",
        f"{line['cpu_ms']:.1f}",
        temporary,
        f"{line['share']:.0%}",
        f"{line['error']:.0e}" + ("" if line["agrees"] else " DIFFERS"),
    ]


def markdown(lines: list[dict], setting: str, rates: tuple[float, float]) -> str:
    """The table with its setting."""
    rows = [HEAD, ["---"] * len(HEAD), *(cells(line) for line in lines)]
    body = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    known = f"{setting}; matmul {rates[0] / 1e9:.0f} GFLOP/s, copy {rates[1] / 1e9:.1f} GB/s."
    command = "python benchmarks/operations.py " + " ".join(sys.argv[1:])
    return f"# Kernel speed\n\nWritten by `{command}`. {known}\n\n{body}\n"


if __name__ == "__main__":
    sys.exit(main())
