"""What stands between a run and the world: exit codes, signals, hangs, locks and bad steps."""

import contextlib
import faulthandler
import fcntl
import os
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from configs.schema import on_disk

OK, USAGE, NO_CHECKPOINT, STORAGE, NON_FINITE, HANG = 0, 2, 3, 4, 5, 6  # exit codes


class Stop(Exception):
    """A run that cannot go on; its text is one line for the user, `code` the exit code."""

    code: int = 1


class NonFinite(Stop):
    """Too many non-finite steps in a row."""

    code = NON_FINITE


class InUse(ValueError):
    """Another job trains in the workdir."""


def preflight(workdir: Path | str, need_bytes: int = 0) -> None:
    """Create `workdir` and try it; ValueError if it is a file, not writable or too full."""
    folder = Path(on_disk(str(workdir), "workdir"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write_test.{uuid.uuid4().hex}"
        probe.write_bytes(b"x")
        probe.unlink()
    except (FileExistsError, NotADirectoryError):
        raise ValueError(
            f"workdir={workdir} is a file, or lies under one. Name a folder, new or old."
        ) from None
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(
            f"workdir={workdir} is not writable ({reason}). Name a folder that you may write to."
        ) from None
    free = shutil.disk_usage(folder).free
    if free < need_bytes:
        raise ValueError(
            f"workdir={workdir} has {free / 1e9:.2f} GB free, the run needs {need_bytes / 1e9:.2f} "
            "GB. Free some space or use another disk."
        )


class RunLock:
    """Only one job at a time in a workdir: a context; the job's first process holds `run.lock`.

    `agree` gives every process of the job what the first one passed. Entering raises InUse
    in all of them when another job holds the lock. The kernel lets go of it when the process ends,
    however it ends, and children do not inherit it.
    """

    def __init__(
        self, workdir: Path, first: bool = True, agree: Callable[[str], str] = lambda fault: fault
    ):
        self.path = Path(workdir) / "run.lock"
        self._first, self._agree = first, agree
        self._file = None

    def __enter__(self) -> "RunLock":
        if fault := self._agree(self._take() if self._first else ""):
            raise InUse(fault)
        return self

    def _take(self) -> str:
        """Lock the file; what stands against it, or ""."""
        file = open(self.path, "a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            return (
                f"workdir={self.path.parent} is in use by process {holder} (run.lock). "
                "Wait for it, stop it, or use another workdir."
            )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        self._file = file
        return ""

    def __exit__(self, *_) -> None:
        # The file stays: removing it would let two runs lock two files of the same name.
        if self._file:
            self._file.close()


class GracefulStop:
    """SIGTERM or SIGINT sets `requested`; a second one ends the process at once with 128 + number.

    A context; handlers are put back on exit, and outside the main thread it does nothing. A thread
    reads the numbers from a pipe that the C handler fills, so a second signal works while the main
    thread compiles or waits for a device. Signals within `BOUNCE_S` count as one: `timeout` and
    some job managers send to the process and to its group.
    """

    BOUNCE_S = 0.1
    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.requested = False
        self._old = {}
        self._first = None

    def __enter__(self) -> "GracefulStop":
        if threading.current_thread() is not threading.main_thread():
            return self
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._old = {number: signal.signal(number, self._request) for number in self.SIGNALS}
        self._old_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._reader = threading.Thread(target=self._count, name="signals", daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_) -> None:
        if not self._old:
            return
        signal.set_wakeup_fd(self._old_wakeup)
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}
        os.close(self._write)
        self._reader.join()
        os.close(self._read)

    def _request(self, number, frame) -> None:
        self.requested = True

    def _count(self) -> None:
        while numbers := os.read(self._read, 64):
            for number in numbers:
                if number in self.SIGNALS:
                    self._seen(number)

    def _seen(self, number: int) -> None:
        now = time.monotonic()
        self.requested = True
        if self._first is None:
            self._first = now
            name = signal.Signals(number).name
            _say(f"{name}: the run saves and ends after this step; a second signal ends it now.")
        elif now - self._first > self.BOUNCE_S:
            os._exit(128 + number)


def _say(line: str) -> None:
    # One system call on the descriptor: safe whatever the main thread holds just now.
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())


class Watchdog:
    """Ends the process with code 6 when `beat` was not called for `timeout_s` seconds (0: never).

    A context. The stacks of all threads go to stderr and to `hang.txt` in `workdir`. Time is the
    sum of its own short waits, so a process that was suspended is not taken for one that hangs.
    """

    def __init__(self, timeout_s: float, workdir: Path):
        if timeout_s < 0:
            raise ValueError(f"guards.hang_timeout_s={timeout_s} is negative. Use 0 for off.")
        self.timeout_s = timeout_s
        self.path = Path(workdir) / "hang.txt"
        self._beats = 0
        self._end = threading.Event()
        self._thread = None

    def __enter__(self) -> "Watchdog":
        if self.timeout_s:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._end.set()
        if self._thread:
            self._thread.join()

    def beat(self) -> None:
        """Say that the run made progress."""
        self._beats += 1

    def _watch(self) -> None:
        tick = min(1.0, self.timeout_s / 20)
        seen, quiet_s = self._beats, 0.0
        while not self._end.wait(tick):
            quiet_s += tick
            if self._beats != seen:
                seen, quiet_s = self._beats, 0.0
            elif quiet_s > self.timeout_s:
                self._report()
                os._exit(HANG)

    def _report(self) -> None:
        line = f"hang error: no finished step for {self.timeout_s:g} s. Stacks: {self.path}"
        _say(line)
        with contextlib.suppress(OSError):
            faulthandler.dump_traceback(file=2, all_threads=True)
        # What hangs may be the disk itself, so nothing waits long for this file.
        writer = threading.Thread(target=self._write, args=(line,), daemon=True)
        writer.start()
        writer.join(timeout=5.0)

    def _write(self, line: str) -> None:
        with contextlib.suppress(OSError), open(self.path, "w") as file:
            file.write(line + "\n")
            file.flush()
            faulthandler.dump_traceback(file=file, all_threads=True)


class BadSteps:
    """Counts non-finite steps; `max_bad_steps` in a row raise NonFinite."""

    def __init__(self, max_bad_steps: int):
        if max_bad_steps < 1:
            raise ValueError(f"guards.max_bad_steps={max_bad_steps} is too small. Use 1 or more.")
        self.max_bad_steps = max_bad_steps
        self.in_a_row = 0
        self.total = 0

    def update(self, finite: bool, step: int) -> None:
        """Note whether loss and gradient of `step` were finite (its update was skipped if not)."""
        if finite:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self.total += 1
        if self.in_a_row >= self.max_bad_steps:
            first = step - self.in_a_row + 1
            span = f"step {step}" if first == step else f"steps {first}-{step}"
            raise NonFinite(
                f"numerics error: non-finite loss or gradient {self.in_a_row} step(s) in a row "
                f"({span}). No bad update was applied and no checkpoint was overwritten. "
                "Lower optimizer.learning_rate or look at the data of these steps."
            )
