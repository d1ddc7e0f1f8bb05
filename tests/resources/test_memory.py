"""Bytes against arrays of known size; what runs is measured in a process of its own."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from resources import memory

ROOT = Path(__file__).parents[2]
MB = 2**20


def test_tree_bytes_come_from_shapes_alone():
    def build():
        return {"a": jnp.zeros((3, 5)), "b": (jnp.zeros(7, jnp.bfloat16), jnp.int32(0))}

    assert memory.tree_bytes(build) == 3 * 5 * 4 + 7 * 2 + 4
    assert memory.tree_bytes(lambda: jnp.zeros(2**40)) == 2**42  # more than this machine has


def test_program_bytes_name_arguments_outputs_aliases_and_temporaries():
    x = jnp.ones((512, 512))
    plain = memory.program_bytes(jax.jit(lambda x: x + 1).lower(x).compile())
    assert (plain.arguments, plain.outputs, plain.aliased) == (MB, MB, 0)
    donated = jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile()
    assert memory.program_bytes(donated).aliased == MB
    assert memory.program_bytes(donated).peak == MB + memory.program_bytes(donated).temporaries

    def keeps_every_step(x):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ x), None), x, None, length=20)[0].sum()

    program = jax.jit(jax.grad(keeps_every_step)).lower(x).compile()
    found = memory.program_bytes(program)
    assert 20 * MB <= found.temporaries <= 100 * MB
    assert found.peak == found.arguments + found.outputs - found.aliased + found.temporaries


MEASURE = """
import jax, jax.numpy as jnp
from resources import memory
x = jnp.ones((1024, 1024))
program = jax.jit(lambda x: jax.lax.scan(lambda c, _: (c + 1, c), x, None, length=16)[1])
program = program.lower(x).compile()
print(memory.resident_growth(lambda: program(x)), memory.device_peak())
"""


def test_resident_growth_is_what_a_program_fills():
    run = [sys.executable, "-c", MEASURE]
    out = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    growth, counter = out.stdout.split()
    if sys.platform == "linux":
        assert 60 * MB <= int(growth) <= 90 * MB  # 16 arrays of 4 MB
    else:
        assert growth == "None"
    assert counter == "None"


def test_a_system_without_counters_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_RESET", tmp_path / "none" / "clear_refs")
    assert memory.resident_growth(lambda: jnp.zeros(3)) is None
