"""Every variant trains: 200 steps on the embedded corpus at about 1M parameters, pytest -m zoo.

    pytest -m zoo -n 2 --page=zoo

writes docs/zoo.md from a run in which all passed. One setting for all: what the table shows is that
things learn, not which one is best.
"""

import dataclasses
import math

import jax
import pytest
from flax import nnx

from configs.schema import Checkpoint, Data, Evaluation, Experiment, Mesh, Optimizer
from models import catalogue, lm
from models.attention import softmax
from models.block import residual
from tests import pages
from training import loop

STEPS, LENGTH, WIDTH, SIZE = 200, 128, 128, 1_000_000
# An encoder predicts 15 % of its tokens: four times the rows give it 0.6 times the predictions.
BATCH = {"next": 8, "masked": 32}
# Validation bits per byte after 200 steps that a family must stay below. Knowing only how often
# each byte occurs costs 4.8 bits; knowing the byte before, 3.6. Recurrences that decay look at it
# from the start; attention, long filters and states that never forget must first learn to. Mixing
# of low rank or by weights of places learns slowest: by then, little more than a text's own bytes.
DECAYING, ANYWHERE, MASKED, LOW_RANK = 3.6, 4.4, 4.6, 4.7


def bound_of(name: str, objective: str) -> float:
    """Bits per byte that a variant must stay below."""
    family = name.partition(".")[0]
    if family == "low_rank":
        return LOW_RANK
    if objective == "masked":
        return MASKED
    return DECAYING if family in ("state_space", "recurrent") else ANYWHERE


def model_of(config) -> lm.Config:
    """The variant in a model of the depth that brings it nearest to SIZE parameters."""
    if lm.is_channel(config):
        config = residual.Config(softmax.Config(window=64), config)
    model = lm.Config(width=WIDTH, pattern=(config,), dtype="float32")
    try:
        counts = {depth: _size(dataclasses.replace(model, depth=depth)) for depth in (1, 2)}
    except ValueError as error:
        if "bidirectional" not in str(error):
            raise
        # As in their papers, encoders get positions: most of their mixers are blind to order.
        model = dataclasses.replace(model, objective="masked", positions="sinusoidal")
        counts = {depth: _size(dataclasses.replace(model, depth=depth)) for depth in (1, 2)}
    layer = counts[2] - counts[1]
    depth = max(1, round((SIZE - counts[1]) / layer) + 1)
    return dataclasses.replace(model, depth=depth)


def _size(model: lm.Config) -> int:
    shapes = nnx.state(nnx.eval_shape(lambda: model.build(nnx.Rngs(0))), nnx.Param)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.zoo
@pytest.mark.timeout(3600)  # long filters are slow on a CPU
@pytest.mark.parametrize("name", catalogue.cases())
def test_it_learns(name, tmp_path, record_property):
    model = model_of(catalogue.cases()[name])
    experiment = Experiment(
        model=model,
        steps=STEPS,
        data=Data(length=LENGTH, batch=BATCH[model.objective]),
        optimizer=Optimizer(learning_rate=3e-3, warmup_steps=20),
        mesh=Mesh(data=1),
        checkpoint=Checkpoint(every_steps=0),
        evaluation=Evaluation(every_steps=0, batches=8),
    )
    result = loop.train(experiment, str(tmp_path), None)
    bits = result.score
    bound = bound_of(name, model.objective)
    assert result.finished and math.isfinite(bits) and bits < bound, (bits, bound)
    numbers = f"{_size(model) / 1e6:.2f}", str(model.depth), f"{bits:.2f}"
    record_property("cells", [*numbers, model.objective])


def test_the_page_has_every_variant_below_its_bound():
    head, *rows = pages.read("zoo")
    assert head == COLUMNS
    assert [name for name, *_ in rows] == list(catalogue.cases())
    for name, _, _, bits, bound, objective in rows:
        assert float(bits) < float(bound) == bound_of(name, objective), name


HEAD = f"""# Every variant trains

Written by `pytest -m zoo -n 2 --page=zoo`: {STEPS} steps of {BATCH["next"]} x {LENGTH} bytes of
Python's own source at width {WIDTH}, one learning rate for all. A token mixer stands before a gated
linear unit, a channel mixer after attention with a window of 64; encoders (masked) have positions
added to their embeddings and fill in 15 % of the bytes of {BATCH["masked"]} rows a step. "bits" are
validation bits per byte, which must be finite and below the bound of the family, or of encoders:
knowing only how often each byte occurs costs 4.8 bits, knowing the byte before 3.6. Two hundred
steps show that a variant learns, not which one is best; of mixing by low rank or by weights of
places they show little.

"""
COLUMNS = ["variant", "M parameters", "layers", "bits", "bound", "objective"]


def page():
    """Of docs/zoo.md: the test, the ids that it needs, its cells, and what writes it."""
    variants = list(catalogue.cases())
    found = {v: [*numbers, objective] for v, *numbers, _, objective in pages.read("zoo")[1:]}

    def write(found):
        lines = []
        for variant in (v for v in variants if v in found):
            *numbers, objective = found[variant]
            bound = f"{bound_of(variant, objective):.1f}"
            lines.append([variant, *numbers, bound, objective])
        return HEAD + pages.table(COLUMNS, lines)

    return "test_it_learns", variants, found, write
