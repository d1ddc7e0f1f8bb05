"""Saving and restoring: bit-exact, on other meshes too; a full disk is said and survived."""

import errno
import os
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.training.trees import abstract, bits, small_tree
from training import manifest
from training.checkpoint import StorageError


def test_round_trip(opened, said):
    tree = small_tree(7)
    checkpoints = opened()
    assert checkpoints.restore(abstract(tree)) is None and checkpoints.steps() == []
    meta = {"data": "0123", "metric": 2.5, "nested": {"position": [1, 2]}}
    checkpoints.save(7, tree, meta)
    meta["nested"]["position"].append(3)  # after save returns nothing of the caller's is read
    checkpoints.wait()
    restored, found = checkpoints.restore(abstract(tree))
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    assert bits(restored) == bits(tree)
    assert found == {"data": "0123", "metric": 2.5, "nested": {"position": [1, 2]}, "step": 7}
    for old, new in zip(tree["keys"], restored["keys"], strict=True):
        assert new.dtype == old.dtype and jax.random.key_impl(new) == jax.random.key_impl(old)
    draw = jax.random.normal(tree["keys"][0], (4,))
    assert np.array_equal(jax.random.normal(restored["keys"][0], (4,)), draw)
    assert said == []


def test_carried_positions_are_read_under_their_old_name(opened):
    """Runs of before saved them as "place"; a weight of that name keeps it."""
    saved = lambda name: {
        "params": {"place": jnp.arange(2.0)},
        "carry": {name: jnp.arange(3), "stacks": ({"k": jnp.ones(2), name: jnp.arange(4)},)},
    }
    checkpoints = opened()
    checkpoints.save(1, saved("place"), {})
    restored, _ = checkpoints.restore(abstract(saved("position")))
    assert bits(restored) == bits(saved("position"))


def test_saved_tree_may_be_donated_at_once(opened):
    checkpoints = opened()
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    for step in range(1, 4):
        values = np.random.default_rng(step).standard_normal((4, 300, 300)).astype(np.float32)
        tree = [jnp.array(value) for value in values]
        shapes = abstract(tree)
        checkpoints.save(step, tree, {})
        jax.block_until_ready(overwrite(tree))
        checkpoints.wait()
        restored, _ = checkpoints.restore(shapes)
        assert [np.asarray(x).tobytes() for x in restored] == [v.tobytes() for v in values]


def mesh_of(devices: int):
    chosen = jax.devices()[:devices]
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=chosen)


@pytest.mark.parametrize("before, after", [(1, 4), (4, 1), (4, 2)])
def test_other_device_counts(opened, before, after):
    values = np.random.default_rng(0).standard_normal((8, 12)).astype(np.float32)
    tree = {"split": values, "whole": values[:3], "key": jax.random.split(jax.random.key(1), 8)}
    specs = {"split": P("data"), "whole": P(), "key": P("data")}

    def shardings(devices):
        return {name: NamedSharding(mesh_of(devices), spec) for name, spec in specs.items()}

    tree = jax.device_put(tree, shardings(before))
    (checkpoints := opened()).save(1, tree, {})
    target = {n: abstract(tree[n], where) for n, where in shardings(after).items()}
    restored, _ = checkpoints.restore(target)
    assert bits(restored) == bits(tree)
    for name, where in shardings(after).items():
        assert restored[name].sharding.is_equivalent_to(where, restored[name].ndim), name
    assert len(restored["split"].addressable_shards) == after


@pytest.mark.parametrize("devices", [1, 4])
def test_restored_arrays_are_owned_by_xla(opened, devices):
    values = np.random.default_rng(0).standard_normal((400, 64)).astype(np.float32)
    where = NamedSharding(mesh_of(devices), P("data"))
    (checkpoints := opened()).save(1, [jax.device_put(values, where)], {})

    def places(array):
        return [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]

    (restored,), _ = checkpoints.restore(
        [jax.ShapeDtypeStruct((400, 64), np.float32, sharding=where)]
    )
    before = places(restored)
    grown = jax.jit(lambda x: x + 1, donate_argnums=0)(restored)
    # The update happened in place: the buffers were XLA's own and no views of foreign memory.
    assert restored.is_deleted() and places(grown) == before
    assert np.array_equal(np.asarray(grown), values + 1)


def test_retention(opened):
    checkpoints = opened(keep=2, keep_best=1)
    metrics = {1: 3.0, 2: 1.0, 3: float("nan"), 4: 2.0, 5: 2.5, 6: 0.5, 7: None}
    expected = {1: [1], 2: [1, 2], 3: [2, 3], 4: [2, 3, 4], 5: [2, 4, 5], 6: [5, 6], 7: [6, 7]}
    for step, metric in metrics.items():
        checkpoints.save(step, {"w": jnp.ones(3)}, {} if metric is None else {"metric": metric})
        checkpoints.wait()
        assert checkpoints.steps() == expected[step], step
        assert manifest.present(checkpoints.folder) == expected[step]


def test_bad_arguments(opened):
    with pytest.raises(ValueError, match="checkpoint.keep=0"):
        opened(keep=0)
    checkpoints = opened()
    with pytest.raises(ValueError, match="leaf a is no jax.Array"):
        checkpoints.save(1, {"a": np.ones(2)}, {})
    with pytest.raises(ValueError, match="both named a/b"):
        checkpoints.save(1, {"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}}, {})
    with pytest.raises(ValueError, match="no leaves"):
        checkpoints.save(1, {}, {})
    with pytest.raises(TypeError):
        checkpoints.save(1, {"a": jnp.ones(2)}, {"bad": object()})
    assert checkpoints.steps() == []


def test_full_disk(opened, said, monkeypatch):
    checkpoints = opened()

    def save(step):
        checkpoints.save(step, {"w": jnp.full(5, step)}, {})

    save(1)
    checkpoints.wait()
    real = manifest.write_atomic

    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(manifest, "write_atomic", full)
    save(2)
    save(3)  # says that 2 failed
    assert said == [
        "checkpoint error: step 2 could not be saved (No space left on device). "
        "Step 1 is still the newest one."
    ]
    checkpoints.wait()
    assert len(said) == 2 and checkpoints.failures == 2
    assert manifest.present(checkpoints.folder) == [1], "what failed is removed at once"
    monkeypatch.setattr(manifest, "write_atomic", real)
    save(4)
    checkpoints.wait()
    assert checkpoints.failures == 0 and checkpoints.steps() == [1, 4]
    monkeypatch.setattr(manifest, "write_atomic", full)
    for step in (5, 6, 7):
        save(step)
    with pytest.raises(StorageError, match="3 saves in a row failed") as caught:
        save(8)
    assert caught.value.code == 4 and "\n" not in str(caught.value)
    restored, _ = checkpoints.restore({"w": jax.ShapeDtypeStruct((5,), jnp.int32)})
    assert np.asarray(restored["w"]).tolist() == [4] * 5


def test_write_error_in_the_array_files(opened, said):
    checkpoints = opened()
    tree = {"w": jax.random.normal(jax.random.key(0), (1000, 1000))}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        checkpoints.save(1, tree, {})
        checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(said) == 1 and "step 1 could not be saved (File too large)" in said[0]
    checkpoints.save(2, tree, {})
    assert bits(checkpoints.restore(abstract(tree)).tree) == bits(tree)
