"""Reading checkpoints back: parts of them, damaged ones, foreign files, trees that do not fit.

What comes back is bit-exact, or refused in one line.
"""

import contextlib
import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.trees import abstract, bits, small_tree
from training import checkpoint, leaves, manifest
from training.checkpoint import Checkpoints, NoUsableCheckpoint


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


def test_arrays_and_a_part(two_steps):
    tree = small_tree(200)
    stored = checkpoint.arrays(two_steps)
    named = leaves.named(jax.tree.map(leaves.words, tree))
    expected = [np.asarray(named[name]) for name in sorted(named)]
    assert [x.tobytes() for x in stored] == [x.tobytes() for x in expected]
    part, _ = checkpoint.restore(two_steps, {"params": abstract(tree["params"])}, partial=True)
    assert bits(part) == bits({"params": tree["params"]})


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
