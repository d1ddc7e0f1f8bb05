"""Fixtures of the kernels' own tests."""

import pytest

from kernels import setting


@pytest.fixture
def interpreter():
    """TPU kernels run in Pallas' interpreter."""
    with setting.interpreting():
        yield
