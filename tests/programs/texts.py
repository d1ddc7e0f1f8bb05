"""Texts of compiled programs, written by hand."""

PROGRAM = """HloModule jit_f, is_scheduled=true

FileNames
1 "/home/someone/lab/models/head.py"

FunctionNames
1 "Head.__call__.<locals>.run"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=1 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}

%sliced (w: f32[8,16,16], i: s32[]) -> f32[16,16] {
  %w = f32[8,16,16]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %b = f32[8,16,16]{2,1,0} bitcast(%w)
  %one = f32[1,16,16]{2,1,0} dynamic-slice(%b, %i, %i, %i), dynamic_slice_sizes={1,16,16}
  ROOT %r = f32[16,16]{1,0} bitcast(%one)
}
%stored (all: f32[8,16,16], new: f32[1,16,16], i: s32[]) -> f32[8,16,16] {
  %all = f32[8,16,16]{2,1,0} parameter(0)
  %new = f32[1,16,16]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %r = f32[8,16,16]{2,1,0} dynamic-update-slice(%all, %new, %i, %i, %i)
}
ENTRY %main (w: f32[8,16,16]) -> f32[16,16] {
  %w = f32[8,16,16]{2,1,0} parameter(0)
  %i = s32[] constant(0)
  %first = f32[16,16]{1,0} fusion(%w, %i), kind=kLoop, calls=%sliced, metadata={op_name="jit(f)/jvp(head)/slice" stack_frame_id=1}
  %new = f32[1,16,16]{2,1,0} bitcast(%first)
  %put = f32[8,16,16]{2,1,0} fusion(%w, %new, %i), kind=kLoop, calls=%stored
  %square = f32[16,16]{1,0} dot(%first, %first), metadata={op_name="jit(f)/transpose(jvp(head))/dot_general" source_file="/lab/a/b.py" source_line=3}
  %loop = f32[16,16]{1,0} while(%square), condition=%c, body=%b
  %start = (f32[16,16]{1,0}, f32[4,16]{1,0}, u32[]) slice-start(%square), slice={[0:4], [0:16]}
  ROOT %sum = f32[16,16]{1,0} add(%loop, %first), metadata={op_name="jit(f)/add"}
}
"""  # noqa: E501
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
