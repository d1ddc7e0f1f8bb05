"""The committed evidence is complete, and dispatch follows it."""

import jax.numpy as jnp
import pytest

from kernels import dispatch, evidence, survey
from programs import topology

SIZES = survey.subjects()
LISTED = [(n, g) for n, found in evidence.load()["functions"].items() for g in found]


def test_there_is_evidence():
    assert LISTED


@pytest.mark.parametrize(("name", "generation"), LISTED)
def test_what_is_listed_is_whole(name, generation):
    """All sizes of the function as its cases.py has them now, each compiled, no number missing."""
    found = evidence.load()["functions"][name][generation]
    assert [row["size"] for row in found] == list(SIZES[name])
    for row in found:
        assert row["compiled"], f"{row['size']}: {row.get('error')}"
        counts = ("temp_bytes", "model_flops", "flops", "bytes", "seconds", "xla_seconds")
        assert all(row[count] >= 0 for count in counts) and row["seconds"] > 0


@pytest.mark.aot
@pytest.mark.parametrize("name", SIZES)
def test_every_kernel_is_listed_for_every_generation(name):
    assert set(evidence.load()["functions"][name]) == set(topology.HOSTS)


ROW = {"size": "any", "compiled": True, "seconds": 1.0, "xla_seconds": 2.0}


@pytest.fixture
def on_v5e(monkeypatch):
    """As if traced for a v5e with one row of evidence; yields what is recorded, to be edited."""
    found = {"functions": {"linear_scan": {"v5e": [dict(ROW)]}}}
    monkeypatch.setattr(evidence, "load", lambda: found)
    monkeypatch.setattr(dispatch, "target", lambda: "v5e")
    for impl in ("xla", "pallas_tpu"):
        module = dispatch._module("linear_scan", impl)
        monkeypatch.setattr(module, "linear_scan", lambda *_, impl=impl, **__: impl)
    monkeypatch.setattr(
        module, "uncovered", lambda _, given="": given if isinstance(given, str) else ""
    )
    return found["functions"]["linear_scan"]


def chosen(x="") -> str:
    """Which implementation a call with impl=None runs; x is an array, or why it is not covered."""
    return dispatch.choose("linear_scan", "linear_scan", None)(x)


def test_evidence_makes_the_kernel_the_default(on_v5e):
    assert chosen() == "pallas_tpu"


def test_without_its_entry_dispatch_falls_back(on_v5e):
    del on_v5e["v5e"]
    assert chosen() == "xla"


@pytest.mark.parametrize("change", [{"compiled": False}, {"seconds": 4.0}, {"seconds": 5.0}])
def test_a_kernel_that_fails_or_is_slower_is_no_default(on_v5e, change):
    """4.0 against 2.0 outweighs 1.0 against 2.0: on the whole no faster."""
    on_v5e["v5e"].append(ROW | change)
    assert chosen() == "xla"


def test_a_size_that_is_slower_may_be_outweighed(on_v5e):
    on_v5e["v5e"].append(ROW | {"seconds": 3.9})
    assert chosen() == "pallas_tpu"


def test_evidence_for_another_generation_does_not_count(on_v5e, monkeypatch):
    monkeypatch.setattr(dispatch, "target", lambda: "v6e")
    assert chosen() == "xla"


def test_a_call_that_the_kernel_does_not_cover_runs_as_xla(on_v5e):
    assert chosen("width 12") == "xla"


@pytest.mark.parametrize(("length", "expected"), [(1, "xla"), (2, "pallas_tpu")])
def test_a_single_token_runs_as_xla(on_v5e, length, expected):
    assert chosen(jnp.zeros((2, length, 8))) == expected


def test_by_name_off_a_tpu_it_raises():
    with pytest.raises(ValueError, match="^linear_scan as pallas_tpu needs a TPU .* for cpu"):
        dispatch.choose("linear_scan", "linear_scan", "pallas_tpu")
