"""The contract that every architecture keeps.

An architecture file holds `Config` (a dataclass of settings; it is the registry) and `Mixer` or
`Block` (its module). `Config.build(width, rngs)` makes the module; calling it maps (B, T, D) to
(B, T, D) and returns the state after the last token. Training ignores the state, prefill keeps it,
decoding is T = 1.

Letters of dimensions, in shapes, einsums and the suffixes of names (`q_BTHK`):
    B batch         H heads              N chunks, modes                E experts
    T time          G groups of heads    C queries in a chunk, channels J choices of a token
    S time of keys  K numbers of a key   F hidden units                 P parts of a weight, state
    D width         V numbers of a value R rank                         M members, blocks
A file that needs another meaning says it where the letter first stands.
"""

import functools
import inspect
import typing
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

State = Any  # a pytree of arrays with the batch first, or scalars shared by all rows


@runtime_checkable
class Config(Protocol):
    """Settings of one architecture: a dataclass whose class names the architecture."""

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module for a residual stream of `width`; ValueError where the settings do not fit."""
        ...


# How the contract calls a mixer's methods: as text, and with stand-ins.
CALLS = {
    "__call__": ("(x, *, segments=None, state=None)", ("x",), {"segments": None, "state": None}),
    "init_state": ("(batch, capacity, dtype=jnp.float32)", (1, 1, jnp.float32), {}),
}


class Mixer(nnx.Module):
    """Base of all mixers, token mixers and channel mixers alike."""

    causal: bool = True  # no output depends on later tokens

    def __init_subclass__(cls, **kwargs):
        """Calls name what they compute after the architecture's file: profiles read it."""
        super().__init_subclass__(**kwargs)
        for name, call in CALLS.items():
            if method := cls.__dict__.get(name):
                _check_signature(cls, method, *call)
        if call := cls.__dict__.get("__call__"):
            cls.__call__ = _scoped(call)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segments: Int[Array, "B T"] | None = None,
        state: State | None = None,
    ) -> tuple[Float[Array, "B T D"], State]:
        """Mix `x` and return the state after its last token.

        `segments` numbers the documents of a row (0: padding; None: one document). `state` belongs
        to the document of the row's first token; documents that start later start from nothing.
        """
        raise NotImplementedError

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32) -> State:
        """The state before the first token: what decoding up to `capacity` tokens must carry.

        It is all zeros, so that a row is made fresh by zeroing it. Cached activations have `dtype`,
        the compute dtype; recurrent states have `wide(dtype)`.
        """
        raise NotImplementedError


class Block(Mixer):
    """A mixer that holds other mixers and adds to the residual stream itself.

    In a pattern it stands as it is, where a bare mixer is wrapped in a pre-norm block.
    """


def is_block(config: Config) -> bool:
    """Whether a Config builds a `Block`, which the annotation of its `build` says."""
    built = typing.get_type_hints(type(config).build).get("return")
    return isinstance(built, type) and issubclass(built, Block)


def _check_signature(cls: type, method: Any, form: str, args: tuple, kwargs: dict) -> None:
    """TypeError of one line where `method` cannot be called as the contract calls it."""
    signature = inspect.signature(method)
    try:
        signature.bind(None, *args, **kwargs)
    except TypeError as error:
        where = f"{cls.__module__}.{cls.__name__}.{method.__name__}"
        raise TypeError(
            f"{where}{signature} must take (self, {form[1:]}: {error} (models/mixer.py)."
        ) from None


def _scoped(call):
    @functools.wraps(call)
    def run(self, *args, **kwargs):
        with jax.named_scope(type(self).__module__.rpartition(".")[2]):
            return call(self, *args, **kwargs)

    return run


def wide(dtype: DTypeLike) -> jnp.dtype:
    """The dtype of recurrent states and of reductions: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def keep_rows(keep: Bool[Array, " B"], state: State, axis: int = 0) -> State:
    """Rows of `state` where `keep`, zeros (a fresh state) elsewhere; what has no rows stays.

    Rows lie along `axis`: 0, or 1 where stacked layers lead.
    """

    def one(leaf):
        if leaf.ndim <= axis:
            return leaf
        fits = keep.reshape(-1, *(1,) * (leaf.ndim - 1 - axis))
        return jnp.where(fits, leaf, jnp.zeros_like(leaf))

    return jax.tree.map(one, state)


def first_and_last(segments: Int[Array, "B T"]) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """Numbers of the first and the last document of each row; 0 for a row of padding alone."""
    real = segments != 0
    first = jnp.take_along_axis(segments, real.argmax(1)[:, None], 1)[:, 0]
    last = jnp.take_along_axis(segments[:, ::-1], real[:, ::-1].argmax(1)[:, None], 1)[:, 0]
    return first, last


def state_bytes(config: Config, width: int, capacity: int, dtype: DTypeLike = jnp.bfloat16) -> int:
    """Bytes of one sequence's state after `capacity` tokens, from shapes alone."""

    def build():
        return config.build(width, nnx.Rngs(0)).init_state(1, capacity, dtype)

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(build)))
