"""Checkpoints under kills, damage, full disks, other meshes: bit-exact, or refused in one line."""

import contextlib
import errno
import os
import random
import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from training import checkpoint, leaves, manifest
from training.checkpoint import Checkpoints, NoUsableCheckpoint, StorageError


def bits(tree) -> list[tuple]:
    """Every leaf as dtype, shape and bytes: equal lists are bit-equal trees."""
    words = [leaves.words(leaf) for leaf in jax.tree.leaves(tree)]
    return [(str(x.dtype), x.shape, np.asarray(x).tobytes()) for x in words]


def abstract(tree, sharding=None):
    """The tree's shapes and dtypes, every leaf with the same sharding."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def small_tree(seed: int):
    """Nested dicts, an optax state of NamedTuples, scalars, NaN and -0, bfloat16, random keys."""
    draw = np.random.default_rng(seed).standard_normal
    params = {
        "embed": jnp.asarray(draw((32, 8)), jnp.float32),
        "b": {"w": jnp.asarray(draw((8, 4)))},
    }
    key = jax.random.key(seed)
    return {
        "step": jnp.asarray(seed, jnp.int32),
        "params": params,
        "optimizer": optax.adamw(1e-3).init(params),
        "odd": (jnp.asarray([np.nan, -0.0, np.inf]), jnp.asarray(draw(3), jnp.bfloat16)),
        "flag": jnp.asarray(True),
        "empty": jnp.zeros((0, 3)),
        "keys": [key, jax.random.split(key, 4), jax.random.key(seed, impl="rbg")],
    }


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


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A folder with the steps 100 and 200, never changed by a test."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        checkpoints.save(100, small_tree(100), {"metric": 2.0})
        checkpoints.save(200, small_tree(200), {"metric": 3.0})
    return folder


def files_of(step: Path) -> list[Path]:
    return sorted(path for path in step.rglob("*") if path.is_file())


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


def test_arrays_and_a_part(two_steps):
    tree = small_tree(200)
    stored = checkpoint.arrays(two_steps)
    named = leaves.named(jax.tree.map(leaves.words, tree))
    expected = [np.asarray(named[name]) for name in sorted(named)]
    assert [x.tobytes() for x in stored] == [x.tobytes() for x in expected]
    part, _ = checkpoint.restore(two_steps, {"params": abstract(tree["params"])}, partial=True)
    assert bits(part) == bits({"params": tree["params"]})


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


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    place = random.Random(path.name).randrange(8 * len(content))
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def zero_page(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(bytes(min(4096, len(content))) + content[4096:])


@pytest.mark.parametrize("harm", [flip, truncate, zero_page, Path.unlink])
def test_damage_to_each_file(two_steps, tmp_path, harm):
    tree, harmed = small_tree(100), 0
    for place, original in enumerate(files_of(two_steps / "200")):
        if original.stat().st_size == 0 and harm is not Path.unlink:
            continue  # nothing in it to damage
        copy, said = tmp_path / str(place), []
        shutil.copytree(two_steps, copy)
        harm(copy / original.relative_to(two_steps))
        restored, meta = checkpoint.restore(copy, abstract(tree), warn=said.append)
        assert meta["step"] == 100 and bits(restored) == bits(tree), original
        harmed += 1
        if original.name == manifest.MARKER and harm is Path.unlink:
            assert said == [], "without its marker a step is none"
            continue
        assert len(said) == 1 and original.name in said[0], (original, said)
        assert said[0].startswith("checkpoint error: step 200 failed its checksum (file ")
        assert said[0].endswith(". Using step 100.")
    assert harmed >= 8


def test_swapped_extra_and_moved_files(two_steps, tmp_path):
    tree = small_tree(100)
    sizes = {path.stat().st_size: path for path in files_of(two_steps / "200" / "state")}
    *_, second, first = sorted(sizes)

    def swap(step):
        one, two = (step / sizes[n].relative_to(two_steps / "200") for n in (first, second))
        spare = one.with_name("spare")
        one.rename(spare)
        two.rename(one)
        spare.rename(two)

    def add(step):
        (step / "state" / "extra").write_bytes(b"x")

    def exchange(step):
        shutil.rmtree(step)
        shutil.copytree(step.with_name("100"), step)

    for harm in (swap, add, exchange):
        copy, said = tmp_path / harm.__name__, []
        shutil.copytree(two_steps, copy)
        harm(copy / "200")
        restored, meta = checkpoint.restore(copy, abstract(tree), warn=said.append)
        assert meta["step"] == 100 and bits(restored) == bits(tree) and len(said) == 1, harm


def test_all_damaged(two_steps, tmp_path):
    copy, said = tmp_path / "copy", []
    shutil.copytree(two_steps, copy)
    for step in ("100", "200"):
        flip(max(files_of(copy / step), key=lambda path: path.stat().st_size))
    with pytest.raises(NoUsableCheckpoint, match="step 100 .*, step 200 ") as caught:
        checkpoint.restore(copy, abstract(small_tree(1)), warn=said.append)
    assert caught.value.code == 3 and "\n" not in str(caught.value) and said == []


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in files_of(folder)}


def test_what_is_not_ours_is_left_and_said(folder, tmp_path, opened, said):
    """Another program's checkpoints/1000/default/weights; photos/2019 behind a link."""
    (folder / "1000" / "default").mkdir(parents=True)
    (folder / "1000" / "default" / "weights").write_bytes(b"weights")
    photos = tmp_path / "photos" / "2019"
    photos.mkdir(parents=True)
    (photos / "lake.jpg").write_bytes(b"a lake")
    (folder / "2019").symlink_to(photos)
    before = contents(tmp_path)
    checkpoints = opened(keep=1, keep_best=0)
    assert len(said) == 1 and f"left 1000, 2019 in {folder} as found" in said[0]
    with pytest.raises(NoUsableCheckpoint, match=r"step 1000 \(no COMMITTED\)") as caught:
        checkpoints.restore(abstract(small_tree(1)))
    assert caught.value.code == 3 and "\n" not in str(caught.value)
    tree = {"w": jnp.ones(2)}
    for step in (900, 1000, 2019, 2020):  # a save in the same place fails, and thinning passes by
        checkpoints.save(step, tree, {})
        checkpoints.wait()
    assert checkpoints.steps() == [2020] and checkpoints.failures == 0
    assert len(said) == 3, said
    for step, line in zip((1000, 2019), said[1:], strict=True):
        assert f"step {step} could not be saved ({folder}/{step} holds files that this" in line
    assert checkpoints.restore(abstract(tree)).meta["step"] == 2020
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before


def test_lost_markers(two_steps, folder, opened, said):
    """Without any marker nothing is good and nothing goes; with one left it is the one used."""
    shutil.copytree(two_steps, folder)
    for step in ("100", "200"):
        (folder / step / manifest.MARKER).unlink()
    before, lost = contents(folder), r"step 100 \(no COMMITTED\), step 200 \(no COMMITTED\)"
    with pytest.raises(NoUsableCheckpoint, match=lost):
        checkpoint.restore(folder, abstract(small_tree(1)))
    with pytest.raises(NoUsableCheckpoint, match=lost):
        opened().restore(abstract(small_tree(1)))
    assert contents(folder) == before and len(said) == 1 and "left 100, 200" in said[0]
    shutil.rmtree(folder / "100")
    shutil.copytree(two_steps / "100", folder / "100")
    checkpoints = opened()
    assert checkpoints.restore(abstract(small_tree(1))).meta["step"] == 100
    checkpoints.save(200, small_tree(200), {})  # the same run comes to it again
    assert bits(checkpoints.restore(abstract(small_tree(1))).tree) == bits(small_tree(200))


def test_killed_first_save_is_a_fresh_start(folder, opened, said):
    manifest.begin(folder / "100")
    (folder / "100" / "state.tmp").mkdir()
    (folder / "300").mkdir()  # killed before the mark
    assert checkpoint.restore(folder, abstract(small_tree(1))) is None
    assert opened().restore(abstract(small_tree(1))) is None
    assert said == ["checkpoint: removed the unfinished save of step 100."]


def test_two_damaged_steps_are_passed_over(two_steps, folder, opened, said):
    shutil.copytree(two_steps, folder)
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        checkpoints.save(300, small_tree(300), {})
    flip(max(files_of(folder / "300"), key=lambda path: path.stat().st_size))
    (folder / "200" / manifest.MANIFEST).unlink()
    restored, meta = opened().restore(abstract(small_tree(1)))
    assert meta["step"] == 100 and bits(restored) == bits(small_tree(100))
    assert ["step 300" in said[0], "step 200" in said[1], len(said)] == [True, True, 2]


def test_damaged_step_is_written_again_and_goes(two_steps, folder, opened, said):
    shutil.copytree(two_steps, folder)
    flip(max(files_of(folder / "200"), key=lambda path: path.stat().st_size))
    checkpoints = opened(keep=3, keep_best=0)
    assert checkpoints.restore(abstract(small_tree(1))).meta["step"] == 100
    checkpoints.save(150, small_tree(150), {})
    checkpoints.wait()
    assert checkpoints.steps() == [100, 150] and len(said) == 1
    checkpoints.save(200, small_tree(200), {})
    assert bits(checkpoints.restore(abstract(small_tree(1))).tree) == bits(small_tree(200))


def test_committed_step_is_left_alone(two_steps, folder, opened):
    shutil.copytree(two_steps, folder)
    checkpoints = opened()
    before = (folder / "200" / manifest.MARKER).stat().st_mtime_ns
    checkpoints.save(200, small_tree(200), {})
    checkpoints.wait()
    assert (folder / "200" / manifest.MARKER).stat().st_mtime_ns == before


def test_retention(opened):
    checkpoints = opened(keep=2, keep_best=1)
    metrics = {1: 3.0, 2: 1.0, 3: float("nan"), 4: 2.0, 5: 2.5, 6: 0.5, 7: None}
    expected = {1: [1], 2: [1, 2], 3: [2, 3], 4: [2, 3, 4], 5: [2, 4, 5], 6: [5, 6], 7: [6, 7]}
    for step, metric in metrics.items():
        checkpoints.save(step, {"w": jnp.ones(3)}, {} if metric is None else {"metric": metric})
        checkpoints.wait()
        assert checkpoints.steps() == expected[step], step
        assert manifest.present(checkpoints.folder) == expected[step]


def test_mismatched_trees(two_steps):
    tree = small_tree(1)
    more = tree | {"params": tree["params"] | {f"new{i}": jnp.ones(1) for i in range(12)}}
    fewer = tree | {"params": {"b": tree["params"]["b"]}}
    shaped = tree | {"step": jnp.zeros(2, jnp.int32)}
    typed = tree | {"flag": jnp.ones((), jnp.int8), "keys": [*tree["keys"][:2], tree["keys"][0]]}
    for wrong, text in (
        (more, r"12 missing: params/new0, (params/new\d+, ){9}\.\.\."),
        (fewer, "1 unexpected: params/embed"),
        (shaped, r"1 of another shape: step \(\), now \(2,\)"),
        (typed, r"2 of another dtype: flag bool, now int8, keys/2 key<rbg>, now key<fry>"),
    ):
        with pytest.raises(ValueError, match=text) as caught:
            checkpoint.restore(two_steps, abstract(wrong))
        assert "\n" not in str(caught.value)


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
