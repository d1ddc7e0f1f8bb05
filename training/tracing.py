"""A trace of some steps of a run, as `--profile=A:B` asks for, for xprof and Perfetto."""

from collections.abc import Callable
from pathlib import Path

import jax


class Trace:
    """Writes a trace of steps `first` to `last` to `folder`/profile; a context around the steps.

    Where the run resumes within the span, or ends within it by its last step, a signal or an error,
    the trace has the steps that there were. `steps` are those of the whole run, `done` those that
    it has from before. Raises ValueError where no step of the span is left, unless the run traced
    it earlier: then the same command must be able to resume.
    """

    def __init__(self, span: tuple[int, int] | None, folder: Path, done: int, steps: int):
        self._folder = folder / "profile"
        self._first, self._last = span or (0, -1)
        self._open = False
        if span is None:
            return
        check(span, steps)
        if self._last <= done and not self._folder.exists():
            later = f"Trace a step after {done}, or leave" if done < steps else "Leave"
            raise ValueError(
                f"--profile={self._first}:{self._last}: the run has done {done} of {steps} steps. "
                f"{later} --profile out."
            )

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """Start the trace where `step` is the first of the span that this process does."""
        if self._first <= step <= self._last and not self._open:
            many = jax.process_count() > 1
            part = self._folder / f"process_{jax.process_index()}" if many else self._folder
            jax.profiler.start_trace(str(part))
            self._open = True

    def after(self, step: int, wait: Callable[[], None]) -> None:
        """Stop it after the last step of the span, which `wait` waits for."""
        if self._open and step >= self._last:
            wait()
            self._stop()

    def _stop(self) -> None:
        if self._open:
            self._open = False
            jax.profiler.stop_trace()


def check(span: tuple[int, int] | None, steps: int) -> None:
    """ValueError for a span that no run of so many steps touches."""
    if span is not None and (span[1] < 1 or span[0] > steps):
        raise ValueError(
            f"--profile={span[0]}:{span[1]}: the run has the steps 1 to {steps}. "
            f"Trace some of them, such as --profile={max(1, steps - 5)}:{steps}."
        )
