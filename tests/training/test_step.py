"""The training step: meshes, microbatches, carried states, guarded updates, schedules."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.schema import Data, Experiment, Optimizer
from models import lm
from models.attention import bidirectional, softmax
from models.recurrent import rg_lru
from parallel import sharding
from parallel.mesh import make_mesh
from tests.tolerance import assert_close
from training.optimizers import adamw, lion, muon
from training.step import _join_rows, _split_rows, make_trainer, put_batch
from training.update import schedule

BATCH, LENGTH, STEPS = 8, 16, 4
pytestmark = pytest.mark.xdist_group("training.step")  # trainers are built once


def batch(seed=0, length=LENGTH):
    """Random tokens, two documents a row."""
    tokens = np.random.default_rng(seed).integers(0, 257, (BATCH, length + 1)).astype(np.int32)
    segments = np.where(np.arange(length) < length // 3, 1, 2) + np.zeros((BATCH, 1), int)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segments": segments.astype(np.int32),
        "weights": np.ones((BATCH, length), np.float32),
    }


@functools.cache
def run(rule=adamw, *, sizes=(("data", 1),), poison=False, one=False, **settings):
    """Losses of four steps and the weights after them; `one`: each step sees the same batch."""
    mesh, trainer = trainer_of(rule, sizes, **settings)
    losses = []
    with sharding.on(mesh):
        state = trainer.init()
        for step in range(STEPS):
            rows = batch(0 if one else step)
            if poison and step == 2:
                rows["weights"][0, 0] = np.nan
                before = jax.device_get(state.params)
            state, metrics = trainer.step(state, put_batch(trainer.batch, rows))
            losses.append(float(metrics["loss"]))
            if poison and step == 2:
                assert not bool(metrics["finite"])
                for a, b in zip(
                    jax.tree.leaves(before), jax.tree.leaves(state.params), strict=True
                ):
                    np.testing.assert_array_equal(a, np.asarray(b))
        return losses, jax.device_get(state.params)


@functools.cache
def trainer_of(rule, sizes, *, accumulation=1, carry=False):
    """A mesh and the trainer on it: runs on other batches take the same programs."""
    experiment = Experiment(
        model=lm.Config(
            vocabulary=264,
            width=32,
            depth=3,
            pattern=(rg_lru.Config(), softmax.Config(heads=4, window=8)),
            dtype="float32",
        ),
        steps=STEPS,
        carry_state=carry,
        data=Data(batch=BATCH, length=LENGTH),
        optimizer=Optimizer(rule=rule.Config(), warmup_steps=1, accumulation=accumulation),
    )
    mesh = on_devices(dict(sizes))
    with sharding.on(mesh):
        return mesh, make_trainer(experiment, mesh, np.ones(264))


def on_devices(sizes):
    """The full mesh of eight devices, or one device alone."""
    alone = sizes == {"data": 1}
    return make_mesh(**sizes, devices=jax.devices()[:1] if alone else None)


LONG = pytest.mark.long  # the gate pairs what takes seconds each
EIGHT, CUBE = dict(data=8), dict(data=2, fsdp=2, tensor=2)


@pytest.mark.parametrize(
    ("rule", "sizes"),
    [
        (adamw, EIGHT),
        (muon, CUBE),
        pytest.param(adamw, CUBE, marks=LONG),
        pytest.param(muon, EIGHT, marks=LONG),
    ],
)
def test_any_mesh_gives_the_same_losses_and_weights(rule, sizes):
    losses, params = run(rule, sizes=tuple(sizes.items()))
    alone, alone_params = run(rule)
    np.testing.assert_allclose(losses, alone, rtol=1e-5)
    for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(alone_params), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-3)  # Adam's first steps have the size of rate


def test_microbatches_give_the_same_losses():
    losses, _ = run(accumulation=4)
    np.testing.assert_allclose(losses, run()[0], rtol=1e-5)


@pytest.mark.parametrize("layers", ["scanned", pytest.param("unrolled", marks=LONG)])
def test_microbatches_carry_the_state_of_their_rows(layers):
    """Losses and states of three batches, of documents that go on, are those of one part."""
    experiment = small(layers, carry_state=True)

    def seen(parts):
        settings = dataclasses.replace(experiment.optimizer, accumulation=parts)
        changed, states = dataclasses.replace(experiment, optimizer=settings), []
        losses = [m["loss"] for m in steps(changed, going_on, 3, lambda s: states.append(s.carry))]
        return losses, states

    (whole, states), (apart, in_parts) = seen(1), seen(4)
    np.testing.assert_allclose(apart, whole, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(in_parts), jax.tree.leaves(states), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(states[2]))


def test_rows_go_to_microbatches_and_come_back():
    x = jnp.arange(2 * 12 * 3).reshape(2, 12, 3)
    parts = _split_rows(x, 4, axis=1)
    np.testing.assert_array_equal(parts[3], x[:, 3::4])
    np.testing.assert_array_equal(_join_rows(parts, axis=1), x)
    np.testing.assert_array_equal(_join_rows(_split_rows(x[0], 4)), x[0])
    assert _join_rows(_split_rows(jnp.float32(5), 4)) == 5
    assert _join_rows(_split_rows(jnp.arange(2), 4, axis=1), axis=1).tolist() == [0, 1]


def test_after_skipped_updates_the_logged_rate_is_the_one_applied():
    """Lion moves a gain, which does not decay, by the rate: NaN in steps 4 and 5 of 10."""
    experiment = small("scanned", steps=10, warmup_steps=3)

    def rows(step):
        found = batch(0)
        if step in (3, 4):
            found["weights"][0, 0] = np.nan
        return found

    gains, logged = [], []
    for metrics in steps(experiment, rows, 10, lambda state: gains.append(state.params["norm"])):
        logged.append(metrics["learning_rate"])
    applied = [float(np.abs(b["scale"] - a["scale"]).max()) for a, b in itertools.pairwise(gains)]
    assert applied[3:5] == [0.0, 0.0]
    want = [float(schedule(experiment.optimizer, 10)(step)) for step in range(10)]
    np.testing.assert_allclose(logged, want, rtol=1e-6)
    taken = [0, 1, 2, 5, 6, 7, 8, 9]
    np.testing.assert_allclose(np.take(applied, taken), np.take(logged, taken), rtol=1e-3)


def small(layers, steps=3, warmup_steps=0, carry_state=False):
    """One block a kind of state, and Lion, whose updates are as large as the rate."""
    pattern = (rg_lru.Config(), softmax.Config(heads=4, window=8))
    return Experiment(
        model=lm.Config(
            vocabulary=264, width=32, depth=2, pattern=pattern, dtype="float32", layers=layers
        ),
        steps=steps,
        carry_state=carry_state,
        data=Data(batch=BATCH, length=LENGTH, layout="stream"),
        optimizer=Optimizer(rule=lion.Config(), learning_rate=1e-3, warmup_steps=warmup_steps),
    )


def going_on(step):
    """Random tokens of one document a row, the same in every batch."""
    return batch(step) | {"segments": np.ones((BATCH, LENGTH), np.int32)}


def steps(experiment, rows, count, see=lambda state: None):
    """The metrics of `count` steps on one device; `see` is shown every state, the first one too."""
    mesh = on_devices({"data": 1})
    with sharding.on(mesh):
        trainer = make_trainer(experiment, mesh, np.ones(264))
        state = trainer.init()
        see(jax.device_get(state))
        for step in range(count):
            state, metrics = trainer.step(state, put_batch(trainer.batch, rows(step)))
            see(jax.device_get(state))
            yield {name: float(value) for name, value in metrics.items()}


def test_a_non_finite_update_is_skipped():
    losses, params = run(poison=True)
    assert not np.isfinite(losses[2]) and np.isfinite(losses[3])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_a_carried_state_reads_the_batch_before():
    assert run(carry=True)[0][0] == pytest.approx(run()[0][0], rel=1e-6)
    model = lm.Config(width=32, depth=2, pattern=(rg_lru.Config(),), dtype="float32")
    built = model.build(nnx.Rngs(0))
    of_part = nnx.jit(lambda model, given: model.training_loss(**given))
    whole = nnx.jit(lambda model, given: model.loss(**given)[0])
    rows = batch(length=2 * LENGTH)
    rows["segments"][:] = 7  # one document that goes on
    rows = {name: jnp.asarray(array) for name, array in rows.items()}
    cut = [{k: v[:, s] for k, v in rows.items()} for s in (slice(0, LENGTH), slice(LENGTH, None))]
    state, total = built.init_state(rows["inputs"].shape[0], 2 * LENGTH), 0.0
    for part in cut:
        loss, _, state = of_part(built, part | {"state": state})
        total += loss
    assert_close(total, whole(built, rows), np.float32, "two batches")


@pytest.mark.parametrize("accumulation", [1, 4])
def test_an_encoder_learns_from_what_the_data_hide(accumulation):
    """Each row's share of the loss and of the gradient is the same beside any other rows."""
    model = lm.Config(
        width=32, depth=1, pattern=(bidirectional.Config(),), objective="masked", dtype="float32"
    )
    experiment = Experiment(
        model=model,
        steps=1,
        data=Data(batch=BATCH, length=LENGTH),
        optimizer=Optimizer(warmup_steps=1, accumulation=accumulation),
    )
    mesh = on_devices({"data": 1})
    rows = batch(0)
    rows["hidden"] = np.random.default_rng(1).random((BATCH, LENGTH)) < lm.HIDDEN
    with sharding.on(mesh):
        trainer = make_trainer(experiment, mesh, np.ones(257))
        state = trainer.init()
        params = jax.tree.map(jnp.array, state.params)
        given = put_batch(trainer.batch, rows)
        total, _ = trainer.evaluate(state.params, given)
        _, metrics = trainer.step(state, given)
    built, tokens = nnx.merge(trainer.graph, params), jax.tree.map(jnp.asarray, rows)
    each = [built.loss(**{k: v[i : i + 1] for k, v in tokens.items()})[0] for i in range(BATCH)]
    assert float(total) == pytest.approx(float(sum(each)), rel=1e-5)
    assert float(metrics["loss"]) == pytest.approx(float(sum(each)) / BATCH / LENGTH, rel=1e-5)


@pytest.mark.parametrize("layers", [pytest.param("scanned", marks=LONG), "unrolled"])
def test_a_state_is_carried_however_layers_are_arranged(layers):
    """As `carry_state=True` with the quickstart, whose layers are unrolled."""
    experiment = Experiment(
        model=lm.Config(
            width=32, depth=1, pattern=(rg_lru.Config(),), layers=layers, dtype="float32"
        ),
        steps=2,
        carry_state=True,
        data=Data(batch=BATCH, length=LENGTH),
    )
    mesh = on_devices({"data": 1})
    with sharding.on(mesh):
        trainer = make_trainer(experiment, mesh, np.ones(257))
        rows = batch(0)
        rows["segments"][:] = 7
        state, _ = trainer.step(trainer.init(), put_batch(trainer.batch, rows))
        params, carry = jax.tree.map(jnp.array, (state.params, state.carry))  # a step donates them
        _, metrics = trainer.step(state, put_batch(trainer.batch, rows))
    rows["weights"] = rows["weights"] / (BATCH * LENGTH)
    rows, model = jax.tree.map(jnp.asarray, rows), nnx.merge(trainer.graph, params)
    want, _, _ = model.training_loss(**rows, state=carry)
    fresh, _ = model.loss(**rows)
    assert float(metrics["loss"]) == pytest.approx(float(want), rel=1e-5)
    assert float(metrics["loss"]) != pytest.approx(float(fresh), rel=1e-5)


@pytest.mark.parametrize("name", ["cosine", "wsd", "constant"])
def test_schedules_rise_hold_and_end(name):
    config = Optimizer(schedule=name, learning_rate=1.0, warmup_steps=10, decay_fraction=0.2)
    rate = schedule(config, 100)
    rates = np.asarray([float(rate(step)) for step in range(100)])
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)
    assert np.all(np.diff(rates[10:]) <= 1e-6)
    end = {"cosine": 0.1, "wsd": 0.1, "constant": 1.0}[name]
    assert rates[-1] == pytest.approx(end, abs=0.06)
    assert rates[60] == pytest.approx(1.0) or name == "cosine"


def test_more_steps_learn_one_batch():
    for rule in (adamw, muon):
        losses, _ = run(rule, one=True)
        assert losses[-1] < losses[0] - 0.1, losses
