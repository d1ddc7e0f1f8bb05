"""CPU speed beside `transformers`: same architecture, weights and tokens, in one process, in turn.

    python benchmarks/cpu_vs_torch.py                           # every demanded figure
    python benchmarks/cpu_vs_torch.py --size small --model llama --mode train --rounds 15
    python benchmarks/cpu_vs_torch.py --json runs/cpu.json --markdown docs/cpu_speed.md

Needs torch and transformers beside this repository's own requirements; run it as a file, not with
-m. A result is timed only after the two sides' logits agree to 1e-4 (relative RMS), and for
training the losses of five steps and the gradients of the first to 1e-3; otherwise the exit code
is 1. What the numbers mean: docs/cpu_speed.md.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import _figures as figures

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Run the chosen comparisons; 0 when all outputs agree, 1 when some do not."""
    args = _arguments()
    # Idle OpenMP threads sleep instead of spinning on cores that the other side is timed on;
    # libgomp reads this once, when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import _transformers

    sys.path.insert(0, str(ROOT))  # after transformers, which must not find our `kernels`
    from parallel import host, launch

    launch.prepare()
    import _compared
    import _table as table
    import jax

    host.keep_memory()  # as train.py does; it holds for both sides
    _transformers.torch.set_num_threads(args.threads)
    jax.config.update("jax_platforms", "cpu")
    setting = _compared.setting(args.threads)
    print(setting, flush=True)
    records, failed = [], []
    for mode, size, name in _chosen(args):
        started = time.perf_counter()
        try:
            record = _compared.compare(mode, size, name, args)
        except _compared.Mismatch as error:
            failed.append(f"{mode} {size} {name}")
            print(f"  MISMATCH: {error}", flush=True)
            continue
        records.append(record)
        print(f"{table.line(record)}\n  took {time.perf_counter() - started:.0f} s", flush=True)
    if args.json:
        text = json.dumps({"setting": setting, "records": records, "failed": failed}, indent=1)
        Path(args.json).write_text(text)
    print("\n" + table.markdown(records, setting))
    if failed:
        print(f"\noutputs differ: {', '.join(failed)}", file=sys.stderr)
        return 1
    if args.markdown:
        table.replace_block(Path(args.markdown), table.markdown(records, setting))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--size", choices=list(figures.BATCH), action="append", help="default: all demanded")
    add("--model", choices=figures.MODELS, action="append", help="default: all demanded")
    add("--mode", choices=figures.MODES, action="append", help="default: all demanded")
    add("--rounds", type=int, default=7, help="turns of each side (default 7)")
    add("--threads", type=int, default=2, help="torch threads (default 2)")
    add("--layers", choices=["unrolled", "scanned"], default="unrolled", help="our layers")
    add("--tuned", action="store_true", help="also time transformers at its best settings")
    add("--json", metavar="FILE", help="write all numbers there")
    add("--markdown", metavar="FILE", help="replace the table of this page")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds} must be at least 1")
    return args


def _chosen(args) -> list[tuple[str, str, str]]:
    """The demanded figures, or all that the options name (demanded or not)."""
    if args.size and args.model and args.mode:
        return [(m, s, n) for m in args.mode for s in args.size for n in args.model]
    return [
        (mode, size, name)
        for (mode, size), targets in figures.TARGETS.items()
        for name in targets
        if (not args.mode or mode in args.mode)
        and (not args.size or size in args.size)
        and (not args.model or name in args.model)
    ]


if __name__ == "__main__":
    raise SystemExit(main())
