"""Fixtures of the tests of checkpoints: a run's folder, what was said, and checkpoints to close."""

import contextlib

import pytest

from training.checkpoint import Checkpoints


@pytest.fixture
def said():
    """The lines that were printed for the user."""
    return []


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


@pytest.fixture
def opened(folder, said):
    """Open the run's checkpoints; everything opened is closed at the end."""
    with contextlib.ExitStack() as stack:

        def make(**options):
            made = Checkpoints(folder, warn=said.append, **options)
            return stack.enter_context(contextlib.closing(made))

        yield make


@pytest.fixture(scope="module", autouse=True)
def kept(programs_are_kept):
    """Tests here train the same few models again and again."""
