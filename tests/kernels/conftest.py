"""Fixtures of the kernels' own tests."""

import pytest

from kernels import dispatch


@pytest.fixture
def interpreter():
    """TPU kernels run in Pallas' interpreter."""
    with dispatch.interpreting():
        yield
