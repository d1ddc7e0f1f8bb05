"""Every update rule against NumPy, and inside a training step: it learns, is split, and resumes."""

import dataclasses
import functools
import importlib
import importlib.util
import pkgutil
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import training.optimizers
from configs import checks, schema
from configs.schema import Data, Experiment, Optimizer
from models import lm
from models.attention import softmax
from parallel import sharding
from parallel.mesh import AXES, make_mesh
from training import checkpoint
from training.optimizers import adafactor, adamw, lion, muon, schedule_free, soap
from training.step import make_trainer, put_batch
from training.update import averaged, make_rule

RULES = {
    info.name: importlib.import_module(f"training.optimizers.{info.name}")
    for info in pkgutil.iter_modules(training.optimizers.__path__)
}
DIMS = {"map": ("parts", "embed", "heads", "key"), "gain": ("embed",)}
SHAPES = {"map": (2, 4, 2, 2), "gain": (4,)}
RATE, DECAY, STEPS = 0.1, 0.3, 7
rng = np.random.default_rng(3)
START = {key: rng.normal(size=shape) for key, shape in SHAPES.items()}
GRADS = [{key: rng.normal(size=shape) for key, shape in SHAPES.items()} for _ in range(STEPS)]


def rates(step):
    """A rate that rises and falls."""
    return RATE * (step + 1) if step < 3 else RATE


def ours(config, see=lambda state, params: params):
    """What `see` makes of the state and the weights after every step, in float64."""
    made = functools.partial(
        make_rule, Optimizer(rule=config, weight_decay=DECAY, clip_norm=0.0), DIMS
    )

    @jax.jit
    def step(rate, grads, state, params):
        moves, state = made(rate).update(grads, state, params)
        return state, optax.apply_updates(params, moves)

    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, START)
        state, found = made().init(params), []
        for i, grads in enumerate(GRADS):
            state, params = step(rates(i), grads, state, params)
            found.append(jax.tree.map(np.asarray, see(state, params)))
    return found


def adam(grads, b1, b2, eps, skip=0):
    """m^ / (sqrt(v^) + eps) after each gradient."""
    m = v = 0.0
    for t, g in enumerate(grads, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        yield m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)


def walk(key, moves, decay):
    """The weight after each step that `moves` it."""
    w, found = START[key], []
    for i, move in enumerate(moves):
        w = w - rates(i) * (move + decay * w)
        found.append(w)
    return found


def equal(found, key, want):
    """To the digits of the counts and rates of a step, which are float32."""
    np.testing.assert_allclose([step[key] for step in found], want, rtol=1e-5, atol=1e-6)


def matrices(x):
    """(P, D, H, K) as P matrices (D, H K)."""
    return x.reshape(2, 4, 4)


def test_adamw():
    found = ours(adamw.Config(b1=0.8, b2=0.9, eps=1e-3))
    for key, decay in (("map", DECAY), ("gain", 0.0)):
        moves = adam([g[key] for g in GRADS], 0.8, 0.9, 1e-3)
        equal(found, key, walk(key, moves, decay))


def test_checkpoints_of_optax_fit():
    """AdamW's and Muon's states have the names of optax's own, as those of earlier runs."""
    matrix = optax.contrib.MuonDimensionNumbers((1,), (2, 3))
    theirs = {
        adamw: optax.adamw(lambda count: RATE),
        muon: optax.contrib.muon(
            lambda count: RATE, muon_weight_dimension_numbers={"map": matrix, "gain": None}
        ),
    }
    for module, rule in theirs.items():
        found = make_rule(Optimizer(rule=module.Config()), DIMS).init(START)
        want = rule.init(START)
        named = [
            [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
            for state in (found, want)
        ]
        assert named[0] == named[1]


def test_lion():
    found = ours(lion.Config(b1=0.6, b2=0.7))
    for key, decay in (("map", DECAY), ("gain", 0.0)):
        m, moves = np.zeros(SHAPES[key]), []
        for g in GRADS:
            moves.append(np.sign(0.6 * m + 0.4 * g[key]))
            m = 0.7 * m + 0.3 * g[key]
        equal(found, key, walk(key, moves, decay))


def test_muon():
    """Five steps of the quintic of Jordan et al. on Nesterov's momentum, a matrix a part."""
    found = ours(muon.Config(momentum=0.9, b1=0.8, b2=0.85))
    m, moves = 0.0, []
    for t, grads in enumerate(GRADS, start=1):
        g = matrices(grads["map"])
        m = 0.9 * m + 0.1 * g
        ahead = 0.9 * m / (1 - 0.9 ** (t + 1)) + 0.1 * g / (1 - 0.9**t)
        x = ahead / np.linalg.norm(ahead, axis=(1, 2), keepdims=True)
        for _ in range(5):
            a = x @ x.swapaxes(1, 2)
            x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
        moves.append(0.2 * np.sqrt(4) * x.reshape(SHAPES["map"]))
    equal(found, "map", walk("map", moves, DECAY))
    m = v = 0.0
    moves = []
    for t, grads in enumerate(GRADS, start=1):  # Adam with Nesterov's momentum (Dozat 2016)
        g = grads["gain"]
        m, v = 0.8 * m + 0.2 * g, 0.85 * v + 0.15 * g * g
        ahead = 0.8 * m / (1 - 0.8 ** (t + 1)) + 0.2 * g / (1 - 0.8**t)
        moves.append(ahead / (np.sqrt(v / (1 - 0.85**t)) + 1e-8))
    equal(found, "gain", walk("gain", moves, 0.0))


def test_soap():
    """Algorithm 3 of the paper, a matrix at a time, with bases renewed every third update."""
    found = ours(soap.Config(b1=0.8, b2=0.9, eps=1e-6, every=3))
    for part in range(2):
        left = right = m = v = 0.0
        moves = []
        for t, grads in enumerate(GRADS):
            g = matrices(grads["map"])[part]
            if t == 0:
                moves.append(np.zeros_like(g))
            else:
                m = 0.8 * m + 0.2 * g
                v = 0.9 * v + 0.1 * (q_left.T @ g @ q_right) ** 2
                turned = q_left.T @ m @ q_right / (1 - 0.8**t)
                turned = turned / (np.sqrt(v / (1 - 0.9**t)) + 1e-6)
                moves.append(q_left @ turned @ q_right.T)
            left, right = 0.9 * left + 0.1 * g @ g.T, 0.9 * right + 0.1 * g.T @ g
            if t == 0:
                q_left, q_right = np.linalg.eigh(left)[1], np.linalg.eigh(right)[1]
            elif t % 3 == 0:
                by_size = np.argsort(-np.diag(q_left.T @ left @ q_left))
                q_left, v = np.linalg.qr(left @ q_left[:, by_size])[0], v[by_size]
                by_size = np.argsort(-np.diag(q_right.T @ right @ q_right))
                q_right, v = np.linalg.qr(right @ q_right[:, by_size])[0], v[:, by_size]
        w = matrices(START["map"])[part]
        for i, move in enumerate(moves):
            w = w - rates(i) * (move + DECAY * w)
            got = matrices(found[i]["map"])[part]
            np.testing.assert_allclose(got, w, rtol=1e-5, atol=1e-6)
    equal(found, "gain", walk("gain", adam([g["gain"] for g in GRADS], 0.8, 0.9, 1e-6), 0.0))


def test_soap_leaves_long_sides_unrotated():
    """With no side rotated it is Adam, whose first step it lacks."""
    found = ours(soap.Config(b1=0.8, b2=0.9, eps=1e-6, longest=3))
    moves = [np.zeros(SHAPES["map"]), *adam([g["map"] for g in GRADS[1:]], 0.8, 0.9, 1e-6)]
    equal(found, "map", walk("map", moves, DECAY))


def test_adafactor():
    found = ours(adafactor.Config(clip=0.9))
    rows, columns, moves = np.zeros((2, 4, 1)), np.zeros((2, 1, 4)), []
    v, gains = 0.0, []
    for t, grads in enumerate(GRADS, start=1):
        keep = 1 - t**-0.8
        g = matrices(grads["map"])
        rows = keep * rows + (1 - keep) * (g * g).mean(2, keepdims=True)
        columns = keep * columns + (1 - keep) * (g * g).mean(1, keepdims=True)
        u = g / np.sqrt(rows * columns / rows.mean(1, keepdims=True))
        moves.append((u / max(1, np.sqrt((u * u).mean()) / 0.9)).reshape(SHAPES["map"]))
        v = keep * v + (1 - keep) * grads["gain"] ** 2
        u = grads["gain"] / np.sqrt(v)
        gains.append(u / max(1, np.sqrt((u * u).mean()) / 0.9))
    equal(found, "map", walk("map", moves, DECAY))
    equal(found, "gain", walk("gain", gains, 0.0))
    relative = ours(adafactor.Config(clip=0.9, floor=1e-3))
    size = np.sqrt((START["map"] ** 2).mean())
    want = START["map"] - rates(0) * (size * moves[0] + DECAY * START["map"])
    np.testing.assert_allclose(relative[0]["map"], want, rtol=1e-7)


def test_schedule_free():
    """y trains, x is judged; x is the mean of z, weighed by the squared highest rate so far."""
    config = schedule_free.Config(b1=0.7, b2=0.9, eps=1e-6)
    found = ours(config, lambda state, y: (y, config.evaluated(state, y)))
    for key, decay in (("map", DECAY), ("gain", 0.0)):
        x = y = z = START[key]
        v = total = 0.0
        for i, grads in enumerate(GRADS):
            v = 0.9 * v + 0.1 * grads[key] ** 2
            move = grads[key] / (np.sqrt(v / (1 - 0.9 ** (i + 1))) + 1e-6)
            z = z - rates(i) * (move + decay * y)
            weight = max(rates(j) for j in range(i + 1)) ** 2
            total += weight
            x = x + weight / total * (z - x)
            y = 0.3 * z + 0.7 * x
            np.testing.assert_allclose(found[i][0][key], y, rtol=1e-5)
            np.testing.assert_allclose(found[i][1][key], x, rtol=1e-5)


def test_an_average_forgets_its_start():
    """d = 1/10, 2/11, ... up to the decay."""
    one = {"w": jnp.ones(2)}
    first = averaged(0.99, {"w": jnp.zeros(2)}, one, 0)
    np.testing.assert_allclose(first["w"], 0.9, rtol=1e-6)
    np.testing.assert_allclose(averaged(0.99, first, one, 1)["w"], 1 - 0.1 * 2 / 11, rtol=1e-6)
    np.testing.assert_allclose(averaged(0.05, first, one, 1)["w"], 1 - 0.1 * 0.05, rtol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_settings_out_of_range_are_refused(name):
    config = RULES[name].Config()
    for field in dataclasses.fields(config):
        experiment = Experiment(lm.Config())
        rule = dataclasses.replace(config, **{field.name: field.type(-1)})
        experiment.optimizer.rule = rule
        with pytest.raises(ValueError, match=f"^optimizer.rule.{field.name}=-1"):
            checks.check(experiment)
            rule.build(None, None, None)


def experiment(rule, **settings) -> Experiment:
    block = softmax.Config(heads=4)
    return Experiment(
        lm.Config(width=32, depth=2, pattern=(block,), channel=None, dtype="float32"),
        steps=8,
        data=Data(batch=8, length=16),
        optimizer=Optimizer(rule=rule, learning_rate=1e-2, warmup_steps=1, **settings),
    )


def trainer_on(mesh, given):
    with sharding.on(mesh):
        return make_trainer(given, mesh, np.ones(257))


def train(trainer, mesh, steps, state=None):
    """The state after `steps` on one batch of random tokens, and the losses."""
    with sharding.on(mesh):
        state, losses = state or trainer.init(), []
        tokens = np.random.default_rng(0).integers(0, 257, (8, 17)).astype(np.int32)
        ones = np.ones((8, 16), np.int32)
        rows = dict(inputs=tokens[:, :-1], targets=tokens[:, 1:], segments=ones)
        rows = put_batch(trainer.batch, rows | {"weights": ones.astype(np.float32)})
        for _ in range(steps):
            state, metrics = trainer.step(state, rows)
            losses.append(float(metrics["loss"]))
        return state, losses


SPLIT = [name for name, rule in RULES.items() if not getattr(rule.Config, "one_cpu", False)]


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


@pytest.mark.parametrize("name", RULES)
def test_a_rule_learns_splits_and_resumes(name, tmp_path):
    """On eight devices, in two microbatches and with an average, as on one; resumed bit for bit.

    Rules that several CPU devices cannot run take one.
    """
    average = 0.0 if hasattr(RULES[name].Config, "evaluated") else 0.9
    given = experiment(RULES[name].Config(), accumulation=2, ema=average)
    alone = make_mesh(devices=jax.devices()[:1])
    mesh = make_mesh(data=2, fsdp=2, tensor=2) if name in SPLIT else alone
    trainer = trainer_on(mesh, given)
    state, first = train(trainer, mesh, 3)
    saved = checkpoint.Checkpoints(tmp_path)
    saved.save(3, state, {})
    saved.wait()
    with sharding.on(mesh):
        again = saved.restore(trainer.abstract).tree
    state, rest = train(trainer, mesh, 5, state)
    resumed, others = train(trainer, mesh, 5, again)
    assert rest == others and same(state._replace(key=0), resumed._replace(key=0))
    assert rest[-1] < first[0] - 0.3, first + rest
    _, losses = train(trainer_on(alone, experiment(RULES[name].Config())), alone, 8)
    np.testing.assert_allclose(first + rest, losses, rtol=2e-3)
    judged = jax.device_get(trainer.weights(state))
    assert jax.tree.map(np.shape, judged) == jax.tree.map(np.shape, state.params)
    assert not same(judged, state.params)


def test_what_several_cpus_cannot_run_is_refused(monkeypatch):
    monkeypatch.setattr(RULES["soap"].Config, "one_cpu", True)
    given, mesh = experiment(RULES["soap"].Config()), make_mesh(data=2, fsdp=2, tensor=2)
    message = r"^optimizer.rule=soap waits .* on 8 CPU devices with this version of jaxlib\. Use"
    with pytest.raises(ValueError, match=message):
        trainer_on(mesh, given)


@pytest.mark.parametrize("name", SPLIT)
def test_state_lies_where_its_weights_do(name):
    """Of what a rule keeps of a map of the stream, no device holds all."""
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    abstract = trainer_on(mesh, experiment(RULES[name].Config())).abstract
    weight = abstract.params["stacks"][0]["parts"][0]["mixer"]["kv"]
    seen = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract.optimizer):
        keys = [part.key for part in path if isinstance(part, jax.tree_util.DictKey)]
        if keys[-6:] == ["stacks", 0, "parts", 0, "mixer", "kv"]:
            seen += 1
            assert not leaf.sharding.is_fully_replicated, path
            if leaf.shape == weight.shape:
                assert leaf.sharding == weight.sharding
    assert seen


def test_axes_are_named_once():
    assert tuple(field.name for field in dataclasses.fields(schema.Mesh)) == AXES
    used = [*sharding.WEIGHTS.values(), *sharding.ACTIVATIONS["batch"]]
    assert {axis for axis in used if axis} <= set(AXES)
    with pytest.raises(ValueError, match="unknown mesh axis 'tenser'; name one of data, fsdp"):
        make_mesh(tenser=2)


def test_the_example_of_the_docs(tmp_path):
    text = (Path(schema.__file__).parents[1] / "docs" / "extend.md").read_text("utf-8")
    file = tmp_path / "signum.py"
    file.write_text(re.search(r'```python\n("""Signum.*?)```', text, re.S)[1])
    found = importlib.util.spec_from_file_location("signum", file)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    m, moves = np.zeros(SHAPES["map"]), []
    for grads in GRADS:
        m = 0.9 * m + 0.1 * grads["map"]
        moves.append(np.sign(m))
    equal(ours(module.Config()), "map", walk("map", moves, DECAY))
