"""Crossed parameters of a test of which the gate runs few combinations, and `-m long` the rest."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def crossed(*axes: Sequence[Any], gate: Sequence[tuple]) -> list:
    """All combinations, long but for those in `gate`, where each value of each axis occurs."""
    found = list(itertools.product(*axes))
    assert all(one in found for one in gate), "the gate names a combination that is none"
    for values, kept in zip(axes, zip(*gate, strict=True), strict=True):
        assert all(value in kept for value in values), f"the gate leaves out one of {values}"
    return [pytest.param(*one, marks=() if one in gate else pytest.mark.long) for one in found]
