"""What a task is judged by: counts by hand, and a run from its start block to its last record."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import checks, overrides
from configs.schema import Checkpoint, Data, Evaluation, Experiment, Optimizer
from data.tasks import induction, parity
from models import lm
from models.attention import softmax
from parallel import sharding
from training import checkpoint, loop, metrics

RIGHT = np.array([[1, 0, 1], [1, 1, 0], [0, 1, 0], [1, 1, 1]], bool)
DUE = np.array([[1, 1, 1], [1, 1, 0], [0, 0, 1], [0, 0, 0]], bool)


@pytest.mark.parametrize(
    ("name", "total", "count"),
    [("accuracy", 2 / 3 + 1 + 0, 3), ("token_accuracy", 4, 6), ("exact", 1, 3)],
)
def test_counts_by_hand(name, total, count):
    """The last row is padding: it has no answer and counts for nothing."""
    found = metrics.METRICS[name].count(jnp.asarray(RIGHT), jnp.asarray(DUE))
    assert float(found[0]) == pytest.approx(total, rel=1e-6) and int(found[1]) == count


def test_a_metric_that_is_none_is_one_line():
    with pytest.raises(ValueError, match=r"^data.source has metric 'elo'; known are bits_per_byte"):
        source = induction.Config()
        source.metric = "elo"
        metrics.of(Data(source=source))


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """A run on parity that judges twice."""
    data = Data(source=parity.Config(shortest=4, held_out=20), length=8, batch=8)
    model = lm.Config(
        vocabulary=0, width=16, depth=1, pattern=(softmax.Config(heads=2),), dtype="float32"
    )
    experiment = Experiment(
        model,
        steps=6,
        log_every=1,
        data=data,
        optimizer=Optimizer(warmup_steps=1),
        checkpoint=Checkpoint(every_steps=3),
        evaluation=Evaluation(every_steps=3, batches=99),
    )
    return loop.train(experiment, str(tmp_path_factory.mktemp("run") / "x"), None)


def test_logits_at_the_answers_alone_give_the_same_loss_and_gradient():
    """Two rows of six tokens: places 1 and 4, place 0 and none; all places with their weights."""
    model = lm.Config(vocabulary=5, width=8, depth=1, dtype="float32").build(nnx.Rngs(0))
    rng = np.random.default_rng(0)
    inputs, targets = (jnp.asarray(rng.integers(5, size=(2, 6)), jnp.int32) for _ in range(2))
    weights = jnp.zeros((2, 6)).at[[0, 0, 1], [1, 4, 0]].set(jnp.asarray([1.0, 0.5, 2.0]))
    graph, params = nnx.split(model)

    def loss(params, answers):
        return nnx.merge(graph, params).training_loss(inputs, targets, weights, answers=answers)[0]

    both = [None, jnp.asarray([[1, 4], [0, -1]])]
    (every, grads), (some, same) = (jax.value_and_grad(loss)(params, one) for one in both)
    assert float(some) == pytest.approx(float(every), rel=1e-6) and float(every) > 1
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(same), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    total, each = model.loss(inputs, targets, weights, answers=both[1])
    assert float(total) == pytest.approx(float(every), rel=1e-6) and each.shape == (2, 2)


def test_the_score_of_a_run_is_that_of_its_answers(result):
    """20 rows in three batches, the last of them filled up with padding."""
    assert result.plan.experiment.model.vocabulary == 2
    right = []
    for i in range(3):
        batch = result.plan.validation.batch(i)
        hidden = result.model.read(
            jnp.asarray(batch["inputs"]), segments=jnp.asarray(batch["segments"])
        )
        answers = np.argmax(np.asarray(result.model.logits(hidden)), -1)
        right += (answers == batch["targets"])[batch["weights"] > 0].tolist()
    assert len(right) == 20 and result.score == pytest.approx(np.mean(right))


def test_validation_may_be_of_longer_rows():
    """Trained at 8 bits and judged at 24: the score is that of the model's own answers there."""
    experiment = Experiment(
        lm.Config(vocabulary=0, width=16, depth=1, dtype="float32"),
        data=Data(source=parity.Config(shortest=16, held_out=24), length=16, batch=8),
        evaluation=Evaluation(length=24),
    )
    plan = loop.make_plan(experiment)
    with sharding.on(plan.mesh):
        params = plan.trainer.init().params
        score = loop.evaluate(plan, params, 0)
    model, right = nnx.merge(plan.trainer.graph, params), []
    for i in range(3):
        batch = plan.validation.batch(i)
        assert batch["inputs"].shape == (8, 24)
        inputs, segments = (jnp.asarray(batch[name]) for name in ("inputs", "segments"))
        logits = model.logits(model.read(inputs, segments=segments))
        found = np.argmax(np.asarray(logits), -1) == batch["targets"]
        right += found[batch["weights"] > 0].tolist()
    assert score == pytest.approx(np.mean(right)) and len(right) == 24
    assert plan.train.batch(0)["inputs"].shape == (8, 16)
    said = loop.describe(plan)
    assert said["data"].startswith("parity: every training row is new (")
    assert said["steps"] == "1,000"


@pytest.mark.parametrize(
    "change",
    [
        "data.tokenizer='bpe:x.json'",
        "data.layout='packed'",
        "model.objective='masked'",
        "model.predict=2",
    ],
)
def test_what_does_not_go_with_a_task_is_one_line(change):
    key, _, value = change.partition("=")
    experiment = Experiment(lm.Config(), data=Data(source=parity.Config()))
    checks.check(experiment)
    experiment = overrides.apply(experiment, [(key, value.strip("'"))])
    with pytest.raises(ValueError, match=f"^{re.escape(change)} does not go with the task parity"):
        checks.check(experiment)


def test_records_and_checkpoints_name_the_score(result):
    lines = result.paths["metrics"].read_text().splitlines()
    records = [json.loads(line) for line in lines]
    judged = {r["step"]: r["validation_accuracy"] for r in records if "validation_accuracy" in r}
    assert set(judged) == {3, 6} and judged[6] == pytest.approx(result.score)
    answers = [r for r in records if "bits_per_answer" in r]
    assert len(answers) == 6 and not any("bits_per_byte" in r for r in records)
    for r in answers:  # an answer is a symbol, whatever its name is
        assert r["bits_per_answer"] == pytest.approx(r["loss"] / np.log(2), rel=1e-5)
        assert r["targets"] == 8
    folder = result.paths["checkpoint"].parent
    assert checkpoint.peek(folder)["metric"] == pytest.approx(-result.score)  # the best is lowest
    assert result.paths["loss curve"].stat().st_size > 1000
