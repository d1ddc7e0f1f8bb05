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
import platform
import sys
import time
from pathlib import Path

# Idle OpenMP threads sleep instead of spinning on cores that the other side is timed on; libgomp
# reads this once, when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import _peers as peers  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

# After transformers: this root holds a package `kernels`, and transformers looks for another one.
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from parallel import launch  # noqa: E402

launch.prepare()

import _sides as sides  # noqa: E402
import _table as table  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402

from parallel import host  # noqa: E402

LOGITS, LOSSES, GRADIENTS = 1e-4, 1e-3, 1e-3  # tolerances
WARM_STEPS, BATCHES = 5, 8
PROMPT, NEW_TOKENS = 16, 128


class Mismatch(Exception):
    """The two sides do not compute the same."""


def main() -> int:
    """Run the chosen comparisons; 0 when all outputs agree, 1 when some do not."""
    args = _arguments()
    host.keep_memory()  # as train.py does; it holds for both sides
    torch.set_num_threads(args.threads)
    jax.config.update("jax_platforms", "cpu")
    if transformers.utils.is_kernels_available():
        raise RuntimeError("transformers took this repository's `kernels` for another package.")
    setting = _setting(args.threads)
    print(setting, flush=True)
    records, failed = [], []
    for mode, size, name in _chosen(args):
        started = time.perf_counter()
        try:
            record = compare(mode, size, name, args)
        except Mismatch as error:
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
    add("--size", choices=list(peers.BATCH), action="append", help="default: all demanded")
    add("--model", choices=list(peers.PAIRS), action="append", help="default: all demanded")
    add("--mode", choices=peers.MODES, action="append", help="default: all demanded")
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
        for (mode, size), targets in peers.TARGETS.items()
        for name in targets
        if (not args.mode or mode in args.mode)
        and (not args.size or size in args.size)
        and (not args.model or name in args.model)
    ]


def _setting(threads: int) -> str:
    """The machine and the versions, in one paragraph."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [row for row in info.read_text().splitlines() if row.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{cpu}, {os.cpu_count()} cores (load before the run {load}); Python "
        f"{platform.python_version()}, jax {jax.__version__} (its pool uses all cores), torch "
        f"{torch.__version__} ({threads} threads, {os.environ['OMP_WAIT_POLICY']} waiting), "
        f"transformers {transformers.__version__}; float32."
    )


def compare(mode: str, size: str, name: str, args) -> dict:
    """One result: check that both sides agree, then time them in turn. Raises Mismatch."""
    pair = peers.PAIRS[name]
    shape = pair.shapes[size]
    config = sides.our_config(pair, shape, args.layers)
    params = sides.our_weights(config)
    model = peers.their_model(pair, shape, params)
    record = dict(
        mode=mode,
        size=size,
        model=name,
        title=pair.title,
        width=shape.width,
        depth=shape.depth,
        batch=peers.BATCH[size] if mode == "train" else 1,
        parameters=sides.count(params),
        target=peers.TARGETS.get((mode, size), {}).get(name, 0.0),
        layers=args.layers,
    )
    theirs = sum(weight.numel() for weight in model.parameters())
    print(
        f"\n{mode} {size} {pair.title}: width {shape.width}, {shape.depth} layers, "
        f"{record['parameters']:,} parameters (transformers {theirs:,})",
        flush=True,
    )
    tokens = _tokens(peers.BATCH[size])
    _check_logits(record, config, params, model, tokens)
    run = _train if mode == "train" else _decode
    return run(record, pair, shape, config, params, model, tokens, args)


def _tokens(batch: int) -> np.ndarray:
    """Several batches of uniformly random tokens (N, B, LENGTH + 1)."""
    rng = np.random.default_rng(1)
    return rng.integers(0, peers.VOCABULARY, (BATCHES, batch, peers.LENGTH + 1), dtype=np.int64)


def _check_logits(record, config, params, model, tokens) -> None:
    rows = tokens[0, :1, :-1]
    ours, theirs = sides.our_logits(config, params, rows), sides.their_logits(model, rows)
    record["logits_error"] = error = sides.rms_error(ours, theirs)
    print(f"  logits differ by {error:.1e} (relative RMS)", flush=True)
    if not error <= LOGITS:
        raise Mismatch(f"logits differ by {error:.1e}; at most {LOGITS:.0e} is allowed.")


def _train(record, pair, shape, config, params, model, tokens, args) -> dict:
    batch = record["batch"]
    ours, our_gradient = sides.our_step(config, params, batch)
    theirs, their_gradient = sides.their_step(model)
    started = time.perf_counter()
    pairs = [(ours(tokens[0]), theirs(tokens[0]))]
    record["first_step_s"] = time.perf_counter() - started
    error, worst = sides.gradient_error(pair, our_gradient(), their_gradient())
    pairs += [(ours(rows), theirs(rows)) for rows in tokens[1:WARM_STEPS]]
    losses = max(abs(a - b) / b for a, b in pairs)
    record |= dict(gradient_error=error, worst_gradient=worst, losses=pairs, losses_error=losses)
    text = ", ".join(f"{a:.4f}/{b:.4f}" for a, b in pairs)
    print(f"  gradients differ by {error:.1e} at most ({worst})\n  losses {text}", flush=True)
    if not error <= GRADIENTS or not losses <= LOSSES:
        raise Mismatch(
            f"gradients differ by {error:.1e}, losses by {losses:.1e}; "
            f"at most {GRADIENTS:.0e} and {LOSSES:.0e} are allowed."
        )
    steps = {"ours": ours, "theirs": theirs}
    if args.tuned:
        tuned = peers.their_model(pair, shape, params, tuned=True)
        steps["tuned"] = sides.their_step(tuned, fused=True)[0]
    rows = {name: _cycle(tokens) for name in steps}
    runs = {name: lambda s=step, r=rows[name]: s(next(r)) for name, step in steps.items()}
    taken = table.interleave(runs, args.rounds)
    return record | dict(taken=taken, times=table.summarize(taken, batch * peers.LENGTH))


def _cycle(tokens):
    while True:
        yield from tokens


def _decode(record, pair, shape, config, params, model, tokens, args) -> dict:
    prompt = tokens[0, :1, :PROMPT]
    ours = sides.our_decode(config, params, prompt, NEW_TOKENS)
    theirs = sides.their_decode(pair, model, prompt, NEW_TOKENS)
    mine, other = ours(), theirs()
    # Greedy choices may part at a near tie; before that they must be the same.
    same = int(np.cumprod(mine[0] == other[0]).sum()) if mine.shape == other.shape else 0
    distinct = len(set(other[0].tolist()))
    record |= dict(prompt=PROMPT, new_tokens=NEW_TOKENS, equal_tokens=same, distinct=distinct)
    text = f"  the first {same} of {NEW_TOKENS} tokens are equal ({distinct} distinct)"
    print(text, flush=True)
    if same < NEW_TOKENS // 2:
        raise Mismatch(f"only the first {same} of {NEW_TOKENS} generated tokens are equal.")
    taken = table.interleave({"ours": ours, "theirs": theirs}, args.rounds)
    return record | dict(taken=taken, times=table.summarize(taken, NEW_TOKENS))


if __name__ == "__main__":
    raise SystemExit(main())
