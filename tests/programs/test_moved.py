"""Bytes of compiled programs, on texts whose traffic is counted by hand."""

import pytest

from programs import hlo, moved
from tests.programs.texts import LOOP, PROGRAM

SCALARS = (
    3 * 4 + 2 * 4 + 1
)  # the counter's sum (two reads, a write), the test's reads and its write


def test_a_loop_counts_by_its_trips_and_a_slice_by_its_size():
    rows = 8 * 128 * 4
    trip = rows + 4 + SCALARS  # the slice, the index of the fusion, the counter
    assert moved.hbm_bytes(LOOP) == 8 * trip + 3 * rows


def test_what_lies_on_the_chip_moves_nothing():
    elsewhere = LOOP.replace("%whole = f32[64,128]{1,0}", "%whole = f32[64,128]{1,0:T(8,128)S(1)}")
    assert moved.hbm_bytes(LOOP) - moved.hbm_bytes(elsewhere) == 8 * 8 * 128 * 4


def test_an_update_in_place_moves_the_update():
    text = """HloModule jit_g

%updating (q0: f32[64,128], q1: f32[8,128], q2: s32[]) -> f32[64,128] {
  %q0 = f32[64,128]{1,0} parameter(0)
  %q1 = f32[8,128]{1,0} parameter(1)
  %q2 = s32[] parameter(2)
  ROOT %put = f32[64,128]{1,0} dynamic-update-slice(%q0, %q1, %q2, %q2)
}

ENTRY %main (a: f32[64,128], b: f32[8,128], c: s32[]) -> f32[64,128] {
  %a = f32[64,128]{1,0} parameter(0)
  %b = f32[8,128]{1,0} parameter(1)
  %c = s32[] parameter(2)
  ROOT %done = f32[64,128]{1,0} fusion(%a, %b, %c), kind=kLoop, calls=%updating
}
"""
    assert moved.hbm_bytes(text) == 2 * 8 * 128 * 4 + 4


def test_a_kernel_counts_as_its_estimate_says():
    estimate = '{"cost_estimate":{"flops":"7","bytes_accessed":"1234"}}'
    text = f"""HloModule jit_h

ENTRY %main (a: f32[64,128]) -> f32[64,128] {{
  %a = f32[64,128]{{1,0}} parameter(0)
  ROOT %k = f32[64,128]{{1,0}} custom-call(%a), backend_config={estimate}
}}
"""
    assert moved.hbm_bytes(text) == 1234


@pytest.mark.parametrize(
    ("array", "size"),
    [
        ("bf16[3,5,100,64]{3,2,1,0:T(8,128)(2,1)}", 3 * 5 * 104 * 128 * 2),
        ("bf16[3,5,100,64]{2,3,1,0:T(8,128)(2,1)}", 3 * 5 * 128 * 64 * 2),
        ("f32[7]{0:T(128)}", 128 * 4),
        ("f32[100,64]{1,0}", 100 * 64 * 4),
    ],
)
def test_arrays_count_with_the_padding_of_their_tiles(array, size):
    text = f"""HloModule jit_p

ENTRY %main (a: f32[8,128]) -> f32[8,128] {{
  ROOT %made = {array} rng-bit-generator()
}}
"""
    assert moved.hbm_bytes(text) == size


def test_a_kernels_estimate_grows_with_the_padding_of_its_arrays():
    estimate = '{"cost_estimate":{"bytes_accessed":"1000"}}'
    text = f"""HloModule jit_h

ENTRY %main (a: f32[64,128]) -> f32[64,64] {{
  %a = f32[64,128]{{1,0:T(8,128)}} parameter(0)
  ROOT %k = f32[64,64]{{1,0:T(8,128)}} custom-call(%a), backend_config={estimate}
}}
"""
    assert moved.hbm_bytes(text) == round(1000 * (128 + 128) / (128 + 64))


@pytest.mark.parametrize("fused", [True, False])
def test_a_scatter_moves_its_updates_and_what_they_replace(fused):
    scatter = "f32[64,128]{1,0} scatter(%a, %at, %new), to_apply=%add"
    inside = """
%scattering (a: f32[64,128], at: s32[4,1], new: f32[4,128]) -> f32[64,128] {
  %a = f32[64,128]{1,0} parameter(0)
  %at = s32[4,1]{1,0} parameter(1)
  %new = f32[4,128]{1,0} parameter(2)
  ROOT %put = SCATTER
}
""".replace("SCATTER", scatter)
    last = "f32[64,128]{1,0} fusion(%a, %at, %new), kind=kCustom, calls=%scattering"
    text = f"""HloModule jit_s
{inside if fused else ""}
ENTRY %main (a: f32[64,128], at: s32[4,1], new: f32[4,128]) -> f32[64,128] {{
  %a = f32[64,128]{{1,0}} parameter(0)
  %at = s32[4,1]{{1,0}} parameter(1)
  %new = f32[4,128]{{1,0}} parameter(2)
  ROOT %done = {last if fused else scatter}
}}
"""
    assert moved.hbm_bytes(text) == 3 * 4 * 128 * 4 + 4 * 4


def test_bytes_are_those_of_slices_where_slices_are_taken():
    found, _ = hlo.computations(PROGRAM)
    lines, matrix, index = found["main"], 4 * 16 * 16, 4
    sizes = {name: moved.touched(found, lines, line) for name, line in lines.items()}
    assert sizes == {
        "w": 0,
        "i": 0,
        "first": 2 * matrix + index,
        "new": 0,
        "put": 2 * matrix + index,
        "square": 2 * matrix,
        "loop": 0,
        "start": 2 * (4 * 16 * 4 + 4),
        "sum": 3 * matrix,
    }
