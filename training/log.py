"""What a run says: records in JSON lines and TensorBoard files, a start block, a line or a bar."""

import contextlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from parallel import compile_cache
from training.manifest import write_atomic, write_json

PHASES = (
    "startup",
    "initialization",
    "compile",
    "restore",
    "data",
    "step",
    "evaluation",
    "save",
    "other",
)
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
EXACT = ("loss", "grad_norm")  # also recorded as hexadecimal floats, to compare runs bit by bit
PIPED = 10_000  # columns for what is piped: it is not cut to a screen's width
WIDE = 110  # columns of a terminal that has room for the bar and all numbers
ROOT = Path(__file__).resolve().parents[1]


class Account:
    """Where the wall time goes: seconds by phase, which add up to the time since `started`.

    `started` is a `time.perf_counter()` taken earlier (default: now). Time in no phase is "startup"
    until `settle` is called, then "other"; a phase inside a phase interrupts the outer one.
    """

    def __init__(self, started: float | None = None):
        self.seconds: dict[str, float] = {name: 0.0 for name in PHASES}
        self._mark = time.perf_counter() if started is None else started
        self._open = ["startup"]

    def settle(self) -> None:
        """The start is over: from here on, time in no phase is "other"."""
        self._turn()
        self._open[0] = "other"

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A context whose time is `name`'s, one of PHASES."""
        if name not in PHASES:
            raise ValueError(f"phase {name!r} is unknown. Use one of {', '.join(PHASES)}.")
        self._turn()
        self._open.append(name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def summary(self) -> dict[str, float]:
        """Seconds by phase until now, and their sum under "total"."""
        self._turn()
        return self.seconds | {"total": sum(self.seconds.values())}

    def text(self) -> str:
        """In one line: total seconds, the share of each phase that took time, the cache's part."""
        seconds = self.summary()
        total = seconds.pop("total")
        shares = sorted(seconds.items(), key=lambda item: -item[1])
        parts = [f"{name} {100 * s / total:.1f} %" for name, s in shares if s > 0.0005 * total]
        return f"{total:.1f} s: {', '.join(parts)}{_programs(**compile_cache.counts())}"

    def _turn(self) -> None:
        now = time.perf_counter()
        self.seconds[self._open[-1]] += now - self._mark
        self._mark = now


def _programs(cached: float, compiled: float, saved_s: float) -> str:
    """What the compile cache did, where it was used."""
    if not cached + compiled:
        return ""
    return f"; {cached:.0f} of {cached + compiled:.0f} programs from the compile cache"


class Log:
    """The log of one run in `folder`; a context. Every process keeps time, process 0 writes.

    `metrics.jsonl` has one record a line and no step twice, across any number of kills;
    `events.jsonl` is the history of starts, saves and the like. A full disk drops records with one
    warning; it does not end the run.
    """

    def __init__(self, folder: Path, total_steps: int, started: float | None = None):
        import jax

        self.folder = Path(folder)
        self.total_steps = total_steps
        self.metrics_path = self.folder / "metrics.jsonl"
        self.writes = jax.process_index() == 0
        self.account = Account(started)
        self.lost_steps = 0  # steps that a killed run did after the checkpoint resumed from
        self._metrics = _Lines(self.metrics_path)
        self._events = _Lines(self.folder / "events.jsonl")
        self._board: _Board | None = None
        self._terminal = _Terminal(total_steps)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind, error, _) -> None:
        self._terminal.close()
        if self._board:
            name = kind.__name__ if kind else ""
            programs = compile_cache.counts()
            self.event("end", error=name, goodput=self.account.summary(), programs=programs)
            self._board.close()
        self._metrics.close()
        self._events.close()

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        """A context whose time goes to the phase `name` of the account."""
        return self.account.phase(name)

    def begin(self, rows: dict[str, str], start_step: int, config: dict) -> None:
        """Open the files for a run whose step `start_step` is done, and print `rows` as a block.

        Records of later steps, which a killed run left, are dropped. `config` goes to config.json.
        """
        self.account.settle()
        if not self.writes:
            return
        environment(self.folder, config)
        self.lost_steps = drop_records(self.metrics_path, start_step)
        drop_torn_line(self.folder / "events.jsonl")
        self._board = _Board(self.folder, start_step)
        self.event("start", step=start_step, lost_steps=self.lost_steps)
        self._terminal.begin(rows, start_step)

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Write the numbers of `step`; a value that is not finite becomes null (see its _hex)."""
        if not self.writes:
            return
        values = {name: float(value) for name, value in metrics.items()}
        exact = {f"{name}_hex": values[name].hex() for name in EXACT if name in values}
        shown = {name: v if math.isfinite(v) else None for name, v in values.items()}
        self._metrics.append({"step": step} | shown | exact)
        if self._board:
            self._board.add(step, values)
        self._terminal.show(step, values)

    def event(self, name: str, **fields) -> None:
        """Append an event with the time of day (seconds since 1970) to events.jsonl."""
        if self.writes:
            self._events.append({"time": round(time.time(), 3), "event": name} | fields)

    def line(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if self.writes:
            self._terminal.line(text)


class _Lines:
    """A file of JSON lines, each written by one system call; a failed one leaves no part behind."""

    def __init__(self, path: Path):
        self._path = path
        self._file = None
        self._warned = False

    def append(self, record: dict) -> None:
        content = json.dumps(record).encode() + b"\n"
        try:
            self._file = self._file or open(self._path, "ab", buffering=0)
            end = self._file.seek(0, os.SEEK_END)
            if self._file.write(content) != len(content):
                self._file.truncate(end)
                raise OSError(f"only a part of a line fitted into {self._path.name}")
        except OSError as error:
            if not self._warned:
                reason = error.strerror or error
                print(
                    f"log error: {self._path.name}: {reason}. Records are dropped until it works.",
                    file=sys.stderr,
                )
            self._warned = True

    def close(self) -> None:
        if self._file:
            self._file.close()


class _Board:
    """Scalars for TensorBoard, written at once: a queue would block when its writer dies."""

    def __init__(self, folder: Path, start_step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2 as proto
        from tensorboardX.summary import scalar

        # The names in `proto` are made when it is imported, so no type checker sees them.
        self._make, session = proto.Event, proto.SessionLog  # pyright: ignore
        self._scalar, self._writer = scalar, None
        with contextlib.suppress(OSError):
            (folder / "events").mkdir(exist_ok=True)
            self._writer = EventsWriter(str(folder / "events" / "events"), f".{os.getpid()}")
        # Tells TensorBoard to forget what killed runs wrote about the steps to come.
        self._write(start_step + 1, session_log=session(status=session.START))

    def add(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            part = "validation" if name.startswith("validation_") else "train"
            tag = f"{part}/{name.removeprefix('validation_')}"
            self._write(step, summary=self._scalar(tag, value))

    def close(self) -> None:
        if self._writer:
            with contextlib.suppress(OSError):
                self._writer.close()

    def _write(self, step: int, **content) -> None:
        if self._writer:
            with contextlib.suppress(OSError):
                self._writer.write_event(self._make(step=step, wall_time=time.time(), **content))
                self._writer.flush()


def print_block(rows: dict[str, str]) -> None:
    """Print names and values as two aligned columns."""
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(Text(name, style="bold"), Text(str(value), overflow="fold"))
    _console().print(table)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else PIPED, highlight=False)


class _Terminal:
    """A progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, total_steps: int):
        self._total = total_steps
        self._live = sys.stdout.isatty()
        self._console = _console()
        self._wide = not self._live or self._console.width >= WIDE
        self._bar: Progress | None = None
        self._first: tuple[int, float] | None = None

    def begin(self, rows: dict[str, str], start_step: int) -> None:
        print_block(rows)
        if self._live:
            bar = [BarColumn(16)] if self._wide else []
            text = TextColumn("{task.fields[text]}", markup=False)
            self._bar = Progress(*bar, text, console=self._console, auto_refresh=False)
            self._task = self._bar.add_task("", total=self._total, completed=start_step, text="")
            self._bar.start()

    def show(self, step: int, values: dict[str, float]) -> None:
        train = "loss" in values
        hidden = () if self._wide or not train else ("bits_per_byte", "bits_per_answer")
        text = f"step {step}/{self._total}  {_words(values, hidden)}"
        if train:
            text += f"  eta {self._eta(step)}"
        if train and self._bar:
            self._bar.update(self._task, completed=step, text=text)
            self._bar.refresh()
        else:
            self.line(text)

    def line(self, text: str) -> None:
        if self._live:
            self._console.print(Text(text))
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()

    def _eta(self, step: int) -> str:
        now = time.perf_counter()
        self._first = self._first or (step, now)
        first, then = self._first
        if step == first:
            return "-"
        left = round(max(0, self._total - step) * (now - then) / (step - first))
        hours, minutes = left // 3600, left // 60 % 60
        return f"{hours}:{minutes:02}:{left % 60:02}" if hours else f"{minutes}:{left % 60:02}"


def _words(values: dict[str, float], hidden: tuple[str, ...]) -> str:
    known = {
        "loss": "loss {:.4f}",
        "bits_per_byte": "{:.4f} bits/byte",
        "bits_per_answer": "{:.4f} bits/answer",
        "validation_bits_per_byte": "validation {:.4f} bits/byte",
        "validation_accuracy": "validation accuracy {:.4f}",
        "validation_token_accuracy": "validation accuracy of tokens {:.4f}",
        "validation_exact": "validation {:.4f} of rows all right",
        "grad_norm": "grad {:.3g}",
        "learning_rate": "lr {:.2e}",
        "tokens_per_s": "{:,.0f} tok/s",
    }
    shown = [name for name in known if name in values and name not in hidden]
    return "  ".join(known[name].format(values[name]) for name in shown)


def _parsed(line: bytes) -> dict | None:
    """The record on a whole line, None for anything else."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def records(path: Path) -> list[dict]:
    """The records of the JSON lines at `path`, without a line that a kill has torn."""
    found = map(_parsed, path.read_bytes().splitlines(keepends=True))
    return [record for record in found if record is not None]


def drop_records(path: Path, step: int) -> int:
    """Remove from the JSON lines at `path` what is torn or of steps after `step` (0: everything).

    Returns how many steps beyond `step` the file had reached.
    """
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    steps = [(_parsed(line) or {}).get("step", math.inf) for line in lines]
    kept = [line for line, at in zip(lines, steps, strict=True) if at <= step and step > 0]
    if len(kept) < len(lines):
        write_atomic(path, b"".join(kept))
    reached = max((at for at in steps if at < math.inf), default=0)
    return max(0, reached - step)


def drop_torn_line(path: Path) -> None:
    """Cut the JSON lines at `path` after the last whole one."""
    content = path.read_bytes() if path.exists() else b""
    if content and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def environment(folder: Path, config: dict) -> None:
    """Write config.json (`config`) and environment.json: commit, versions, flags and devices.

    No name of a user, a machine or a folder is written: paths in XLA_FLAGS become "PATH".
    """
    import jax

    # Names the flags that shaped the numbers; nothing here acts on them.
    flags = os.environ.get("XLA_FLAGS", "")
    device = jax.devices()[0]
    facts = {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "xla_flags": re.sub(r"[^\s=]*/\S*", "PATH", flags),
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
    }
    for name, content in (("config", config), ("environment", facts)):
        write_json(Path(folder) / f"{name}.json", content)


def _git(*command: str) -> str | None:
    """What git says of this checkout; None if it is none, or has no commit."""
    if not (ROOT / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *command], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
