"""What the public functions check alike: errors are a line with the value and what is legal."""

import jax.numpy as jnp
from jaxtyping import Array


def whole(name: str, x: Array, dims: str) -> None:
    """Raise unless x is floating, without a zero size, and of the rank of `dims`, as "(B, T)"."""
    rank(name, x, dims)
    if 0 in x.shape:
        every = "every size, time included," if "time" in dims else "every size"
        raise ValueError(f"{name} has shape {x.shape}; {every} must be at least 1.")
    floating(name, x)


def rank(name: str, x: Array, dims: str) -> None:
    """Raise unless x has as many dimensions as `dims` names."""
    wanted = dims.count(",") + 1
    if x.ndim != wanted:
        raise ValueError(
            f"{name} has shape {x.shape}, rank {x.ndim}; it must have rank {wanted}: {dims}."
        )


def floating(name: str, x: Array) -> None:
    """Raise unless x holds floating numbers, which complex ones are not."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} has dtype {x.dtype}; it must be floating, as float32.")


def integer(name: str, x: Array) -> None:
    """Raise unless x holds integers."""
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} has dtype {x.dtype}; it must be an integer, as int32.")


def shaped(name: str, x: Array | None, letters: str, legal: tuple[int, ...]) -> None:
    """Raise unless x is None or a floating array of the shape `legal`, in letters `letters`."""
    if x is None:
        return
    if x.shape != legal:
        raise ValueError(f"{name} has shape {x.shape}; it must be {letters} = {legal}.")
    floating(name, x)


def like(name: str, x: Array, of: str, other: Array) -> None:
    """Raise unless x is a floating array of `other`'s shape."""
    if x.shape != other.shape:
        raise ValueError(f"{name} has shape {x.shape}; it must be {of}'s shape, {other.shape}.")
    floating(name, x)
