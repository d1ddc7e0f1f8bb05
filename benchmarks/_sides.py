"""The two sides of a pair as plain functions: a training step, a generation, logits.

Each factory returns a function that does its work completely before it returns (JAX is waited for).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _figures import LENGTH, VOCABULARY
from _peers import Pair, Shape, Weights, to_theirs
from _transformers import torch
from flax import nnx

from configs import schema
from inference.generate import generate
from models import lm, weights
from parallel import sharding
from parallel.mesh import make_mesh
from training.optimizers import adamw
from training.step import make_trainer, put_batch

RATE, DECAY, BETAS, EPS = 1e-3, 0.1, (0.9, 0.95), 1e-8

Step = Callable[[np.ndarray], float]  # tokens (B, LENGTH + 1) -> mean loss in nats


def our_config(pair: Pair, shape: Shape, layers: str) -> lm.Config:
    """Our model's config at that size, in float32."""
    config = pair.ours(shape)
    config.vocabulary, config.width, config.depth = VOCABULARY, shape.width, shape.depth
    config.layers, config.dtype = layers, "float32"
    return config


def our_weights(config: lm.Config, seed: int = 0) -> dict:
    """Initial weights, with noise on all vectors: equal gains and biases would hide a wrong map."""
    rng = np.random.default_rng(seed)
    params = nnx.to_pure_dict(nnx.split(config.build(nnx.Rngs(seed)))[1])
    names = weights.dims(nnx.eval_shape(lambda: config.build(nnx.Rngs(0))))

    def noisy(weight, dims):
        if "embed" in dims and len([name for name in dims if name != "layers"]) > 1:
            return weight
        return weight + 0.1 * rng.standard_normal(weight.shape, np.float32)

    def is_names(node):
        return isinstance(node, tuple)

    return jax.tree.map(lambda dims, w: noisy(w, dims), names, params, is_leaf=is_names)


def count(params: dict) -> int:
    """Number of weights."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def our_logits(config: lm.Config, params: dict, tokens: np.ndarray) -> np.ndarray:
    """Logits of all positions."""
    graph = nnx.split(nnx.eval_shape(lambda: config.build(nnx.Rngs(0))))[0]

    @jax.jit
    def run(params, tokens):
        model = nnx.merge(graph, params)
        return model.logits(model(tokens)[0])

    return np.asarray(run(params, jnp.asarray(tokens)))


def their_logits(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """Logits of all positions."""
    model.eval()
    with torch.inference_mode():
        return model(input_ids=torch.from_numpy(tokens), use_cache=False).logits.numpy()


def our_step(config: lm.Config, params: dict, batch: int) -> tuple[Step, Callable[[], dict]]:
    """The project's training step, and a function that gives the gradient of the first step.

    After one AdamW update from zero moments, the first moment is (1 - b1) times the gradient.
    """
    experiment = schema.Experiment(
        model=config,
        data=schema.Data(batch=batch, length=LENGTH),
        optimizer=schema.Optimizer(
            rule=adamw.Config(b1=BETAS[0], b2=BETAS[1], eps=EPS),
            learning_rate=RATE,
            schedule="constant",
            warmup_steps=0,
            weight_decay=DECAY,
            clip_norm=0.0,
        ),
    )
    mesh = make_mesh()
    trainer = make_trainer(experiment, mesh, np.ones(VOCABULARY, np.float32))
    state = trainer.init()
    places = jax.tree.map(lambda leaf: leaf.sharding, trainer.abstract.params)
    # A copy of the weights: the step donates its state.
    state = state._replace(params=jax.device_put(jax.tree.map(jnp.copy, params), places))
    ones = np.ones((batch, LENGTH), np.int32)

    def step(tokens: np.ndarray) -> float:
        nonlocal state
        rows = dict(inputs=tokens[:, :-1], targets=tokens[:, 1:], segments=ones)
        rows["weights"] = ones.astype(np.float32)
        rows = {name: np.asarray(rows[name], trainer.batch[name].dtype) for name in rows}
        with sharding.on(mesh):
            state, metrics = trainer.step(state, put_batch(trainer.batch, rows))
        jax.block_until_ready(state)
        return float(metrics["loss"])

    def first_gradient() -> dict:
        moment = optax.tree_utils.tree_get(state.optimizer, "mu")
        return jax.tree.map(lambda m: np.asarray(m) / (1 - BETAS[0]), moment)

    return step, first_gradient


def their_step(
    model: torch.nn.Module, *, fused: bool | None = None
) -> tuple[Step, Callable[[], Weights]]:
    """Forward, cross-entropy, backward and AdamW in torch; weight decay on matrices, as ours."""
    matrices = {
        part.weight
        for part in model.modules()
        if isinstance(part, (torch.nn.Linear, torch.nn.Embedding))
    }
    rest = [p for p in model.parameters() if p not in matrices]
    groups = [
        dict(params=[p for p in model.parameters() if p in matrices], weight_decay=DECAY),
        dict(params=rest, weight_decay=0.0),
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, eps=EPS, fused=fused)

    def step(tokens: np.ndarray) -> float:
        model.train()
        rows = torch.from_numpy(tokens)
        optimizer.zero_grad()
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        targets = rows[:, 1:].reshape(-1)
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), targets)
        loss.backward()
        optimizer.step()
        return loss.item()

    def gradient() -> Weights:
        return {name: p.grad.numpy().copy() for name, p in model.named_parameters()}

    return step, gradient


def our_decode(config: lm.Config, params: dict, prompt: np.ndarray, tokens: int):
    """Greedy generation of `tokens` tokens after `prompt`, batch 1: () -> their ids."""
    model = config.build(nnx.Rngs(0))
    nnx.update(model, params)
    prompt, key = jnp.asarray(prompt, jnp.int32), jax.random.key(0)
    return lambda: np.asarray(generate(model, prompt, tokens, key=key, temperature=0.0))


def their_decode(pair: Pair, model: torch.nn.Module, prompt: np.ndarray, tokens: int):
    """As `our_decode`, through `model.generate` with its cache."""
    model.eval()
    rows = torch.from_numpy(prompt)
    options = dict(max_new_tokens=tokens, do_sample=False, use_cache=True, pad_token_id=0)

    def run() -> np.ndarray:
        cache = pair.cache(model.config)
        extra = {} if cache is None else dict(past_key_values=cache)
        with torch.inference_mode():
            out = model.generate(rows, attention_mask=torch.ones_like(rows), **options, **extra)
        return out[:, prompt.shape[1] :].numpy()

    return run


def gradient_error(pair: Pair, ours: dict, theirs: Weights) -> tuple[float, str]:
    """The largest relative RMS error of a weight's gradient, and the weight's name."""
    mine = to_theirs(pair, ours, gradient=True)
    if mine.keys() != theirs.keys():
        raise ValueError(f"gradients of different weights: {mine.keys() ^ theirs.keys()}.")
    errors = {name: rms_error(mine[name], theirs[name]) for name in mine}
    worst = max(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))
    return errors[worst], worst


def rms_error(got: np.ndarray, want: np.ndarray) -> float:
    """RMS of the difference over the RMS of `want`."""
    difference = np.asarray(got, np.float64) - want
    return float(np.sqrt(np.mean(difference**2) / np.mean(np.asarray(want, np.float64) ** 2)))
