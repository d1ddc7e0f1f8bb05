"""A run describes itself: its config, its weights, and what may change when it goes on.

    from training import runs
    run = runs.load("runs/quickstart")
    hidden, state = run.model(tokens)  # (B, T) ids of run.tokenizer; run.model.logits(hidden)

A run's folder holds `config.json`, and every checkpoint the config it was written with. Settings
that say what is trained must be the same when a run goes on: the model, its tokenizer, the corpus.
Those that say how (`HOW`) may change freely, and all others may change and are named in one line.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from configs import schema
from configs.schema import Change, Data, Experiment
from data.pipeline import tokenizer_of
from data.tokenizers import Tokenizer
from models import lm
from parallel.mesh import make_mesh
from training import checkpoint, manifest
from training.step import make_trainer
from training.update import schedule

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
HOW = (
    "log_every",
    "mesh",
    "checkpoint",
    "evaluation",
    "guards",
    "data.folder",
    "model.layers",
    "model.remat",
    "optimizer.accumulation",
)
STATE = ("carry_state", "optimizer.rule")  # they say what a state holds beside the weights
CARRIED = ("data.batch", "data.length")  # and these what it carries with carry_state=True
NUMBERS = ("model.dtype",)  # of a model, what may change all the same
ROWS = ("data.batch", "data.length", "data.layout", "data.seed")  # they number the rows anew
WRITTEN = (CONFIG, "environment.json", "metrics.jsonl", "events.jsonl", "loss.png", "loss.svg")


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run has trained so far."""

    experiment: Experiment
    model: lm.LM
    step: int
    folder: Path
    meta: dict = dataclasses.field(repr=False)  # of the checkpoint

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of its tokens; ValueError if the file has changed since."""
        spec = self.experiment.data.tokenizer
        found = tokenizer_of(self.experiment.data)
        if self.meta.get("tokenizer", found.fingerprint) != found.fingerprint:
            raise ValueError(
                f"data.tokenizer={spec} is not the one that {self.folder} was trained with: its "
                "contents have changed. Put the old file back."
            )
        return found


def load(workdir: str | Path) -> Run:
    """The model of a run at its newest undamaged checkpoint, on the first device.

    Raises ValueError, in one line, where `workdir` holds no run of ours, and NoUsableCheckpoint
    where all its checkpoints are damaged.
    """
    folder, read = Path(workdir), {}

    def shapes(meta):
        read["experiment"] = experiment = experiment_of(folder, meta)
        mesh = make_mesh(devices=jax.devices()[:1])
        lengths = np.ones(experiment.model.vocabulary, np.float32)
        read["trainer"] = trainer = make_trainer(experiment, mesh, lengths)
        return {name: getattr(trainer.stored, name) for name in trainer.judged}

    restored = checkpoint.restore(folder / CHECKPOINTS, shapes, partial=True)
    if restored is None:
        raise ValueError(f"no checkpoint in {folder / CHECKPOINTS}: name the workdir of a run.")
    trainer = read["trainer"]
    params = trainer.weights(trainer.stored._replace(**restored.tree))
    model = nnx.merge(trainer.graph, params)
    meta = restored.meta
    return Run(read["experiment"], model, int(meta["step"]), folder, meta)


def experiment_of(folder: Path, meta: dict | None = None) -> Experiment:
    """The config that a run was trained with: the checkpoint's `meta` has it, or config.json."""
    values = stored(folder, meta)
    if values is None:
        raise ValueError(f"{folder} holds no {CONFIG} of a run: name the workdir of one.")
    return schema.freeze(schema.from_dict(values))


def stored(folder: Path, meta: dict | None = None) -> dict | None:
    """The same as JSON values, whatever they say; None where there is no config of a run."""
    if meta and "config" in meta:
        return meta["config"]
    values = _written(folder)
    is_ours = isinstance(values, dict) and values.get("class") == "configs.schema.Experiment"
    return values if is_ours else None


def _written(folder: Path) -> Any:
    """What config.json says; None where there is none, or none that can be read."""
    try:
        return json.loads((Path(folder) / CONFIG).read_bytes())
    except (OSError, ValueError):
        return None


def recover(workdir: str | Path) -> None:
    """Write a config.json that is lost or torn again, from the newest checkpoint.

    Raises ValueError where there is no checkpoint that has it.
    """
    folder = Path(workdir)
    meta = checkpoint.peek(folder / CHECKPOINTS) or {}
    if "config" not in meta:
        raise ValueError(
            f"workdir={workdir} holds no {CONFIG} of a run that can be read, and no checkpoint "
            "that has it. Name the folder of a run."
        )
    manifest.write_json(folder / CONFIG, meta["config"])
    print(f"{folder / CONFIG} was lost or torn: it is written again, from step {meta['step']}.")


def describe(experiment: Experiment, tokenizer: Tokenizer, corpus: str) -> dict:
    """What a checkpoint says of its run: `corpus` is the SHA-256 of the data."""
    return {
        "config": schema.to_dict(experiment),
        "model": schema.fingerprint(experiment.model),
        "tokenizer": tokenizer.fingerprint,
        "data": corpus,
    }


class Difference(NamedTuple):
    """How a config differs from that of a checkpoint, HOW left out."""

    model: list[Change]  # the model and its tokenizer: the weights mean something else
    state: list[Change]  # what else is carried from step to step
    corpus: list[Change]
    rest: list[Change]


def difference(folder: Path, meta: dict, experiment: Experiment, corpus: str = "") -> Difference:
    """How `experiment`, trained on a corpus of this SHA-256, differs from a checkpoint's config.

    Contents decide on tokenizer and corpus, where they are known; names may differ.
    """
    old = stored(folder, meta)
    if old is None:  # an old checkpoint that has lost its config.json: prints are left
        old = schema.to_dict(experiment)
        now = schema.fingerprint(experiment.model)
        found = [] if meta["model"] == now else [Change("model", meta["model"], now)]
    else:
        found = [c for c in schema.changes(old, experiment) if not within(c.key, HOW)]
    tokenizer = tokenizer_of(experiment.data).fingerprint
    words = _contents(found, old["data"], "tokenizer", meta.get("tokenizer"), tokenizer)
    texts = _contents(found, old["data"], "source", meta.get("data"), corpus)
    rest = [c for c in found if c.key not in ("data.tokenizer", "data.source")]
    model = [c for c in rest if within(c.key, ("model",)) and c.key not in NUMBERS]
    held = STATE + CARRIED * experiment.carry_state
    state = [c for c in rest if c.key in held or _starts_average(c)]
    rest = [c for c in rest if c not in model and c not in state]
    return Difference(model + words, state, texts, rest)


def _starts_average(change: Change) -> bool:
    """Whether an average of the weights comes or goes; its decay may change."""
    return change.key == "optimizer.ema" and bool(change.old) != bool(change.new)


def _contents(found: list[Change], data: dict, name: str, old: str | None, new: str) -> list:
    """The change of a tokenizer or a corpus: by its print if both are known, else by its name."""
    key = f"data.{name}"
    named = [change for change in found if change.key == key]
    if not old or not new or (old != new and named):
        return named
    what = f"{key}={data.get(name)} of other contents,"
    return [] if old == new else [Change(what, old[:12], new[:12])]


def within(key: str, keys: tuple[str, ...]) -> bool:
    """Whether a key is one of `keys` or lies below one."""
    return any(key == one or key.startswith((f"{one}.", f"{one}[")) for one in keys)


def refuse(folder: Path, experiment: Experiment) -> None:
    """ValueError if the folder's newest checkpoint is of another model or tokenizer.

    A first look, before the corpus is opened: the checkpoint itself may be damaged.
    """
    if meta := checkpoint.peek(folder / CHECKPOINTS):
        found = difference(folder, meta, experiment)
        refuse_reuse(folder, meta, [*found.model, *found.state])


def refuse_reuse(folder: Path, meta: dict, wrong: list[Change]) -> None:
    """ValueError if there is anything wrong."""
    if wrong:
        raise ValueError(
            f"the checkpoint of step {meta['step']} in {folder} was written with "
            f"{'; '.join(map(str, wrong))}. Use another --workdir or the old config."
        )


def position(folder: Path, meta: dict, data: Data) -> tuple[int, int]:
    """Step of a checkpoint, and the tokens read up to there, whatever the sizes of batches were."""
    step, old = int(meta["step"]), stored(folder, meta)
    sizes = old["data"] if old else {}
    size = sizes.get("batch", data.batch) * sizes.get("length", data.length)
    return step, int(meta.get("tokens", step * size))


def former_layout(folder: Path, meta: dict, model: lm.Config) -> lm.Config:
    """`model` with its layers laid out as the checkpoint has them."""
    old = stored(folder, meta)
    layers = old["model"].get("layers", model.layers) if old else model.layers
    return model if layers == model.layers else dataclasses.replace(model, layers=layers)


def remarks(meta: dict, found: Difference, experiment: Experiment) -> list[str]:
    """What to say where a run goes on with other settings: a line each for settings and steps."""
    step, lines = int(meta["step"]), []
    changed = [change for change in found.rest if change.key != "steps"]
    if changed:
        text = f"resume: changed since step {step}: {'; '.join(map(str, changed))}."
        if any(change.key in ROWS for change in changed):
            text += " Rows are numbered anew: some come twice, others later or never."
            text += " The first of them go on from the old rows' state." * experiment.carry_state
        lines.append(text)
    old = next((change.old for change in found.rest if change.key == "steps"), experiment.steps)
    if experiment.steps < step:
        lines.append(
            f"resume: the checkpoint is of step {step}, beyond steps={experiment.steps}: nothing "
            "is trained, it is validated as it is."
        )
    elif old <= step < experiment.steps and experiment.optimizer.schedule != "constant":
        end, again = (
            np.asarray(schedule(experiment.optimizer, steps)(at)).item()
            for steps, at in ((old, old - 1), (experiment.steps, step))
        )
        lines.append(
            f"resume: the run had ended after {old} steps at a learning rate of {end:.3g}; with "
            f"steps={experiment.steps} it goes on at {again:.3g} ({experiment.optimizer.schedule})."
        )
    elif old != experiment.steps:
        follows = "" if experiment.optimizer.schedule == "constant" else "; the schedule follows"
        lines.append(f"resume: steps {old}, now {experiment.steps}{follows}.")
    return lines


def refuse_foreign(workdir: Path) -> None:
    """ValueError if `workdir` holds files under the names of a run's that no run of ours wrote."""
    folder = Path(workdir)
    there = [name for name in WRITTEN if (folder / name).exists()]
    lost = _written(folder) is None and checkpoint.committed(folder / CHECKPOINTS)
    if there and stored(folder) is None and not lost:
        raise ValueError(
            f"workdir={workdir} holds {', '.join(there)}, which no run of this program wrote and "
            "a run would write over. Use another workdir."
        )
