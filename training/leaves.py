"""The leaves of a tree by name, as a checkpoint lists them: shape, dtype, and keys as words."""

from typing import Any

import jax

MOST_NAMES = 10  # in a list for the user


def named(tree: Any) -> dict[str, Any]:
    """Leaves by name, the path joined with "/"; ValueError if two share a name or none is there."""
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "leaf"
        if name in leaves:
            raise ValueError(f"two leaves of the tree are both named {name}. Rename one.")
        leaves[name] = leaf
    if not leaves:
        raise ValueError("the tree has no leaves: there is nothing to save or restore.")
    return leaves


def _is_key(leaf) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def words(value: jax.Array) -> jax.Array:
    """A random key as the integers it is made of; any other array as it is."""
    return jax.random.key_data(value) if _is_key(value) else value


def describe(values: dict[str, Any]) -> dict[str, dict]:
    """Shape and dtype by name; for random keys also their words' and the name of the generator."""
    described = {}
    for name, value in values.items():
        described[name] = {"shape": list(value.shape), "dtype": str(value.dtype)}
        if _is_key(value):
            words = jax.eval_shape(jax.random.key_data, value)
            described[name]["key"] = str(jax.random.key_impl(value))
            described[name]["words"] = {"shape": list(words.shape), "dtype": str(words.dtype)}
    return described


def refuse_mismatch(step: str, stored: dict[str, dict], wanted: dict[str, Any]) -> None:
    """ValueError unless names, shapes and dtypes of stored and wanted leaves are equal."""
    shared = [name for name in wanted if name in stored]
    shapes = [(n, tuple(stored[n]["shape"]), tuple(wanted[n].shape)) for n in shared]
    dtypes = [(n, stored[n]["dtype"], str(wanted[n].dtype)) for n in shared]
    groups = {
        "missing": [name for name in wanted if name not in stored],
        "unexpected": [name for name in stored if name not in wanted],
        "of another shape": [f"{n} {old}, now {new}" for n, old, new in shapes if old != new],
        "of another dtype": [f"{n} {old}, now {new}" for n, old, new in dtypes if old != new],
    }
    parts = []
    for what, names in groups.items():
        if names:
            more = ", ..." if len(names) > MOST_NAMES else ""
            parts.append(f"{len(names)} {what}: {', '.join(names[:MOST_NAMES])}{more}")
    if parts:
        raise ValueError(
            f"checkpoint error: step {step} does not fit this model. {'; '.join(parts)}. "
            "Use the config it was saved with, or another workdir."
        )
