"""What is measured of a config: the programs of its training step, its loss and its generation."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from configs import schema
from inference import generate, sampling
from models import lm, stacks
from parallel import compile_cache, sharding
from parallel.mesh import make_mesh
from resources import throughput
from training import loop
from training.step import make_trainer, put_batch

DECODED = 32  # tokens that one timed call of decoding writes


@dataclasses.dataclass
class Writer:
    """Generation in two programs: `prefill` reads prompts, `decode` writes `DECODED` tokens."""

    weights: Any
    prefill: throughput.Compiled  # (weights, prompts) -> (token, state)
    decode: throughput.Compiled  # (weights, token, state) -> tokens


class Subject:
    """One config, and the programs that it compiles to, each when it is first asked for."""

    def __init__(
        self,
        name: str,
        experiment: schema.Experiment,
        index: int = 0,
        devices: Sequence[Any] | None = None,  # of JAX; None: all of them
    ):
        self.name, self.experiment, self.index, self.devices = name, experiment, index, devices
        self.tokens = experiment.data.batch * experiment.data.length

    def at(self, **sizes: int) -> "Subject":
        """The same config with another `length`, `batch` or `width`."""
        width = sizes.pop("width", self.experiment.model.width)
        model = dataclasses.replace(self.experiment.model, width=width)
        data = dataclasses.replace(self.experiment.data, **sizes)
        changed = dataclasses.replace(self.experiment, model=model, data=data)
        return Subject(self.name, changed, self.index, self.devices)

    def alone(self) -> "Subject":
        """The same config for one sequence, on the devices that hold one copy of the model."""
        mesh = dataclasses.replace(self.experiment.mesh, data=1, fsdp=1)
        data = dataclasses.replace(self.experiment.data, batch=1)
        changed = dataclasses.replace(self.experiment, mesh=mesh, data=data)
        devices = list(self.mesh.devices.flat)[: mesh.tensor]
        return Subject(self.name, changed, self.index, devices)

    @property
    def causal(self) -> bool:
        """Whether it writes text: an encoder does not."""
        return self.experiment.model.objective == "next"

    @functools.cached_property
    def abstract(self) -> lm.LM:
        """The model with shapes for weights."""
        return nnx.eval_shape(lambda: self.experiment.model.build(nnx.Rngs(0)))

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        """The devices that the config asks for."""
        return make_mesh(**dataclasses.asdict(self.experiment.mesh), devices=self.devices)

    @functools.cached_property
    def trainer(self) -> Any:
        """The functions of training; every token stands for one byte."""
        lengths = np.ones(self.experiment.model.vocabulary, np.float32)
        return make_trainer(self.experiment, self.mesh, lengths)

    @functools.cached_property
    def batch(self) -> dict[str, Any]:
        """Random tokens, one document a row."""
        shape = self.trainer.batch["inputs"].shape
        rng = np.random.default_rng(0)
        words = rng.integers(self.experiment.model.vocabulary, size=shape, dtype=np.int32)
        ones = np.ones(shape, np.int32)
        rows = dict(inputs=words, targets=words, segments=ones, weights=ones.astype(np.float32))
        rows["hidden"] = rng.random(shape) < lm.HIDDEN  # read by encoders alone
        if "answers" in self.trainer.batch:  # of a task: as many places as it asks
            count = self.trainer.batch["answers"].shape[1]
            rows["answers"] = np.tile(np.arange(count, dtype=np.int32), (shape[0], 1))
        return put_batch(self.trainer.batch, rows)

    def state(self) -> Any:
        """A training state with random weights, made on the host: compiling `init` takes long."""
        rng = np.random.default_rng(0)
        abstract = self.trainer.abstract
        state = jax.tree.map(_zeros, abstract)
        draw = lambda leaf: (0.02 * rng.standard_normal(leaf.shape)).astype(leaf.dtype)
        weights = jax.tree.map(
            lambda leaf: jax.device_put(draw(leaf), leaf.sharding), abstract.params
        )
        return state._replace(params=weights)

    @functools.cached_property
    def train(self) -> throughput.Compiled:
        """The training step, compiled."""
        return self.compile(self.trainer.step, self.trainer.abstract, self.trainer.batch)

    @functools.cached_property
    def forward(self) -> throughput.Compiled:
        """The loss without its gradient, compiled."""
        params = self.trainer.abstract.params
        return self.compile(self.trainer.evaluate, params, self.trainer.batch)

    @functools.cached_property
    def writer(self) -> Writer:
        """Greedy generation with the layers apart, as `inference.generate` runs it."""
        length = self.experiment.data.length
        model = stacks.unrolled(nnx.merge(self.trainer.graph, self.state().params))
        graph, weights = nnx.split(model)
        weights = nnx.to_pure_dict(weights)

        greedy, keys = sampling.rule(temperature=0), jax.random.split(jax.random.key(0), DECODED)

        @jax.jit
        def prefill(weights, prompts):
            model = nnx.merge(graph, weights)
            return generate.prefill(model, prompts, length + DECODED, greedy, keys[0])

        @jax.jit
        def decode(weights, token, state):
            model = nnx.merge(graph, weights)
            return generate.decode(model, token, state, greedy, keys)[0]

        compiled = self.compile(prefill, weights, self.trainer.batch["inputs"])
        token, state = compiled.program(weights, self.batch["inputs"])
        return Writer(weights, compiled, self.compile(decode, weights, token, state))

    def compile(self, jitted: Any, *args: Any) -> throughput.Compiled:
        """A function compiled on this config's mesh."""
        with sharding.on(self.mesh):
            reads = lambda: compile_cache.counts()["cached"]
            return throughput.compile_timed(jitted, *args, reads=reads)


def choose(experiments: Sequence[schema.Experiment], files: Sequence[str]) -> list[Subject]:
    """A subject for each config, named after its file or its run."""
    subjects, names = [], []
    for i, (experiment, file) in enumerate(zip(experiments, files, strict=True)):
        path, colon, word = file.partition(":")
        of_run = path.endswith(".json")  # config.json in a run's folder
        name = Path(path).resolve().parent.name if of_run else Path(path).stem
        names.append(name + colon + word)
        twins = names[:i].count(names[i])
        if experiment.model.vocabulary == 0:
            experiment = loop.settled(experiment)
        subjects.append(Subject(names[i] + f" ({twins + 1})" * bool(twins), experiment, i))
    return subjects


def _zeros(leaf: Any) -> Any:
    """An array of zeros with the shape, dtype and sharding of `leaf`; key 0 for a random key."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.device_put(jax.random.key(0), leaf.sharding)
    return jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)
