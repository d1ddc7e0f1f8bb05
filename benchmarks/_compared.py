"""One comparison of cpu_vs_torch.py: that both sides compute the same, then their times in turn."""

import os
import platform
import time
from pathlib import Path

import _figures as figures
import _peers as peers
import _sides as sides
import _table as table
import jax
import numpy as np
from _transformers import torch, transformers

LOGITS, LOSSES, GRADIENTS = 1e-4, 1e-3, 1e-3  # tolerances
WARM_STEPS, BATCHES = 5, 8
PROMPT, NEW_TOKENS = 16, 128


class Mismatch(Exception):
    """The two sides do not compute the same."""


def setting(threads: int) -> str:
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
        batch=figures.BATCH[size] if mode == "train" else 1,
        parameters=sides.count(params),
        target=figures.TARGETS.get((mode, size), {}).get(name, 0.0),
        layers=args.layers,
    )
    theirs = sum(weight.numel() for weight in model.parameters())
    print(
        f"\n{mode} {size} {pair.title}: width {shape.width}, {shape.depth} layers, "
        f"{record['parameters']:,} parameters (transformers {theirs:,})",
        flush=True,
    )
    tokens = _tokens(figures.BATCH[size])
    _check_logits(record, config, params, model, tokens)
    run = _train if mode == "train" else _decode
    return run(record, pair, shape, config, params, model, tokens, args)


def _tokens(batch: int) -> np.ndarray:
    """Several batches of uniformly random tokens (N, B, LENGTH + 1)."""
    rng = np.random.default_rng(1)
    return rng.integers(0, figures.VOCABULARY, (BATCHES, batch, figures.LENGTH + 1), dtype=np.int64)


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
    return record | dict(taken=taken, times=table.summarize(taken, batch * figures.LENGTH))


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
