"""Tasks: rows made from a seed, a file a task, whose `Config` is all that must be written.

A task is a source (`data/sources`) that makes its own tokens: `--config.data.source=mqar`, or its
Config in a file. What all share is `Task`; docs/tasks.md lists them.
"""

from typing import Any


class Task:
    """What the Config of a task derives from; it has the two fields below, among others.

    `metric` names how it is scored (training/metrics.py); `chance` is the share of its answers that
    a guesser gets.
    """

    metric = "accuracy"
    examples: int  # training rows, the same in every epoch; 0: new ones for ever
    held_out: int  # rows of validation, and of test

    def symbols(self) -> tuple[str, ...]:
        """What each id is called; the last is the separator, which no row holds."""
        raise NotImplementedError

    def rows(self, draw: Any, length: int) -> dict[str, Any]:
        """`inputs`, `targets`, `weights` (B, T), by `draw`, a `data.draws.Draws`: the answer
        at t is due where weights[t] > 0.

        With `real` (B, T) too where rows end in padding: 0 there, 1 elsewhere.
        """
        raise NotImplementedError

    def places(self, length: int) -> int:
        """The most answers that a row has: logits are made at so many of its places."""
        return length

    def check(self, length: int) -> None:
        """ValueError in one line where the settings do not fit each other, or `length`."""

    def __str__(self) -> str:
        return type(self).__module__.rpartition(".")[2]
