"""The whole-model contract: any two options, settings and architectures build, train and resume.

An experiment is small, with one or two things changed. `run` builds it, takes two steps, saves
after the first, resumes bit for bit, and decodes; or it is refused in one line before compiling,
for one of the reasons in REFUSALS.
"""

import dataclasses
import functools
import importlib
import pkgutil
import random
import re
import typing
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from configs import checks, overrides
from configs.schema import Data, Experiment, Optimizer
from data import tokenizers
from inference.generate import generate
from models import catalogue, facts, lm
from models.attention import softmax
from parallel import sharding
from parallel.mesh import AXES, make_mesh
from training import loop, optimizers
from training.checkpoint import Checkpoints
from training.step import fitted, put_batch

WIDTH, LENGTH, BATCH = 64, 16, 4  # the contract's width, at which every variant builds
VALUES = {  # of fields that are no Literals: what they are besides their defaults
    "model.vocabulary": (0, 300),
    "model.width": (32, 128),
    "model.depth": (1, 3),
    "model.embed_scale": (8.0,),
    "model.softcap": (5.0,),
    "model.predict": (2, 3),
    "model.predict_weight": (1.0,),
    "model.norm_eps": (1e-3,),
    "seed": (7,),
    "data.length": (9, 33),
    "data.batch": (1, 6),
    "data.seed": (3,),
    "optimizer.learning_rate": (1e-2,),
    "optimizer.warmup_steps": (0,),
    "optimizer.decay_fraction": (0.0, 0.5),
    "optimizer.final_fraction": (1.0,),
    "optimizer.rule.b1": (0.0,),
    "optimizer.rule.b2": (0.999,),
    "optimizer.rule.eps": (1e-6,),
    "optimizer.ema": (0.9,),
    "optimizer.weight_decay": (0.0,),
    "optimizer.clip_norm": (0.0, 1e-3),
    "optimizer.accumulation": (2, 4),
    "mesh.data": (2,),
    "mesh.fsdp": (2,),
    "mesh.tensor": (2,),
}
TOGETHER = {  # fields that mean something only beside another
    "carry_state": ({"carry_state": True, "data.layout": "stream"},),
    "data.tokenizer": ({"data.tokenizer": "bpe", "model.vocabulary": 0},),
}
NUMBERS = {  # changes of these leave the program as it is, but for a constant
    "model.embed_scale",
    "model.predict_weight",
    "model.norm_eps",
    "seed",
    "data.seed",
    "optimizer.learning_rate",
    "optimizer.warmup_steps",
    "optimizer.decay_fraction",
    "optimizer.final_fraction",
    "optimizer.rule.b1",
    "optimizer.rule.b2",
    "optimizer.rule.eps",
    "optimizer.weight_decay",
}
OF_ARCHITECTURES = ("model.pattern", "model.channel")
OUTSIDE = {  # what the step's program does not depend on
    "steps": "the number of calls",
    "log_every": "what is printed",
    "data.source": "where the text lies",
    "data.folder": "where the text lies",
    "checkpoint": "when it is saved",
    "evaluation": "when it is judged",
    "guards": "when it is stopped",
}
REFUSALS = (  # reasons that a pair may be refused for
    r"data\.batch=1 does not split over 2 devices\. Use 2\.",
    r"optimizer\.accumulation=\d does not divide data\.batch=\d\. Use \d, or data\.batch=\d\.",
    r"optimizer\.rule=soap waits for ever on \d CPU devices .*\. Use .*",
    r"optimizer\.ema=[\d.]+ averages weights that schedule_free averages by itself\. Use .*",
    r"model\.predict=\d is for objective='next'; an encoder needs predict=1\.",
    r"carry_state=True: .* holds a bidirectional mixer, .* Use carry_state=False\.",
    r"model\.pattern or .* a bidirectional mixer, .* model\.objective='masked', an encoder\.",
)

Change = dict[str, Any]  # values by key


def base() -> Experiment:
    """The experiment that is changed."""
    pattern = (softmax.Config(heads=4, window=8),)
    return Experiment(
        model=lm.Config(width=WIDTH, depth=2, pattern=pattern, dtype="float32"),
        steps=2,
        data=Data(length=LENGTH, batch=BATCH),
        optimizer=Optimizer(warmup_steps=1),
    )


def options() -> dict[str, list[Change]]:
    """Changes of one option of `lm.Config`, by its key; architectures are apart."""
    return _changes("model")


def settings() -> dict[str, list[Change]]:
    """Changes of one setting of the experiment around the model, by its key."""
    return _changes("")


def _changes(section: str) -> dict[str, list[Change]]:
    found: dict[str, list[Change]] = {} if section else {"optimizer.rule": _rules()}
    for key, kind in fields(base()):
        if key.startswith("model.") != bool(section) or key in OF_ARCHITECTURES:
            continue
        if key in TOGETHER:
            found[key] = list(TOGETHER[key])
        elif typing.get_origin(kind) is Literal:
            usual = overrides.find(base(), key)[2]
            found[key] = [{key: value} for value in typing.get_args(kind) if value != usual]
        elif key in VALUES:
            found[key] = [{key: value} for value in VALUES[key]]
    return found


def _rules() -> list[Change]:
    """Every update rule but the base's."""
    names = (info.name for info in pkgutil.iter_modules(optimizers.__path__))
    rules = (importlib.import_module(f"training.optimizers.{name}").Config() for name in names)
    return [{"optimizer.rule": rule} for rule in rules if rule != base().optimizer.rule]


def fields(tree: Any, prefix: str = ""):
    """(key, annotation) of every field of a config tree, sections opened, architectures not."""
    for name in overrides.children(tree):
        key = f"{prefix}{name}"
        value = getattr(tree, name)
        if overrides.is_section(value) and key not in OF_ARCHITECTURES:
            yield from fields(value, f"{key}.")
        else:
            yield key, overrides.annotation(tree, name)


@functools.cache
def architectures() -> dict[str, list[Change]]:
    """Changes to another architecture, by its name; encoders bring their objective along."""
    found: dict[str, list[Change]] = {"channel.none": [{"model.channel": None}]}
    for name, config in catalogue.cases().items():
        objective = {} if causal(config) else {"model.objective": "masked"}
        found[name] = [{"model.pattern": (config,)} | objective]
        if lm.is_channel(config):
            found[name].append({"model.channel": config} | objective)
    return found


def causal(config: Any) -> bool:
    """Whether an architecture may write text, as recorded or, where its code is new, as built."""
    known = facts.known(config)
    if known:
        return known.states["4k"] is not None
    return nnx.eval_shape(lambda: config.build(WIDTH, nnx.Rngs(0))).causal


@functools.cache
def pairs(count: int, seed: int = 14) -> list[tuple[Change, ...]]:
    """`count` different random pairs of changes whose keys differ, from all three kinds alike.

    Numbers that a program only multiplies by are drawn a fifth as often as the rest.
    """
    rng = random.Random(seed)
    kinds = [kind() for kind in (options, settings, architectures)]
    found: dict[str, tuple[Change, ...]] = {}

    def draw():
        kind = rng.choice(kinds)
        weights = [1 if key in NUMBERS else 5 for key in kind]
        return rng.choice(rng.choices(list(kind.values()), weights)[0])

    while len(found) < count:
        first, second = draw(), draw()
        if not overlap(first, second):
            found[name(first, second)] = (first, second)
    return list(found.values())


def combinations(pattern: tuple, most: int = 10) -> list[tuple[Change, ...]]:
    """Every value of every option and setting in one of a few legal experiments.

    Options of the model meet `pattern`, settings alone the base's.
    """
    found: list[list[Change]] = []
    subjects = [*options().values(), *settings().values()]
    for change in [change for values in subjects for change in values]:
        fits = lambda group, new=change: len(group) < most and not any(clash(a, new) for a in group)
        group = next(filter(fits, found), None)
        if group is None:
            found.append(group := [])
        group.append(change)
    model = [any("model." in key for change in group for key in change) for group in found]
    start = {"model.pattern": pattern}
    return [(start, *g) if of_model else tuple(g) for g, of_model in zip(found, model, strict=True)]


def overlap(a: Change, b: Change) -> bool:
    """Whether two changes set one key, or one sets a key inside of what the other sets."""
    return any(f"{x}.".startswith(f"{y}.") or f"{y}.".startswith(f"{x}.") for x in a for y in b)


def clash(a: Change, b: Change) -> bool:
    """Whether two changes cannot be had together."""
    return overlap(a, b) or any(
        x in one and y in other
        for x, y in (
            ("model.objective", "model.predict"),
            ("optimizer.ema", "optimizer.rule"),  # Schedule-Free averages by itself
            *(("optimizer.rule", f"mesh.{axis}") for axis in AXES),  # see soap.Config.one_cpu
            ("data.batch", "mesh.data"),
            ("data.batch", "mesh.fsdp"),
            ("data.batch", "optimizer.accumulation"),
            ("mesh.data", "mesh.fsdp"),  # four rows have no four microbatches on four devices
        )
        for one, other in ((a, b), (b, a))
    )


def name(*changes: Change) -> str:
    """What is changed, in one line."""
    return "; ".join(f"{key}={_short(v)}" for change in changes for key, v in change.items())


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_short, value))
    if not dataclasses.is_dataclass(value):
        return str(value)
    return _cases().get(repr(value)) or type(value).__module__.rpartition(".")[2]


@functools.cache
def _cases() -> dict[str, str]:
    return {repr(config): case for case, config in catalogue.cases().items()}


def changed(changes: tuple[Change, ...], corpus) -> Experiment:
    """The base with the changes, on the text of the folder `corpus`."""
    tree = base()
    tree.data.source, tree.data.folder = f"text:{corpus / 'text'}", str(corpus)
    for key, value in [item for change in changes for item in change.items()]:
        parent, part, _ = overrides.find(tree, key)
        setattr(parent, part, value)
    if tree.data.tokenizer == "bpe":
        tree.data.tokenizer = f"bpe:{corpus / 'bpe.json'}"
    return tree


def write_corpus(folder) -> None:
    """A folder with text and a tokenizer of 280 ids for it."""
    (folder / "text").mkdir()
    words = "the cat sat on a mat and then it ran to see who was at the door".split()
    rng = random.Random(0)
    for i in range(40):
        (folder / "text" / f"{i}.txt").write_text(" ".join(rng.choices(words, k=8 + i)))
    data = Data(source=f"text:{folder / 'text'}")
    tokenizers.train(data, 280, folder / "bpe.json")


def planned(experiment: Experiment) -> loop.Plan:
    """The plan on as many devices as the mesh names; ValueError where it is refused."""
    checks.check(experiment)
    mesh = experiment.mesh
    count = max(1, mesh.data) * mesh.fsdp * mesh.tensor
    real = loop.make_mesh
    loop.make_mesh = functools.partial(make_mesh, devices=jax.devices()[:count])
    try:
        return loop.make_plan(experiment)
    finally:
        loop.make_mesh = real


def run(changes: tuple[Change, ...], corpus, folder) -> str:
    """What the contract says of an experiment; the line of a refusal, or "" where all was done."""
    # Programs that draw from this generator compile in a third of the time.
    with jax.default_prng_impl("unsafe_rbg"):
        return _run(changed(changes, corpus), folder)


def _run(experiment: Experiment, folder) -> str:
    try:
        plan = planned(experiment)
        with sharding.on(plan.mesh):
            lowered = plan.trainer.step.lower(plan.trainer.abstract, plan.trainer.batch)
    except ValueError as error:
        return refusal(str(error))
    with sharding.on(plan.mesh):
        state = train_and_resume(plan, lowered.compile(), folder)
    decode(plan, state)
    return ""


def refusal(line: str) -> str:
    """`line`, which must be one line for a reason that is known."""
    assert "\n" not in line, f"a refusal of several lines: {line}"
    assert any(re.fullmatch(reason, line) for reason in REFUSALS), f"refused without need: {line}"
    return line


def train_and_resume(plan: loop.Plan, program: Any, folder) -> Any:
    """The state after two steps; the second one, from a checkpoint of the first, is the same."""
    trainer = plan.trainer
    batches = [put_batch(trainer.batch, plan.train.batch(step)) for step in range(2)]
    fresh = trainer.init()
    before = np.asarray(fresh.params["embed"])
    state, first = program(fresh, batches[0])
    saved = Checkpoints(folder)
    saved.save(1, fitted(state, trainer.stored), {})
    state, second = program(state, batches[1])
    saved.wait()
    for metrics in (first, second):
        assert bool(metrics["finite"]), {name: float(value) for name, value in metrics.items()}
    assert (np.asarray(state.params["embed"]) != before).any(), "two steps moved nothing"
    restored = fitted(saved.restore(trainer.stored).tree, trainer.abstract)
    again, third = program(restored, batches[1])
    same((state, second), (again, third))
    return state


def same(a: Any, b: Any) -> None:
    """Two pytrees are equal in every bit."""
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = map(jax.random.key_data, (x, y))
        where = jax.tree_util.keystr(path)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), f"{where} differs after resuming"


def decode(plan: loop.Plan, state: Any) -> None:
    """The trained model writes ids that the tokenizer has; an encoder says that it does not."""
    words = plan.train.tokenizer.vocabulary
    model = nnx.merge(plan.trainer.graph, plan.trainer.weights(state))
    prompt = jnp.asarray([[words - 1, 5, 9]], jnp.int32)
    write = functools.partial(generate, model, prompt, 3, key=jax.random.key(0), vocabulary=words)
    if plan.experiment.model.objective == "next":
        written = np.asarray(write())
        assert written.shape == (1, 3) and (0 <= written).all() and (written < words).all()
        return
    try:
        write()
    except ValueError as error:
        assert "encoder" in str(error) and "\n" not in str(error)
    else:
        raise AssertionError("an encoder wrote text")
