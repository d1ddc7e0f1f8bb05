"""Choosing an implementation: by name or by default, never another one than was named."""

import importlib
import inspect
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dispatch, setting
from kernels.linear_scan import linear_scan
from programs.labels import Label, labelling

OPERATIONS = sorted(path.parent.name for path in Path(dispatch.__file__).parent.glob("*/cases.py"))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_implementations_are_the_files_of_the_folder(operation):
    folder = Path(dispatch.__file__).parent / operation
    files = {path.stem for path in folder.glob("*.py")}
    known = dispatch.implementations(operation)
    assert set(known) == files & set(dispatch.IMPLEMENTATIONS)
    assert {"ref", "xla"} <= set(known)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_named_implementation_is_the_one_that_runs(operation):
    for impl in dispatch.implementations(operation):
        with setting.interpreting():  # a TPU kernel is refused elsewhere
            chosen = dispatch.choose(operation, operation, impl)
        wanted = getattr(importlib.import_module(f"kernels.{operation}.{impl}"), operation)
        assert inspect.unwrap(chosen) is inspect.unwrap(wanted)
        assert chosen.__module__ == f"kernels.{operation}.{impl}"


def test_the_default_is_announced_once(caplog):
    dispatch._announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="kernels.dispatch"):
        for _ in range(3):
            chosen = dispatch.choose("linear_scan", "linear_scan", None)
    assert chosen.__module__ == "kernels.linear_scan.xla"
    assert [record.getMessage() for record in caplog.records] == [
        "kernels: linear_scan runs as xla on cpu"
    ]


@pytest.mark.parametrize("name", ["triton", "", "XLA", "api", "cases"])
def test_an_unknown_name_raises_and_lists_the_known_ones(name):
    known = ", ".join(dispatch.implementations("linear_scan"))
    with pytest.raises(
        ValueError, match=f"^linear_scan has no implementation '{name}'; it has {known} "
    ):
        dispatch.choose("linear_scan", "linear_scan", name)


def chosen(impl=None):
    return dispatch.choose("linear_scan", "linear_scan", impl).__module__


def test_using_replaces_the_default_and_no_more():
    with dispatch.using("ref"):
        assert chosen() == "kernels.linear_scan.ref"
        assert chosen("xla") == "kernels.linear_scan.xla"
        with dispatch.using("xla"):
            assert chosen() == "kernels.linear_scan.xla"
        assert chosen() == "kernels.linear_scan.ref"
    assert chosen() == "kernels.linear_scan.xla"


def test_using_an_unknown_name_raises_and_ends_with_its_block():
    with pytest.raises(ValueError, match="has no implementation 'nothing'"):
        with dispatch.using("nothing"):
            chosen()
    assert chosen() == "kernels.linear_scan.xla"


def test_labelling_names_every_call_and_changes_no_value(monkeypatch):
    monkeypatch.setattr(dispatch, "_cost", lambda operation, function: lambda *args, **kwargs: 7)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 3)), jnp.float32)

    def twice(x):
        h, state = linear_scan(x, -jnp.abs(x), impl="ref")
        return linear_scan(h, -jnp.abs(x), initial_state=state)[0]

    want = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(twice(x)))))(x)
    with labelling() as labels:
        jaxpr = jax.make_jaxpr(twice)(x)
        found = jax.grad(lambda x: jnp.sum(jnp.sin(twice(x))))(x)
    names = [eqn.params["name"] for eqn in jaxpr.eqns if "name" in eqn.params]
    keys = [f"kernels.linear_scan.linear_scan#{n}" for n in range(4)]
    assert list(labels) == keys
    assert [name for name in names if name in labels] == keys[:2]
    label = Label("kernels.linear_scan.linear_scan", 7.0, 2 * 5 * 3 + 2 * 3)
    assert set(labels.values()) == {label}
    np.testing.assert_allclose(found, want, rtol=1e-6)


def test_no_label_outside_the_block_and_no_count_without_a_cost():
    x = jnp.zeros((1, 2, 3))
    with labelling() as labels:
        linear_scan(x, x)
    linear_scan(x, x)
    assert len(labels) == 1
    has_cost = (Path(dispatch.__file__).parent / "linear_scan" / "cost.py").exists()
    assert (labels["kernels.linear_scan.linear_scan#0"].flops is None) != has_cost
