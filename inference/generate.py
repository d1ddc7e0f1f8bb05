"""Generation: one program that reads the prompt at once, then writes token by token."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from models import lm, stacks


def generate(
    model: lm.LM,
    prompt: Int[Array, "B T"],
    tokens: int,
    *,
    key: jax.Array,
    temperature: float = 1.0,
) -> Int[Array, "B N"]:
    """`tokens` tokens after `prompt`, from softmax(logits / temperature); 0 takes the largest.

    Every row has its own randomness. Raises ValueError for an empty prompt or temperature < 0.
    """
    if prompt.shape[1] < 1:
        raise ValueError("the prompt is empty; give at least one token.")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} is negative. Use 0 (greedy) or more.")
    flat = stacks.unrolled(model)
    graph, weights = nnx.split(flat)
    return _generate(graph, nnx.to_pure_dict(weights), prompt, key, tokens, temperature)


@functools.partial(jax.jit, static_argnames=("graph", "tokens", "temperature"))
def _generate(graph, weights, prompt, key, tokens, temperature):
    model = nnx.merge(graph, weights)
    state = model.init_state(prompt.shape[0], prompt.shape[1] + tokens)
    hidden, state = model(prompt, state=state)

    def draw(hidden, key):
        logits = model.logits(hidden[:, -1])
        if temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(prompt.dtype)
        return jax.random.categorical(key, logits / temperature).astype(prompt.dtype)

    def write(carry, key):
        token, state = carry
        hidden, state = model(token[:, None], state=state)
        token = draw(hidden, key)
        return (token, state), token

    keys = jax.random.split(key, tokens)
    first = draw(hidden, keys[0])
    _, rest = jax.lax.scan(write, (first, state), keys[1:])
    return jnp.concatenate([first[:, None], rest.T], axis=1)
