"""Interleaved timing, and the tables that are made of it."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

BEGIN, END = "<!-- cpu_vs_torch: begin -->", "<!-- cpu_vs_torch: end -->"


def interleave(
    sides: dict[str, Callable[[], object]], rounds: int, least_s: float = 0.5
) -> dict[str, list[dict]]:
    """Time the sides in turn, in the order A B, then B A, and so on, `rounds` times.

    A turn repeats its side for at least `least_s` seconds (and once). Returns for each side one
    dict a round: `wall`, the seconds of each call, and `cpu`, CPU seconds of all threads per call.
    """
    repeats = {}
    for name, side in sides.items():
        start = time.perf_counter()
        side()
        repeats[name] = max(1, round(least_s / (time.perf_counter() - start)))
    taken = {name: [] for name in sides}
    for i in range(rounds):
        names = list(sides) if i % 2 == 0 else list(sides)[::-1]
        for name in names:
            taken[name].append(_turn(sides[name], repeats[name]))
    return taken


def _turn(side: Callable[[], object], repeats: int) -> dict:
    if repeats > 1:
        side()  # wakes this side's threads and warms its caches; not counted
    wall, cpu = [], time.process_time()
    for _ in range(repeats):
        start = time.perf_counter()
        side()
        wall.append(time.perf_counter() - start)
    return dict(wall=wall, cpu=(time.process_time() - cpu) / repeats)


def summarize(taken: dict[str, list[dict]], tokens: int) -> dict:
    """Tokens/s of each side (p20, median, p80 over calls), and ratios to the side "ours"."""
    out = {"tokens": tokens}
    seconds = {name: np.concatenate([r["wall"] for r in rounds]) for name, rounds in taken.items()}
    for name, wall in seconds.items():
        slow, middle, fast = np.percentile(wall, [80, 50, 20])
        out[name] = dict(
            calls=len(wall),
            p20=tokens / slow,
            median=tokens / middle,
            p80=tokens / fast,
            cpu_s=statistics.median(r["cpu"] for r in taken[name]),
        )
    for name in taken:
        if name == "ours":
            continue
        pairs = zip(taken[name], taken["ours"], strict=True)
        ratios = [float(np.median(a["wall"]) / np.median(b["wall"])) for a, b in pairs]
        out[name] |= dict(
            ratio=float(np.median(seconds[name]) / np.median(seconds["ours"])),
            ratio_rounds=ratios,
            ratio_cpu=out[name]["cpu_s"] / out["ours"]["cpu_s"],
        )
    return out


def line(record: dict) -> str:
    """One result for the terminal."""
    ours, theirs, times = record["times"]["ours"], record["times"]["theirs"], record["times"]
    rounds = theirs["ratio_rounds"]
    text = (
        f"  tokens/s ours {_range(ours)}, transformers {_range(theirs)}\n"
        f"  ratio {theirs['ratio']:.2f} (rounds {min(rounds):.2f} to {max(rounds):.2f}; "
        f"CPU seconds {theirs['ratio_cpu']:.2f}), {_verdict(record)}"
    )
    if "tuned" in times:
        tuned = times["tuned"]
        text += f"\n  against tuned transformers {_range(tuned)}: ratio {tuned['ratio']:.2f}"
    return text


def markdown(records: list[dict], setting: str) -> str:
    """The table of docs/cpu_speed.md."""
    tuned = any("tuned" in record["times"] for record in records)
    head = ["", "model", "parameters", "ours, tokens/s", "transformers, tokens/s", "ratio"]
    head += ["rounds", "CPU seconds", "demanded"] + (["ratio to tuned"] if tuned else [])
    head += ["logits differ by", "gradients differ by"]
    rows = [head, ["---"] * len(head)]
    for record in records:
        theirs = record["times"]["theirs"]
        rounds = theirs["ratio_rounds"]
        row = [
            f"{record['mode']}, {record['size']}",
            record["title"],
            f"{record['parameters'] / 1e6:.2f} M",
            _range(record["times"]["ours"]),
            _range(theirs),
            f"**{theirs['ratio']:.2f}**",
            f"{min(rounds):.2f} to {max(rounds):.2f}",
            f"{theirs['ratio_cpu']:.2f}",
            f"{record['target']:.1f}" if record["target"] else "",
        ]
        if tuned:
            other = record["times"].get("tuned")
            row.append(f"{other['ratio']:.2f}" if other else "")
        row.append(f"{record['logits_error']:.0e}")
        row.append(f"{record['gradient_error']:.0e}" if "gradient_error" in record else "")
        rows.append(row)
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"{setting}\n\n{table}"


def replace_block(page: Path, text: str) -> None:
    """Put `text` between the page's two markers; ValueError if they are not there."""
    old = page.read_text()
    if BEGIN not in old or END not in old:
        raise ValueError(f"{page} has no table; add the lines {BEGIN} and {END} to it.")
    before, rest = old.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def _range(side: dict) -> str:
    return f"{side['median']:,.0f} ({side['p20']:,.0f} to {side['p80']:,.0f})"


def _verdict(record: dict) -> str:
    target = record["target"]
    if not target:
        return "nothing demanded"
    met = record["times"]["theirs"]["ratio"] >= target
    return f"demanded {target:.1f}: {'met' if met else 'NOT met'}"
