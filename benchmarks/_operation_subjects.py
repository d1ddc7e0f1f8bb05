"""What operations.py times: shapes by name, random inputs for them, peers outside JAX."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.subject import Subject


def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """The shape of a float32 argument."""
    return jax.ShapeDtypeStruct(sizes, dtype)


def cpu_subjects(batch: int, length: int, heads: int, dim: int, width: int) -> dict[str, Subject]:
    """Every operation at a size that a CPU finishes in seconds."""
    row = (batch, length)
    qkv = {name: shape(*row, heads, dim) for name in "qkv"}
    gate, vector = shape(*row, heads), shape(*row, heads, dim)
    channels = {"x": shape(*row, width), "log_decay": shape(*row, width)}
    rows, experts, states = 4 * length, 16, 16
    mamba = {
        "x": shape(*row, width),
        "dt": shape(*row, width),
        "A": shape(width, states),
        "Bm": shape(*row, states),
        "Cm": shape(*row, states),
        "D": shape(width),
    }
    loss = {
        "x": shape(*row, width // 2),
        "head": shape(width // 2, 8192),
        "targets": shape(*row, dtype=jnp.int32),
        "weights": shape(*row),
    }
    groups = {
        "x": shape(rows, width // 2),
        "weights": shape(experts, width // 2, width // 2),
        "group_sizes": shape(experts, dtype=jnp.int32),
    }
    return {
        "attention": Subject("attention", "attention", qkv),
        "attention, window 512": Subject("attention", "attention", qkv | {"window": 512}),
        "gated_linear, scalar gate": Subject(
            "gated_linear", "gated_linear", qkv | {"log_decay": gate}
        ),
        "gated_linear, vector gate": Subject(
            "gated_linear", "gated_linear", qkv | {"log_decay": vector}
        ),
        "delta_rule, scalar gate": Subject(
            "delta_rule", "delta_rule", qkv | {"beta": gate, "log_decay": gate}
        ),
        "delta_rule, vector gate": Subject(
            "delta_rule", "delta_rule", qkv | {"beta": gate, "log_decay": vector}
        ),
        "dplr": Subject(
            "delta_rule", "dplr", qkv | {"a": vector, "b": vector, "log_decay": vector}
        ),
        "linear_scan": Subject("linear_scan", "linear_scan", channels),
        "selective_scan": Subject("selective_scan", "selective_scan", mamba),
        "cross_entropy": Subject("cross_entropy", "cross_entropy", loss),
        "grouped_matmul": Subject("grouped_matmul", "grouped_matmul", groups),
    }


def model_subjects() -> dict[str, Subject]:
    """The model sizes that kernels/evidence.json lists, for accelerators."""
    from kernels import survey

    return {
        f"{name}, {label}": subject
        for name, sizes in survey.subjects().items()
        for label, subject in sizes.items()
    }


def fill(subject: Subject, rng: np.random.Generator) -> Subject:
    """The subject with random arrays: normal, gates and steps as models make them."""
    found = {name: _draw(name, kind, subject.given, rng) for name, kind in subject.arrays.items()}
    if "k" in found and {"beta", "a"} & set(found):
        found["k"] = _unit(found["k"])
    if "a" in found:  # RWKV-7's: a = -key, b = rate * key
        found["a"], found["b"] = -found["k"], found["k"] * _sigmoid(found["b"])
    arrays = {name: jnp.asarray(x) for name, x in found.items()}
    return subject._replace(given=subject.given | arrays)


def _draw(name: str, kind: Any, arguments: dict, rng: np.random.Generator) -> np.ndarray:
    normal = rng.normal(size=kind.shape)
    if name == "targets":
        return rng.integers(0, arguments["head"].shape[1], kind.shape).astype(kind.dtype)
    if name == "group_sizes":
        rows = arguments["x"].shape[0]
        return rng.multinomial(rows, np.full(kind.shape[0], 1 / kind.shape[0])).astype(kind.dtype)
    if name == "indices":
        blocks = -(-arguments["k"].shape[1] // arguments["block"])
        return rng.integers(0, blocks, kind.shape).astype(kind.dtype)
    if name == "segments":
        return np.ones(kind.shape, kind.dtype)
    if name in ("log_decay", "log_forget"):
        normal = -np.logaddexp(0, -normal - 3)
    elif name in ("beta", "weights") and len(kind.shape) != 3 or name == "beta":
        normal = _sigmoid(normal)
    elif name == "dt":
        normal = np.logaddexp(0, normal - 3)
    elif name == "A":
        normal = -np.exp(normal)
    elif name in ("head", "weights"):
        normal /= kind.shape[-2] ** 0.5
    return normal.astype(kind.dtype)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return (1 / (1 + np.exp(-x.astype(np.float32)))).astype(x.dtype)


def _unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x.astype(np.float32), axis=-1, keepdims=True)).astype(x.dtype)


def associative_scan(x, log_decay):
    """`linear_scan` as XLA's tree of combinations."""

    def combine(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    _, h = jax.lax.associative_scan(combine, (jnp.exp(log_decay), x), axis=1)
    return h, h[:, -1]


# Peers in JAX, as functions of the subject's arrays; peers in torch, as module and function names.
JAX_PEERS: dict[str, dict[str, Callable]] = {"linear_scan": {"associative_scan": associative_scan}}
TORCH_PEERS = {
    "attention": {"torch": "attention"},
    "delta_rule, scalar gate": {"transformers": "delta_rule"},
}
