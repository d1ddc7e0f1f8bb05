"""What kernels are traced for: a device, its interpreter, mesh axes that split rows and heads."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

GENERATIONS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "tpu7x",
}
# Part of JAX's trace caches: a function jitted under one value is traced anew under another.
_interpreter = jax.make_user_context(None)
_layout = jax.make_user_context(None)


@contextlib.contextmanager
def interpreting(mode: Any = True) -> Iterator[None]:
    """Within the block TPU kernels run in Pallas' interpreter, on any platform.

    True is the fast form, for numbers; a `pltpu.InterpretParams` also simulates memories and
    copies, and can look for races.
    """
    with _interpreter(mode):
        yield


def interpreter() -> Any:
    """The mode of the interpreter that kernels traced now are for; None for the real device."""
    return _interpreter.value


@contextlib.contextmanager
def layout(*, batch: tuple[str, ...] = (), heads: tuple[str, ...] = ()) -> Iterator[None]:
    """Within the block TPU kernels split rows over the mesh axes `batch`, heads over `heads`."""
    with _layout((batch, heads)):
        yield


def current_layout() -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """(batch, heads) of the `layout` around the call; None outside of one."""
    return _layout.value


def target() -> str:
    """What is traced for: a TPU generation (v4, v5e, v5p, v6e, tpu7x) or a platform.

    A mesh in context decides, which may be of a machine that is not there; else the default device.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = jax.devices()[0].device_kind if device is None else device.device_kind
    platform = jax.default_backend() if device is None else device.platform
    return GENERATIONS.get(kind, platform)
