"""From gradients to new weights: the schedule, the rule with its decay, the average."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from configs.schema import Optimizer
from training import names

BALANCE_RATE = 1e-3  # gamma of arXiv 2408.15664, section 3: how far a router's bias moves in a step


def schedule(config: Optimizer, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warmup; then cosine, constant, or constant and a linear end."""
    peak, warmup = config.learning_rate, config.warmup_steps
    floor = peak * config.final_fraction
    rest = max(1, steps - warmup)
    rise = optax.linear_schedule(0.0, peak, max(1, warmup))
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, config.final_fraction)
    elif config.schedule == "constant":
        after = optax.constant_schedule(peak)
    else:
        decay = max(1, round(steps * config.decay_fraction))
        after = optax.linear_schedule(peak, floor, decay, transition_begin=max(0, rest - decay))
    # Step 0 already moves: the first update has the rate of step 1 of the warmup.
    return lambda step: optax.join_schedules([rise, after], [warmup])(step + 1)


def make_rule(config: Optimizer, dims: Any, rate: Any = 0.0) -> optax.GradientTransformation:
    """The rule of `config` at one learning rate; its state does not depend on the rate.

    The rate is an argument and no count of the state, so that it follows the step: a skipped update
    leaves the state as it was, and the schedule goes on. `dims` names every weight's dimensions.
    """
    decay = optax.add_decayed_weights(config.weight_decay, names.each(names.is_map, dims))
    return _balancing(config.rule.build(lambda _: rate, decay, dims), dims)


def _balancing(rule: optax.GradientTransformation, dims: Any) -> optax.GradientTransformation:
    """`rule`, but biases of routers ("router") move by a fixed step against their gradient's sign.

    Their gradient is how much an expert's load is above the mean (arXiv 2408.15664).
    """

    def update(updates, state, params=None):
        moves, state = rule.update(updates, state, params)

        def one(move, gradient, names_of):
            return -BALANCE_RATE * jnp.sign(gradient) if "router" in names_of else move

        return jax.tree.map(one, moves, updates, dims), state

    return optax.GradientTransformation(rule.init, update)


def averaged(decay: float, average: Any, params: Any, step: Any) -> Any:
    """The average after a step: d average + (1 - d) params with d = min(decay, t / (t + 9)).

    t counts steps from 1: at first the average is short, so that the start is soon forgotten.
    """
    t = step + 1.0
    return optax.incremental_update(params, average, 1 - jnp.minimum(decay, t / (t + 9)))
