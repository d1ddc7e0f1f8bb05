"""Generation: the prompt is read at once, then tokens are written one by one.

`prefill` and `decode` are the loop, for programs to be built from; `generate` is both in one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from inference import sampling
from models import lm, mixer, stacks


def generate(
    model: lm.LM,
    prompt: Int[Array, "B T"],
    tokens: int,
    *,
    key: jax.Array,
    temperature: float = 1.0,
    vocabulary: int = 0,
) -> Int[Array, "B N"]:
    """`tokens` tokens after `prompt`, by the rule of `sampling.rule`.

    Every row has its own randomness; ids from `vocabulary` on are never written (0: all may be).
    Raises ValueError for an encoder, an empty prompt, ids that the model does not have, fewer than
    one token, and a negative temperature.
    """
    _check(model, prompt, tokens, vocabulary)
    sampling.rule(temperature, vocabulary)  # refuses what is out of range
    flat = stacks.unrolled(model)
    graph, weights = nnx.split(flat)
    weights = nnx.to_pure_dict(weights)
    return _generate(graph, weights, prompt, key, tokens, temperature, vocabulary)


@functools.partial(jax.jit, static_argnames=("graph", "tokens", "temperature", "vocabulary"))
def _generate(graph, weights, prompt, key, tokens, temperature, vocabulary):
    model, draw = nnx.merge(graph, weights), sampling.rule(temperature, vocabulary)
    keys = jax.random.split(key, tokens)
    first, state = prefill(model, prompt, prompt.shape[1] + tokens, draw, keys[0])
    rest, _ = decode(model, first, state, draw, keys[1:])
    return jnp.concatenate([first[:, None], rest], axis=1).astype(prompt.dtype)


def prefill(
    model: lm.LM, prompt: Int[Array, "B T"], capacity: int, draw: sampling.Rule, key: jax.Array
) -> tuple[Int[Array, " B"], mixer.State]:
    """The first token after `prompt`, and the state for rows of `capacity` tokens in all."""
    state = model.init_state(prompt.shape[0], capacity)
    hidden, state = model(prompt, state=state)
    return draw(model.logits(hidden[:, -1]), key), state


def decode(
    model: lm.LM, token: Int[Array, " B"], state: mixer.State, draw: sampling.Rule, keys: jax.Array
) -> tuple[Int[Array, "B N"], mixer.State]:
    """A token for each of `keys` after `token`; the state is the one before the last of them."""

    def write(carry, key):
        token, state = carry
        hidden, state = model(token[:, None], state=state)
        token = draw(model.logits(hidden[:, -1]), key)
        return (token, state), token

    (_, state), written = jax.lax.scan(write, (token, state), keys)
    return written.T, state


def _check(model, prompt, tokens, vocabulary) -> None:
    if model.objective != "next":
        raise ValueError(
            "the model is an encoder (model.objective='masked'), which fills in and does not "
            "write. Use one of objective 'next'."
        )
    if prompt.shape[1] < 1:
        raise ValueError("the prompt is empty; give at least one token.")
    if tokens < 1:
        raise ValueError(f"tokens={tokens} must be at least 1.")
    if vocabulary > model.vocabulary:
        raise ValueError(
            f"vocabulary={vocabulary} is more than the model's {model.vocabulary}. Use "
            f"{model.vocabulary} or less."
        )
    ids = np.asarray(prompt)
    wrong = ids[(ids < 0) | (ids >= model.vocabulary)]
    if wrong.size:
        raise ValueError(f"token {wrong[0]} of the prompt is outside of 0..{model.vocabulary - 1}.")
