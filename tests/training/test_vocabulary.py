"""The vocabulary: sizes that the tokenizer gives, and rows that a mesh adds and nobody sees."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from configs.schema import Data, Experiment, Mesh, Optimizer
from models import lm
from models.channel import glu
from parallel import sharding
from parallel.mesh import make_mesh
from training import loop
from training.checkpoint import Checkpoints
from training.step import fitted, make_trainer, put_batch

BATCH, LENGTH = 4, 8
EXPERIMENT = Experiment(
    model=lm.Config(width=16, depth=1, pattern=(glu.Config(),), channel=None, dtype="float32"),
    steps=4,
    data=Data(length=LENGTH, batch=BATCH),
    optimizer=Optimizer(warmup_steps=1),
)


def experiment(**model):
    """The experiment with another model."""
    return dataclasses.replace(EXPERIMENT, model=dataclasses.replace(EXPERIMENT.model, **model))


def batch(seed):
    """Random tokens, the largest id among them."""
    tokens = np.random.default_rng(seed).integers(0, 257, (BATCH, LENGTH + 1)).astype(np.int32)
    tokens[0, :2] = 256
    ones = np.ones((BATCH, LENGTH), np.int32)
    rows = dict(inputs=tokens[:, :-1], targets=tokens[:, 1:], segments=ones)
    return rows | {"weights": ones.astype(np.float32)}


@functools.cache
def trainer_on(tensor, head="tied"):
    """The mesh of so many devices along `tensor`, and the trainer."""
    mesh = make_mesh(data=1, tensor=tensor, devices=jax.devices()[:tensor])
    with sharding.on(mesh):
        changed = experiment(head=head, softcap=30.0)
        return mesh, make_trainer(changed, mesh, np.ones(257, np.float32))


def steps(tensor, head, state, count, start=0):
    """Losses of `count` steps after `state`, and the state."""
    mesh, trainer = trainer_on(tensor, head)
    losses = []
    with sharding.on(mesh):
        for step in range(start, start + count):
            state, metrics = trainer.step(state, put_batch(trainer.batch, batch(step)))
            losses.append(float(metrics["loss"]))
    return losses, state


def fresh(tensor, head):
    mesh, trainer = trainer_on(tensor, head)
    with sharding.on(mesh):
        return trainer.init()


def test_tables_have_the_vocabulary_s_size_where_no_mesh_asks_for_more():
    model = lm.Config(width=32, depth=1).build(nnx.Rngs(0))
    assert model.embed[...].shape == (257, 32)
    one = trainer_on(1)[1]
    assert one.abstract.params["embed"].shape == (257, 16)
    assert one.abstract == one.stored


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_a_mesh_that_pads_gives_the_same_losses(head):
    """Padding rows count for no normaliser, get no gradient, and hold zeros for ever."""
    state = fresh(4, head)
    table = {"tied": state.params["embed"], "untied": state.params.get("head")}[head]
    assert 260 in table.shape and 260 in state.params["embed"].shape
    losses, state = steps(4, head, state, 3)
    alone, one = steps(1, head, fresh(1, head), 3)
    np.testing.assert_allclose(losses, alone, rtol=2e-6)
    assert not np.asarray(state.params["embed"])[257:].any()
    held = fitted(state, trainer_on(4, head)[1].stored)
    assert jax.tree.map(np.shape, held) == jax.tree.map(np.shape, one)


def test_the_loss_reads_no_padding():
    mesh, trainer = trainer_on(4)
    params = fresh(4, "tied").params
    with sharding.on(mesh):
        rows = put_batch(trainer.batch, batch(0))
        loss = trainer.evaluate(params, rows)[0]
        loud = params | {"embed": params["embed"].at[257:].set(1e3)}
        assert float(trainer.evaluate(loud, rows)[0]) == float(loss)


def test_the_cut_moves_nothing_between_devices():
    """A step of 257 ids in 260 rows has the collectives of a step of 260 ids."""
    mesh, padded = trainer_on(4)

    def collectives(trainer):
        with sharding.on(mesh):
            text = trainer.step.lower(trainer.abstract, trainer.batch).compile().as_text()
        names = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
        return {name: text.count(f" {name}(") for name in names}

    with sharding.on(mesh):
        even = make_trainer(experiment(vocabulary=260, softcap=30.0), mesh, np.ones(260))
    assert collectives(padded) == collectives(even)


def test_a_checkpoint_fits_every_mesh(tmp_path):
    """What four devices saved goes on on one and on two, with the losses of one alone."""
    want, _ = steps(1, "tied", fresh(1, "tied"), 3)
    losses, state = steps(4, "tied", fresh(4, "tied"), 2)
    saved = Checkpoints(tmp_path)
    saved.save(2, fitted(state, trainer_on(4)[1].stored), {})
    saved.wait()
    for tensor in (1, 2, 4):
        mesh, trainer = trainer_on(tensor)
        found = saved.restore(trainer.stored)
        assert found.tree.params["embed"].shape == (257, 16)
        again = fitted(found.tree, trainer.abstract)
        placed = jax.tree.map(lambda a, b: a.sharding == b.sharding, again, trainer.abstract)
        assert jax.tree.all(placed)
        for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
            rows = tuple(slice(min(pair)) for pair in zip(a.shape, b.shape, strict=True))
            if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
                np.testing.assert_array_equal(np.asarray(a)[rows], np.asarray(b)[rows])
        last, _ = steps(tensor, "tied", again, 1, start=2)
        np.testing.assert_allclose([*losses, *last], want, rtol=2e-6)


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """An experiment on a small folder of text, on one device."""
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(f"a line of text {i} " * 9)
    one = functools.partial(make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(loop, "make_mesh", one)
    data = Data(source=f"text:{tmp_path / 'text'}", folder=str(tmp_path), length=LENGTH, batch=4)
    return lambda **model: dataclasses.replace(experiment(**model), data=data)


def test_a_vocabulary_of_0_is_the_tokenizer_s(corpus):
    plan = loop.make_plan(corpus(vocabulary=0))
    assert plan.experiment.model == corpus(vocabulary=257).model
    assert plan.trainer.abstract.params["embed"].shape == (257, 16)
    assert loop.describe(plan)["vocabulary"] == "257"


def test_a_vocabulary_above_the_tokenizer_s_is_said(corpus):
    said = loop.describe(loop.make_plan(corpus(vocabulary=514)))["vocabulary"]
    assert said.startswith("514, far above the tokenizer's 257: ids from there on are never")
    near = loop.describe(loop.make_plan(corpus(vocabulary=260)))["vocabulary"]
    assert near.startswith("260, above the tokenizer's 257")


def test_a_vocabulary_below_the_tokenizer_s_is_refused_before_any_text_is_read():
    missing = Data(source="text:no/such/folder")
    small = dataclasses.replace(experiment(vocabulary=100), data=missing)
    with pytest.raises(ValueError) as error:
        loop.make_plan(small)
    assert str(error.value) == (
        "model.vocabulary=100 is smaller than the tokenizer's 257. Use 257, or 0: what the "
        "tokenizer has."
    )


def test_the_mesh_s_padding_is_no_parameter(corpus, monkeypatch):
    monkeypatch.setattr(loop, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:4]))
    wide = dataclasses.replace(corpus(), mesh=Mesh(data=1, tensor=4))
    said = loop.describe(loop.make_plan(wide))
    assert said["vocabulary"] == "257 (in tables of 260 rows, which the mesh divides)"
    monkeypatch.setattr(loop, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:1]))
    assert loop.describe(loop.make_plan(corpus()))["parameters"] == said["parameters"]
