"""How well a trained config predicts: validation, longer texts, noisy ones, and likeness to the
first config.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from evaluation import rows
from evaluation.subject import Subject
from parallel import sharding
from resources import fidelity
from resources.row import Row, not_available
from training import checkpoint, layout, log, loop, metrics, runs
from training.step import fitted, put_batch

LONGER = (2, 4)  # times the trained length
NOISE = 0.1  # share of tokens replaced
UNIT = "bit/byte"
BITS = "validation_bits_per_byte"  # in metrics.jsonl


class Trained(NamedTuple):
    """A config with the weights of a run."""

    plan: loop.Plan
    params: Any
    step: int
    folder: Path  # of the run
    remark: str = ""  # on the corpus, where the run was trained on another one


def load(subject: Subject, workdir: str) -> Trained | str:
    """The newest checkpoint of a run's folder, or why there is none for this config."""
    if not workdir:
        return "no --workdir with a checkpoint"
    folder = Path(workdir)
    plan = loop.make_plan(subject.experiment)
    model, trainer, remark = plan.experiment.model, plan.trainer, ""
    former = model

    def shapes(meta):
        nonlocal former, remark
        found = runs.difference(folder, meta, plan.experiment, plan.train.fingerprint)
        runs.refuse_reuse(folder, meta, found.model)
        if found.corpus:
            remark = f"trained with {found.corpus[0]}"
        former = runs.former_layout(folder, meta, model)
        state = loop.stored_in(plan, former)
        return {name: getattr(state, name) for name in trainer.judged}

    try:
        restored = checkpoint.restore(folder / runs.CHECKPOINTS, shapes, partial=True)
        if restored is None:
            return f"no checkpoint in {folder / runs.CHECKPOINTS}"
        stored = {name: getattr(trainer.stored, name) for name in trainer.judged}
        found = layout.relaid(restored.tree, former, stored, model)
    except ValueError as error:
        return str(error)
    found = {name: fitted(tree, getattr(trainer.abstract, name)) for name, tree in found.items()}
    params = trainer.weights(trainer.abstract._replace(**found))
    return Trained(plan, params, restored.meta["step"], folder, remark)


def steps_to(found: Trained | str, bits: float) -> int | str | None:
    """The step at which the run's validation first had at most `bits` per byte; None: never.

    Or the reason why that is not known. A run validates every `evaluation.every_steps`.
    """
    if isinstance(found, str):
        return found
    file = found.folder / "metrics.jsonl"
    if not file.exists():
        return f"no {file}"
    known = [(r["step"], r[BITS]) for r in log.records(file) if r.get(BITS) is not None]
    if not known:
        return f"{file} holds no validation"
    return next((step for step, value in known if value <= bits), None)


def validation(subject: Subject, found: Trained | str) -> list[Row]:
    """The data's metric on validation: as trained, on longer rows, with noise in the inputs."""
    longer = [f"validation, rows {times} x as long" for times in LONGER]
    noisy = f"validation, {NOISE:.0%} of tokens replaced"
    unit = _unit(subject)
    if isinstance(found, str):
        return [not_available(name, unit, found) for name in ("validation", *longer, noisy)]
    plan = found.plan
    batches = min(subject.experiment.evaluation.batches, len(plan.validation))
    with sharding.on(plan.mesh):
        score = loop.evaluate(plan, found.params, batches)
        with_noise = loop.evaluate(_corrupted(plan), found.params, batches)
    note = f"step {found.step}, {batches} of {len(plan.validation)} batches"
    note += f"; {found.remark}" if found.remark else ""
    found_rows = [Row("validation", score, unit, "measured", note)]
    found_rows += [_longer(subject, found, times, score) for times in LONGER]
    return [*found_rows, Row(noisy, with_noise, unit, "measured", _times(with_noise, score))]


def _unit(subject: Subject) -> str:
    """Of the score: shares of right answers have none."""
    return "" if metrics.of(subject.experiment.data).count else UNIT


def _times(one: float, other: float) -> str:
    return f"x {one / other:.3f}" if other else ""


def _longer(subject: Subject, found: Trained, times: int, score: float) -> Row:
    """Rows `times` as long, as many tokens a batch as trained where the batch allows."""
    data = subject.experiment.data
    name = f"validation, rows {times} x as long"
    batch = max(sharding.row_ways(subject.mesh), data.batch // times)
    try:
        plan = loop.make_plan(subject.at(length=data.length * times, batch=batch).experiment)
    except ValueError as error:
        return not_available(name, _unit(subject), str(error))
    shapes = [jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (found.params, _of(plan))]
    if shapes[0] != shapes[1]:
        return not_available(name, _unit(subject), "its weights are as long as the rows")
    batches = min(subject.experiment.evaluation.batches, len(plan.validation))
    with sharding.on(plan.mesh):
        longer = loop.evaluate(plan, found.params, batches)
    return Row(name, longer, _unit(subject), "measured", _times(longer, score))


def _of(plan: loop.Plan) -> Any:
    return plan.trainer.abstract.params


class _Noisy:
    """A split whose inputs are in part random tokens; targets stay.

    Those of an encoder are the tokens hidden from it: others are replaced.
    """

    def __init__(self, split: Any, vocabulary: int):
        self.split, self.vocabulary = split, vocabulary

    def __len__(self) -> int:
        return len(self.split)

    def batch(self, index: int) -> dict[str, np.ndarray]:
        """As `Split.batch`."""
        found = self.split.batch(index)
        key = jax.random.fold_in(jax.random.key(0), index)
        read = (found["segments"] != 0) & ~found.get("hidden", np.False_)
        inputs = fidelity.corrupt(found["inputs"], NOISE, self.vocabulary, key, mask=read)
        return found | {"inputs": np.asarray(inputs, np.int32)}


def _corrupted(plan: loop.Plan) -> Any:
    return plan._replace(validation=_Noisy(plan.validation, plan.train.tokenizer.vocabulary))


def likeness(
    subject: Subject, first: Subject, found: Trained | str, original: Trained | str
) -> list[Row]:
    """How small it is against the first config, and how like the predictions of the two are."""
    smaller = rows.weight_bytes(first) / rows.weight_bytes(subject)
    ratio = Row("compression ratio to the first", smaller, "", "modelled", "bytes of the weights")
    names = (
        ("agreement with the first", ""),
        ("KL from the first", "nat"),
        ("KL to the first", "nat"),
        ("loyalty to the first", ""),
    )
    if isinstance(found, str) or isinstance(original, str):
        reason = found if isinstance(found, str) else str(original)
        return [ratio, *(not_available(name, unit, reason) for name, unit in names)]
    if reason := _apart(found.plan, original.plan):
        return [ratio, *(not_available(name, unit, reason) for name, unit in names)]
    batches = min(subject.experiment.evaluation.batches, len(original.plan.validation))
    told = fidelity.fidelity(_logits(original, found, batches))
    values = (told.agreement, told.kl, told.kl_reverse, told.loyalty)
    note = f"{told.positions} positions"
    measured = [
        Row(name, value, unit, "measured", note)
        if np.isfinite(value)
        else not_available(name, unit, "infinite: one rules out what the other allows")
        for (name, unit), value in zip(names, values, strict=True)
    ]
    return [ratio, *measured]


def _apart(one: loop.Plan, other: loop.Plan) -> str:
    """Why the predictions of two runs cannot be compared; "" where they can."""
    if one.validation.fingerprint != other.validation.fingerprint:
        return "the two were trained on other tokens"
    if one.experiment.model.objective != other.experiment.model.objective:
        return "one fills in hidden tokens, the other predicts the next"
    return ""


def _logits(p: Trained, q: Trained, batches: int) -> Iterator[fidelity.Batch]:
    """Both models' logits on the same validation batches; an encoder's, where tokens are hidden."""

    def forward(trained):
        @jax.jit
        def run(params, batch):
            model = nnx.merge(trained.plan.trainer.graph, params)
            rows = dict(segments=batch["segments"], hidden=batch.get("hidden"))
            return model.logits(model.read(batch["inputs"], **rows))

        return lambda batch: run(trained.params, batch)

    runs = [forward(p), forward(q)]
    with sharding.on(p.plan.mesh):
        for index in range(batches):
            read = p.plan.validation.batch(index)
            batch = put_batch(p.plan.trainer.batch, read)
            words = min(trained.plan.train.tokenizer.vocabulary for trained in (p, q))
            first, other = (np.asarray(run(batch))[..., :words] for run in runs)
            hidden = read.get("hidden")
            targets = read["targets"] if hidden is None else read["inputs"]
            counts = (read["weights"] > 0) & (True if hidden is None else hidden)
            yield fidelity.Batch(first, other, counts, targets)
