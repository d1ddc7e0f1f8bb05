"""The host: memory that the C library keeps, and what the processes of one job agree on."""

import ctypes
import os
import re
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8  # of glibc's malloc.h


def keep_memory() -> bool:
    """Let the process keep the memory it frees; whether the C library took the advice.

    A step on a CPU takes hundreds of megabytes of temporaries and gives them back. glibc returns
    blocks of that size to the system, which must fault every page in again at the next step: about
    a fifth of the processor time of small models. Call it first, before threads start; it does
    nothing outside Linux with glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    advice = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 64 << 20))
    return all([mallopt(name, value) for name, value in advice])


def from_first(text: str) -> str:
    """The `text` of process 0, in every process; the first 1,000 bytes. All must call it."""
    import jax

    if jax.process_count() == 1:
        return text
    import numpy as np
    from jax.experimental import multihost_utils

    sent = np.zeros(1000, np.uint8)
    content = np.frombuffer(text.encode()[: sent.size], np.uint8)
    sent[: content.size] = content
    seen = np.asarray(multihost_utils.broadcast_one_to_all(sent))
    return bytes(seen).rstrip(b"\0").decode("utf-8", "ignore")


def join(coordinator: str = "", processes: int = 0, process: int = -1) -> None:
    """Make this process one of a job of several; ValueError where the job is not named in full.

    `coordinator` is HOST:PORT of process 0. What is not given is read from the environment, under
    the names below, and then asked of Slurm, Open MPI, Kubernetes or Cloud TPU, which JAX knows.
    """
    import jax

    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    processes = processes or _number("JAX_NUM_PROCESSES", 0)
    process = process if process >= 0 else _number("JAX_PROCESS_ID", -1)
    if coordinator and not re.fullmatch(r"\S+:\d{1,5}", coordinator):
        raise ValueError(f"the coordinator {coordinator!r} must be HOST:PORT, as 10.0.0.1:8476.")
    if processes and not -1 <= process < processes:
        raise ValueError(f"process {process} of {processes} must be 0 to {processes - 1}.")
    given = coordinator or None, processes or None, process if process >= 0 else None
    try:
        jax.distributed.initialize(*given)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"there is no job to join ({str(error).splitlines()[0]}). Give "
            "--coordinator=HOST:PORT --processes=N --process=I, I from 0, or set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID."
        ) from error


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, "")
    if text and not text.isdecimal():
        raise ValueError(f"{variable}={text!r} is no number. Set it to 0 or more.")
    return int(text) if text else default
