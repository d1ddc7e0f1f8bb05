"""Inputs for tests and benchmarks of the delta rule."""

import jax
import jax.numpy as jnp
import numpy as np

GROUPS, HEADS, KEY, VALUE = 2, 4, 8, 12


def draw(
    rng: np.random.Generator, *, batch: int, length: int, dtype, extreme: bool = False
) -> dict:
    """Keyword arguments; the length decides whether gates are scalars or vectors.

    `extreme` mixes gates that forget at once with gates that never do, writes up to twice the
    error, and leaves the keys' norms between 1 and 3: the state may grow until a gate closes.
    """
    shape = (batch, length, HEADS) if length // 2 % 2 else (batch, length, HEADS, KEY)
    log_decay = -np.logaddexp(0, -rng.normal(2, 2, shape))
    beta = 1 / (1 + np.exp(-rng.normal(size=(batch, length, HEADS))))
    k = rng.normal(size=(batch, length, GROUPS, KEY))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    if extreme:
        log_decay = rng.choice([-1e-4, -30.0, 0.0], size=shape)
        beta *= 2
        k *= rng.uniform(1, 3, (batch, length, GROUPS, 1))
    return {
        "q": rng.normal(size=(batch, length, GROUPS, KEY)).astype(dtype),
        "k": k.astype(dtype),
        "v": rng.normal(size=(batch, length, HEADS, VALUE)).astype(dtype),
        "beta": beta.astype(dtype),
        "log_decay": log_decay.astype(dtype),
        "initial_state": rng.normal(size=(batch, HEADS, KEY, VALUE)).astype(np.float32),
    }


def draw_dplr(
    rng: np.random.Generator, *, batch: int, length: int, dtype, extreme: bool = False
) -> dict:
    """Keyword arguments: unit vectors kappa read as -kappa and written as eta kappa, as RWKV-7 has.

    `extreme` mixes gates that forget at once with gates that never do, and erases up to twice what
    is recalled; the state stays bounded because every channel is soon forgotten.
    """
    shape = (batch, length, HEADS, KEY)
    q, k, kappa = rng.normal(size=(3, *shape))
    kappa /= np.linalg.norm(kappa, axis=-1, keepdims=True)
    log_decay = -np.exp(-0.5) / (1 + np.exp(-rng.normal(-1, 2, shape)))
    eta = 1 / (1 + np.exp(-rng.normal(size=shape)))
    if extreme:
        log_decay = rng.choice([-1e-4, -30.0, 0.0], size=shape)
        eta *= 2
    return {
        "q": q.astype(dtype),
        "k": k.astype(dtype),
        "v": rng.normal(size=(batch, length, HEADS, VALUE)).astype(dtype),
        "a": -kappa.astype(dtype),
        "b": (eta * kappa).astype(dtype),
        "log_decay": log_decay.astype(dtype),
        "initial_state": rng.normal(size=(batch, HEADS, KEY, VALUE)).astype(np.float32),
    }


def sizes() -> dict[str, dict]:
    """Model sizes: shapes by label. 32,768 tokens each, bfloat16 with float32 gates."""
    short, long = (8, 4096), (1, 32768)
    return {
        "T4096 K64 scalar gate": _size(*short, heads=16, key=64, gate="scalar"),
        "T4096 K128 scalar gate, 2 heads a key": _size(*short, 16, 128, "scalar", groups=8),
        "T4096 K256 scalar gate": _size(*short, heads=8, key=256, gate="scalar"),
        "T4096 K64 vector gate": _size(*short, heads=16, key=64, gate="vector"),
        "T4096 K128 vector gate, packed": _size(*short, 16, 128, "vector", packed=True),
        "T4096 K256 vector gate": _size(*short, heads=8, key=256, gate="vector"),
        "T4096 K128 no gate": _size(*short, heads=16, key=128, gate="none"),
        "T32768 K128 scalar gate, packed": _size(*long, 16, 128, "scalar", packed=True),
        "T32768 K128 vector gate": _size(*long, heads=16, key=128, gate="vector"),
    }


def _size(batch, length, heads, key, gate, groups=0, packed=False) -> dict:
    """Shapes of one call; values are as wide as keys, groups=0 is a key a head."""
    keys = jax.ShapeDtypeStruct((batch, length, groups or heads, key), jnp.bfloat16)
    shape = (batch, length, heads) + (key,) * (gate == "vector")
    found = {
        "q": keys,
        "k": keys,
        "v": jax.ShapeDtypeStruct((batch, length, heads, key), jnp.bfloat16),
        "beta": jax.ShapeDtypeStruct((batch, length, heads), jnp.float32),
        "initial_state": jax.ShapeDtypeStruct((batch, heads, key, key), jnp.float32),
    }
    if gate != "none":
        found["log_decay"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    if packed:
        found["segments"] = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    return found


def sizes_dplr() -> dict[str, dict]:
    """Model sizes of `dplr`, as `sizes` gives those of the delta rule."""

    def size(batch, length, heads, key, packed=False):
        found = _size(batch, length, heads, key, "vector", packed=packed)
        found.pop("beta")
        return found | {"a": found["q"], "b": found["q"]}

    return {
        "T4096 K64": size(8, 4096, 16, 64),
        "T4096 K128, packed": size(8, 4096, 16, 128, packed=True),
        "T4096 K256": size(8, 4096, 8, 256),
        "T32768 K64": size(1, 32768, 16, 64),
    }
