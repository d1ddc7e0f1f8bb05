"""Checkpoints: Orbax writes the arrays in the background, a manifest proves them, a marker commits.

A step counts only when all its files are on the disk with their SHA-256 (training/manifest.py).
What a kill leaves half written is removed at the next start; what a disk damages is passed over;
a folder that this code did not begin is never removed.
"""

import contextlib
import json
import logging
import math
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from training import guards, leaves, manifest
from training.manifest import STATE
from training.manifest import committed as committed

MOST_FAILURES = 3  # failed saves in a row that end a run

# Orbax logs tracebacks from each of its threads; a failed save is reported in one line, here.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


class NoUsableCheckpoint(guards.Stop):
    """Folders of steps exist and none of them holds a good checkpoint."""

    code = guards.NO_CHECKPOINT


class StorageError(guards.Stop):
    """`MOST_FAILURES` saves in a row failed."""

    code = guards.STORAGE


class Restored(NamedTuple):
    """What a checkpoint holds: the tree, and `meta` with its step under "step"."""

    tree: Any
    meta: dict


def _warn(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def restore(
    folder: Path,
    abstract_tree: Any,
    *,
    partial: bool = False,
    warn: Callable[[str], None] = _warn,
) -> Restored | None:
    """The newest undamaged checkpoint of `folder`, laid out as `abstract_tree` says; None if none.

    `abstract_tree` is a tree or a function that makes one of the checkpoint's `meta`.
    Leaves of `abstract_tree` are `jax.ShapeDtypeStruct`s; each array comes back with that sharding
    (none: on the default device), bit for bit, in memory of its own that may be donated. With
    `partial` only those outermost parts of what was saved are read that the tree has. Each
    damaged step costs one warning. Raises NoUsableCheckpoint if all are damaged, and ValueError if
    the leaves differ from those that were saved. Reads only; every process must call it.
    """
    step = _newest_good(Path(folder), {}, warn)
    return None if step is None else _load(Path(folder) / str(step), abstract_tree, partial)


def peek(folder: Path) -> dict | None:
    """`meta` of the newest committed step, read at no cost and not verified; None if none."""
    for step in reversed(committed(Path(folder))):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return manifest.read(Path(folder) / str(step))["meta"]
    return None


def arrays(folder: Path, warn: Callable[[str], None] = _warn) -> list[np.ndarray]:
    """All arrays of the newest undamaged checkpoint, in the order of their names; keys as words."""
    step = _newest_good(Path(folder), {}, warn)
    if step is None:
        return []
    path = Path(folder) / str(step)
    stored = manifest.read(path)["leaves"]
    loaded = _read(path, stored, {name: None for name in stored})
    return [np.asarray(loaded[name]) for name in sorted(loaded)]


class Checkpoints:
    """The checkpoints of one run, in `folder`: saved in the background, verified, thinned out.

    Keeps the `keep` newest steps and the `keep_best` with the lowest finite `meta["metric"]`.
    Opening removes what killed saves left, so only the run that writes may open it; others use
    `restore` and `committed`. Processes share the folder: all write arrays, process 0 the rest.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 3,
        keep_best: int = 1,
        warn: Callable[[str], None] = _warn,
    ):
        if keep < 1 or keep_best < 0:
            raise ValueError(
                f"checkpoint.keep={keep}, checkpoint.keep_best={keep_best}: use at least 1 and 0."
            )
        self.folder = Path(folder)
        self.failures = 0  # failed saves in a row
        self._keep, self._keep_best, self._warn = keep, keep_best, warn
        self._damaged: dict[int, str] = {}
        self._thread: threading.Thread | None = None
        self._failed: tuple[int, Exception] | None = None
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._tidy()

    def steps(self) -> list[int]:
        """Committed steps, oldest first."""
        return committed(self.folder)

    def refuse_taken(self, step: int) -> None:
        """ValueError if a step cannot be saved, as its folder holds what is not ours."""
        if manifest.is_taken(self.folder / str(step)):
            raise ValueError(
                f"{self.folder / str(step)} holds files of something else, and step {step} is to "
                "be saved there. Move them away or use another workdir."
            )

    def _tidy(self) -> None:
        """Remove what killed saves left; say what else lies there, and leave it."""
        for step in manifest.unfinished(self.folder):
            manifest.remove(self.folder / str(step))
            if not (self.folder / str(step)).exists():
                self._warn(f"checkpoint: removed the unfinished save of step {step}.")
        for step in manifest.marked(self.folder):
            manifest.finish(self.folder / str(step))
        if unknown := manifest.unknown(self.folder):
            names = ", ".join(map(str, unknown[: leaves.MOST_NAMES]))
            more = ", ..." if len(unknown) > leaves.MOST_NAMES else ""
            self._warn(
                f"checkpoint: left {names}{more} in {self.folder} as found: no {manifest.MARKER} "
                "of a save of ours is there. Move away what is not a step of this run."
            )

    def restore(self, abstract_tree: Any) -> Restored | None:
        """`restore` of this folder; damaged steps found here go when the next save is committed."""
        self._join()
        step = _newest_good(self.folder, self._damaged, self._warn)
        return None if step is None else _load(self.folder / str(step), abstract_tree, False)

    def save(self, step: int, tree: Any, meta: dict) -> None:
        """Copy the arrays of `tree`, then write them and `meta` (JSON values) in the background.

        Once it returns, `tree` may be donated. Waits for a save still in flight and reports it if
        it failed; raises StorageError if that was the third in a row. A step that is committed and
        undamaged is left as it is. Leaves must be `jax.Array`s (ValueError), global ones where
        there are several processes.
        """
        self.wait()
        path = self.folder / str(step)
        values = leaves.named(tree)
        foreign = [name for name, value in values.items() if not isinstance(value, jax.Array)]
        if foreign:
            raise ValueError(f"checkpoint leaf {foreign[0]} is no jax.Array. Use jnp.asarray.")
        # Through JSON and back: a bad meta is refused here, and a later change does not reach it.
        meta = json.loads(json.dumps(meta | {"step": step}))
        head = {"step": step, "meta": meta, "leaves": leaves.describe(values)}
        if _agree(step in self.steps() and not manifest.damage(path)):
            return
        try:
            if jax.process_index() == 0:
                manifest.remove(path)
                manifest.begin(path)
            stored = {name: leaves.words(value) for name, value in values.items() if value.size}
            response = ocp.save_async(str((path / STATE).absolute()), stored)
        except Exception as error:  # whatever a full or broken disk makes of it
            self._fail(step, error)
            return
        self._thread = threading.Thread(
            target=self._finish, args=(step, response, head), name=f"save {step}"
        )
        self._thread.start()

    def wait(self) -> None:
        """Return once nothing is being written; report a failed save, or raise StorageError."""
        self._join()
        if self._failed is None:
            return
        (step, error), self._failed = self._failed, None
        steps = self.steps()
        left = f"Step {steps[-1]} is still the newest one." if steps else "There is no other one."
        line = f"checkpoint error: step {step} could not be saved ({_reason(error)}). {left}"
        if self.failures >= MOST_FAILURES:
            raise StorageError(f"{line} {self.failures} saves in a row failed.") from error
        self._warn(line)

    def close(self) -> None:
        """`wait`, but only warns: for the way out, where another error may be on its way."""
        try:
            self.wait()
        except StorageError as error:
            self._warn(str(error))

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _finish(self, step: int, response, head: dict) -> None:
        try:
            response.result()
            if jax.process_index() == 0:
                manifest.seal(self.folder / str(step), head)
        except Exception as error:  # a save that fails must not end the run
            self._fail(step, error)
            return
        self.failures = 0
        self._damaged.pop(step, None)
        if jax.process_index() == 0:
            self._thin_out(step)

    def _fail(self, step: int, error: Exception) -> None:
        self.failures += 1
        self._failed = (step, error)
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                manifest.remove(self.folder / str(step))

    def _thin_out(self, newest: int) -> None:
        # `newest` has just been read back and hashed: with it kept, a good step always remains.
        good = [step for step in self.steps() if step not in self._damaged]
        scored = [(_metric(self.folder / str(step)), -step) for step in good]
        best = sorted(pair for pair in scored if math.isfinite(pair[0]))[: self._keep_best]
        kept = {newest, *good[-self._keep :], *(-step for _, step in best)}
        for step in manifest.marked(self.folder):
            if step not in kept:
                with contextlib.suppress(OSError):
                    manifest.remove(self.folder / str(step))
                    self._damaged.pop(step, None)


def _agree(value: int) -> int:
    """Process 0's `value`, on every process; all must call it."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _metric(path: Path) -> float:
    """The step's validation metric; NaN where it has none or cannot be read."""
    try:
        return float(manifest.read(path)["meta"]["metric"])
    except (OSError, ValueError, TypeError, KeyError):
        return math.nan


def _newest_good(folder: Path, damaged: dict[int, str], warn: Callable[[str], None]) -> int | None:
    """Newest undamaged step (None: no step at all); fills `damaged` and warns of each of them."""
    good = _agree(_search(folder, damaged) if jax.process_index() == 0 else 0)
    if good == -2:
        unknown = {step: f"no {manifest.MARKER}" for step in manifest.unknown(folder)}
        faults = {step: f"file {file}" for step, file in damaged.items()} | unknown
        found = ", ".join(f"step {step} ({faults[step]})" for step in sorted(faults))
        raise NoUsableCheckpoint(
            f"checkpoint error: no checkpoint in {folder} passes its checksum: {found or 'none'}. "
            "Put an undamaged copy back or start with another workdir."
        )
    for step in sorted((step for step in damaged if step > good), reverse=True):
        warn(
            f"checkpoint error: step {step} failed its checksum (file {damaged[step]}). "
            f"Using step {good}."
        )
    return None if good == -1 else good


def _search(folder: Path, damaged: dict[int, str]) -> int:
    """Newest undamaged step; -1 if there are no steps, -2 if there are and none is good."""
    for step in reversed(manifest.marked(folder)):
        file = manifest.damage(folder / str(step))
        if not file:
            return step
        # Without a marker by now, the run that owns the folder has just removed this step.
        if (folder / str(step) / manifest.MARKER).exists():
            damaged[step] = file
    return -2 if damaged or manifest.unknown(folder) else -1


def _load(path: Path, abstract_tree: Any, partial: bool) -> Restored:
    sealed = manifest.read(path)
    if callable(abstract_tree):
        abstract_tree = abstract_tree(sealed["meta"])
    names = {_today(name): name for name in sealed["leaves"]}
    held = {name: sealed["leaves"][saved] for name, saved in names.items()}
    wanted = leaves.named(abstract_tree)
    if partial:
        parts = {name.partition("/")[0] for name in wanted}
        held = {name: leaf for name, leaf in held.items() if name.partition("/")[0] in parts}
    leaves.refuse_mismatch(path.name, held, wanted)
    shardings = {names[name]: leaf.sharding for name, leaf in wanted.items()}
    loaded = _read(path, sealed["leaves"], shardings)
    values = []
    for name, leaf in wanted.items():
        value = loaded.pop(names[name])
        if leaf.sharding is None:
            value = jnp.asarray(np.asarray(value))  # not tied to a device
        # Orbax may hand out host memory that XLA does not own: a copy can be donated safely.
        value = jnp.copy(value)
        key = held[name].get("key")
        values.append(jax.random.wrap_key_data(value, impl=key) if key else value)
    return Restored(jax.tree.unflatten(jax.tree.structure(abstract_tree), values), sealed["meta"])


def _today(name: str) -> str:
    """The name of a leaf now: positions in carried states were once saved as places."""
    return re.sub(r"^(carry/(?:.*/)?)place$", r"\1position", name)


def _read(path: Path, stored: dict[str, dict], shardings: dict[str, Any]) -> dict[str, jax.Array]:
    """The named arrays of a step, with their shardings (None: the first local device)."""
    default = SingleDeviceSharding(jax.local_devices()[0])
    request, empty = {}, {}
    for name, leaf in stored.items():
        kept = leaf.get("words", leaf)
        shape, dtype = tuple(kept["shape"]), jnp.dtype(kept["dtype"])
        where = shardings.get(name) or default
        if math.prod(leaf["shape"]) == 0:  # Orbax stores no empty arrays
            empty[name] = jnp.zeros(shape, dtype, device=where)
        elif name in shardings:
            request[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=where)
        else:
            request[name] = ocp.PLACEHOLDER
    loaded = ocp.load(str((path / STATE).absolute()), request) if request else {}
    return {name: (loaded | empty)[name] for name in shardings}


def _reason(error: Exception) -> str:
    """What went wrong in a few words: the system's, where the error carries them."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    system = re.search(r"([^:\[]+) \[os_error_code", text)
    return system.group(1).strip() if system else text[:200]
