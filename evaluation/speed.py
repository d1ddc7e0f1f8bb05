"""How fast: training steps, reading prompts and writing after them, several configs in turn."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from evaluation.subject import DECODED, Subject
from report.report import Contest
from resources import intervals, throughput
from resources.row import Row, not_available

ENCODER = "an encoder writes no text"
CALLS = 9  # at least: a 99 % interval of the median needs 8
MOST = 50


class Timed(NamedTuple):
    """One kind of call of one config."""

    timing: throughput.Timing
    tokens: int  # that a call works on
    compiled: throughput.Compiled


def training(subject: Subject) -> tuple[throughput.Compiled, Callable[[], Any], int]:
    """The compiled step, a call that does one step after another, and the tokens of a call."""
    compiled, batch, state = subject.train, subject.batch, subject.state()

    def call():
        nonlocal state
        state, metrics = compiled.program(state, batch)
        return state, metrics

    return compiled, call, subject.tokens


def prefilling(subject: Subject) -> tuple[throughput.Compiled, Callable[[], Any], int]:
    """The same for reading a batch of prompts, up to the first token to write."""
    writer, prompts = subject.writer, subject.batch["inputs"]
    return writer.prefill, lambda: writer.prefill.program(writer.weights, prompts), subject.tokens


def decoding(subject: Subject) -> tuple[throughput.Compiled, Callable[[], Any], int]:
    """The same for writing after the prompts."""
    writer = subject.writer
    token, state = writer.prefill.program(writer.weights, subject.batch["inputs"])

    def call():
        return writer.decode.program(writer.weights, token, state)

    return writer.decode, call, token.shape[0] * DECODED


KINDS = {"train": training, "prefill": prefilling, "decode": decoding}


def timed(subjects: Sequence[Subject], kind: str, seconds: float) -> list[Timed | None]:
    """One kind of call of each config, timed in turn for about `seconds` a config.

    None for an encoder where the kind writes text.
    """
    able = [i for i, subject in enumerate(subjects) if kind == "train" or subject.causal]
    ready = {str(i): KINDS[kind](subjects[i]) for i in able}
    if not ready:
        return [None] * len(subjects)
    calls = {i: call for i, (_, call, _) in ready.items()}
    once = throughput.interleaved(calls, warmup=1, repeats=1)
    share = seconds * len(calls) / sum(timing.median for timing in once.values())
    repeats = min(max(CALLS, int(share)), MOST)
    timings = throughput.interleaved(calls, warmup=0, repeats=repeats)
    found: list[Timed | None] = [None] * len(subjects)
    for i in able:
        compiled, _, tokens = ready[str(i)]
        found[i] = Timed(timings[str(i)], tokens, compiled)
    return found


def rows(kind: str, found: Timed | None) -> list[Row]:
    """Throughput, seconds of a call and of compiling."""
    if found is None:
        return [not_available(f"{kind} throughput", "tok/s", ENCODER)]
    return throughput.rows(kind, found.timing, found.tokens, found.compiled.seconds)


def latency(subjects: Sequence[Subject], seconds: float) -> list[list[Row]]:
    """Of one sequence alone: time to the first token after its prompt, and per token after that."""
    alone = [subject.alone() if subject.causal else subject for subject in subjects]
    columns: list[list[Row]] = [[] for _ in subjects]
    for name, kind in (("time to first token", "prefill"), ("time per output token", "decode")):
        for column, found in zip(columns, timed(alone, kind, seconds), strict=True):
            if found is None:
                column.append(not_available(f"{name}, median", "s", ENCODER))
                continue
            each = 1 if kind == "prefill" else DECODED
            column += throughput.latency_rows(name, found.timing, each)
    return columns


def contests(
    subjects: Sequence[Subject], kind: str, found: Sequence[Timed | None]
) -> list[Contest]:
    """Every config against the first one, by the ratio of the seconds of a token."""
    first = found[0]
    contests = []
    for subject, mine in zip(subjects[1:], found[1:], strict=True):
        if mine is None or first is None:
            continue
        scale = mine.tokens / first.tokens
        seconds = [scale * second for second in first.timing.seconds]
        ratio = intervals.ratio(seconds, mine.timing.seconds)
        interval = None if ratio.low is None or ratio.high is None else (ratio.low, ratio.high)
        names = subject.name, subjects[0].name
        contests.append(Contest(kind, *names, ratio.value, interval, intervals.describe(ratio)))
    return contests
