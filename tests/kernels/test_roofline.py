"""Bytes of compiled programs, on texts whose traffic is counted by hand."""

import pytest

from kernels import roofline

LOOP = """HloModule jit_f

%body (arg: (s32[], f32[8,128], f32[64,128])) -> (s32[], f32[8,128], f32[64,128]) {
  %arg = (s32[], f32[8,128]{1,0}, f32[64,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %zero = s32[] constant(0)
  %carry = f32[8,128]{1,0:T(8,128)S(1)} get-tuple-element(%arg), index=1
  %whole = f32[64,128]{1,0} get-tuple-element(%arg), index=2
  %fused = f32[8,128]{1,0:T(8,128)S(1)} fusion(%whole, %i, %carry), kind=kLoop, calls=%slicing
  ROOT %out = (s32[], f32[8,128]{1,0}, f32[64,128]{1,0}) tuple(%next, %fused, %whole)
}

%slicing (p0: f32[64,128], p1: s32[], p2: f32[8,128]) -> f32[8,128] {
  %p0 = f32[64,128]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[8,128]{1,0} parameter(2)
  %zero.1 = s32[] constant(0)
  %piece = f32[8,128]{1,0} dynamic-slice(%p0, %p1, %zero.1), dynamic_slice_sizes={8,128}
  ROOT %sum = f32[8,128]{1,0} add(%piece, %p2)
}

%condition (arg.1: (s32[], f32[8,128], f32[64,128])) -> pred[] {
  %arg.1 = (s32[], f32[8,128]{1,0}, f32[64,128]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  %limit = s32[] constant(8)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (x: f32[8,128], y: f32[64,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0} parameter(0)
  %y = f32[64,128]{1,0} parameter(1)
  %start = s32[] constant(0)
  %tuple = (s32[], f32[8,128]{1,0}, f32[64,128]{1,0}) tuple(%start, %x, %y)
  %loop = (s32[], f32[8,128]{1,0}, f32[64,128]{1,0}) while(%tuple), condition=%condition, body=%body
  %found = f32[8,128]{1,0} get-tuple-element(%loop), index=1
  ROOT %twice = f32[8,128]{1,0} add(%found, %found)
}
"""
SCALARS = (
    3 * 4 + 2 * 4 + 1
)  # the counter's sum (two reads, a write), the test's reads and its write


def test_a_loop_counts_by_its_trips_and_a_slice_by_its_size():
    rows = 8 * 128 * 4
    trip = rows + 4 + SCALARS  # the slice, the index of the fusion, the counter
    assert roofline.hbm_bytes(LOOP) == 8 * trip + 3 * rows


def test_what_lies_on_the_chip_moves_nothing():
    elsewhere = LOOP.replace("%whole = f32[64,128]{1,0}", "%whole = f32[64,128]{1,0:T(8,128)S(1)}")
    assert roofline.hbm_bytes(LOOP) - roofline.hbm_bytes(elsewhere) == 8 * 8 * 128 * 4


@pytest.mark.parametrize(("step", "runs"), [(1, 8), (2, 4), (3, 3)])
def test_trips_follow_the_counters_step(step, runs):
    text = LOOP.replace("%one = s32[] constant(1)", f"%one = s32[] constant({step})")
    computations, _ = roofline.parse(text)
    assert roofline.trips(computations, "condition", "body") == runs


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
    assert roofline.hbm_bytes(text) == 2 * 8 * 128 * 4 + 4


def test_a_kernel_counts_as_its_estimate_says():
    estimate = '{"cost_estimate":{"flops":"7","bytes_accessed":"1234"}}'
    text = f"""HloModule jit_h

ENTRY %main (a: f32[64,128]) -> f32[64,128] {{
  %a = f32[64,128]{{1,0}} parameter(0)
  ROOT %k = f32[64,128]{{1,0}} custom-call(%a), backend_config={estimate}
}}
"""
    assert roofline.hbm_bytes(text) == 1234


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
    assert roofline.hbm_bytes(text) == size


def test_a_kernels_estimate_grows_with_the_padding_of_its_arrays():
    estimate = '{"cost_estimate":{"bytes_accessed":"1000"}}'
    text = f"""HloModule jit_h

ENTRY %main (a: f32[64,128]) -> f32[64,64] {{
  %a = f32[64,128]{{1,0:T(8,128)}} parameter(0)
  ROOT %k = f32[64,64]{{1,0:T(8,128)}} custom-call(%a), backend_config={estimate}
}}
"""
    assert roofline.hbm_bytes(text) == round(1000 * (128 + 128) / (128 + 64))


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
    assert roofline.hbm_bytes(text) == 3 * 4 * 128 * 4 + 4 * 4
