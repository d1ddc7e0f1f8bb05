"""Which calls of a traced program are operations: who counts asks, who dispatches them answers.

    with labelling() as labels:            # the counter, around a trace
        program = jax.make_jaxpr(function)(*args)

Within the block a dispatcher finds the record by `current()`, traces each call as a jitted function
of its own and enters a label under that function's name: a jaxpr then says which of its equations
belong to which operation, and so do those of its gradient.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import jax


class Label(NamedTuple):
    """What one traced call of an operation says of itself."""

    name: str  # as kernels.<operation>.<function>
    flops: float | None  # that its mathematics needs, where that is declared
    elements: int  # of all outputs; more of them in the program mean that the call was mapped


class Record:
    """The calls of one `labelling`, told apart from others by identity."""

    def __init__(self, form: str | None):
        self.form = form
        self.calls: dict[str, Label] = {}


# Part of JAX's trace caches: a function jitted under one record is traced anew under another.
_current = jax.make_user_context(None)


def current() -> Record | None:
    """The record of the innermost `labelling` around a call; None outside of all."""
    return _current.value


@contextlib.contextmanager
def labelling(form: str | None = None) -> Iterator[dict[str, Label]]:
    """Yields the labels of the calls traced within the block, by the names of their functions.

    Where `form` names an implementation, as "ref", calls that name none themselves run as that one.
    """
    record = Record(form)
    with _current(record):
        yield record.calls
