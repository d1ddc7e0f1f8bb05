"""A mixer behind its norm: the step that every kind of block is made of."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models import layers, mixer


@dataclasses.dataclass
class Mixers:
    """Settings of a block: Configs of mixers, token and channel mixers alike, one after another."""

    mixers: tuple[Any, ...]
    norm_eps: float = 1e-6


class Sublayer(mixer.Mixer):
    """f(x) = mixer(norm(x)); `config` is the mixer's. What it is added to is the block's matter."""

    def __init__(self, config: Any, width: int, rngs: nnx.Rngs, eps: float = 1e-6):
        self.norm = layers.RMSNorm(width, rngs, eps)
        self.mixer = config.build(width, rngs)
        self.causal = self.mixer.causal

    def __call__(self, x, *, segments=None, state=None):
        return self.mixer(self.norm(x), segments=segments, state=state)

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """The mixer's."""
        return self.mixer.init_state(batch, capacity, dtype)


def sublayers(configs: Any, width: int, rngs: nnx.Rngs, eps: float = 1e-6) -> Any:
    """A sublayer for each Config, None left out; ValueError where none is left."""
    found = [Sublayer(config, width, rngs, eps) for config in configs if config is not None]
    if not found:
        raise ValueError("a block holds no mixer; give it at least one.")
    return nnx.List(found)


class Chain(mixer.Mixer):
    """Base of blocks that run `self.parts`: causal if all of them are, with a state for each."""

    parts: Any

    @property
    def causal(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether every part is."""
        return all(part.causal for part in self.parts)

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """One state for each part."""
        return tuple(part.init_state(batch, capacity, dtype) for part in self.parts)


def before(state: mixer.State, parts: Any) -> tuple:
    """The state of each part, None for each where nothing is kept."""
    return (None,) * len(parts) if state is None else state
