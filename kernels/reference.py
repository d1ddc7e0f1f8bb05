"""A recurrence as the papers write it, one step a token, under the rules of packed rows."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kernels import segments as packed


def first_state(initial_state: Array | None, shape: tuple[int, ...], dtype) -> Array:
    """The state before a row, which is zeros where none is given."""
    return jnp.zeros(shape, dtype) if initial_state is None else initial_state.astype(dtype)


def over_time(
    step: Callable,
    initial: Array,
    inputs: tuple[Array, ...],
    segments: Int[Array, "B T"] | None,
) -> tuple[Array, Array]:
    """(outputs (B, T, ...), final state) of `step(state, inputs of a token) -> (state, output)`.

    Inputs (B, T, ...) come in the dtype of `initial`. The first token of a document that is not the
    row's first finds a state of zeros; at padding inputs and output are zeros and the state stays.
    """
    if segments is None:
        segments = jnp.ones(inputs[0].shape[:2], jnp.int32)
    real_BT, start_BT = packed.is_real(segments), packed.starts(segments)

    def masked_step(state, token):
        real_B, start_B, given = token
        after, output = step(jnp.where(_beside(start_B, state), 0, state), given)
        after = jnp.where(_beside(real_B, state), after, state)
        return after, jnp.where(_beside(real_B, output), output, 0)

    def by_time(x):
        return jnp.moveaxis(jnp.where(_beside(real_BT, x), x, 0).astype(initial.dtype), 1, 0)

    tokens = real_BT.T, start_BT.T, tuple(map(by_time, inputs))
    final, outputs = jax.lax.scan(masked_step, initial, tokens)
    return jnp.moveaxis(outputs, 0, 1), final


def _beside(mask: Array, x: Array) -> Array:
    """A mask of the first axes of x, with as many axes as x."""
    return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
