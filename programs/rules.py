"""FLOPs of one equation of a jaxpr, by its primitive.

A contraction counts 2 per multiply-add: 2 B M N K for `dot_general` (B M N when nothing is summed).
Floating-point arithmetic counts 1 per output element, a reduction 1 per element that it folds in,
an FFT 5 N log2 N; exp, log, sqrt and their like are transcendentals, one an element, counted apart.
Moving, comparing, selecting, converting and integers count nothing. Complex arithmetic counts as
its real parts do.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

ARITHMETIC = frozenset(
    "add sub mul div rem max min neg abs sign floor ceil round square add_any integer_pow clamp"
    " one_minus_square conj".split()
)
TRANSCENDENTAL = frozenset(
    "exp exp2 log log2 log1p expm1 sin cos tan tanh sinh cosh asin acos atan atan2 asinh acosh"
    " atanh logistic erf erfc erf_inv pow sqrt rsqrt cbrt lgamma digamma".split()
)
REDUCTIONS = frozenset("reduce_sum reduce_prod reduce_max reduce_min".split())
CUMULATIVE = frozenset("cumsum cumprod cummax cummin".split())
FREE = frozenset(
    "broadcast_in_dim reshape transpose convert_element_type bitcast_convert_type real imag complex"
    " slice dynamic_slice dynamic_update_slice concatenate split stack unstack tile pad gather"
    " scatter select_n iota squeeze expand_dims rev copy copy_p stop_gradient name sort top_k"
    " sharding_constraint device_put optimization_barrier reduce_precision pvary psum"
    " psum_invariant pmax pmin all_gather all_to_all reduce_scatter ppermute"
    " get swap addupdate program_id num_programs multiple_of roll".split()
)
PASSES = {jax.lax.Precision.HIGH: 3, jax.lax.Precision.HIGHEST: 6}


def size(v: Any) -> int:
    """Elements of a variable of a jaxpr."""
    return math.prod(v.aval.shape)


def is_complex(v: Any) -> bool:
    """Whether a variable of a jaxpr holds complex numbers."""
    return jnp.issubdtype(v.aval.dtype, jnp.complexfloating)


def contraction(eqn: Any) -> int | float | None:
    """FLOPs of a product, a convolution, a transform or a solve; None for other primitives."""
    rule = _CONTRACTIONS.get(eqn.primitive.name)
    return None if rule is None else rule(eqn)


def passes(eqn: Any) -> int:
    """Products of bfloat16 parts that stand for one product at the precision asked for."""
    narrow = any(v.aval.dtype.itemsize < 4 for v in eqn.invars)
    asked = eqn.params.get("precision")
    asked = asked if isinstance(asked, tuple) else (asked,)
    most = max((PASSES.get(p, 1) for p in asked), default=1)
    return 1 if narrow else most


def arithmetic(eqn: Any) -> int | float | None:
    """FLOPs of a primitive that is neither contraction nor transcendental; None without a rule."""
    name = eqn.primitive.name
    if name in FREE or not any(jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in eqn.outvars):
        return 0.0
    out = eqn.outvars[0]
    if name in REDUCTIONS:
        count = size(eqn.invars[0]) - size(out)
    elif name in ("scatter-add", "scatter_add"):
        count = size(eqn.invars[2])
    elif name in CUMULATIVE:
        count = size(out)
    elif name == "integer_pow":
        power = abs(eqn.params["y"])
        count = size(out) * max(1, power.bit_length() + power.bit_count() - 2)  # by squaring
    elif name in ARITHMETIC:
        count = size(out) * (2 if name == "one_minus_square" else 1)
    else:
        return None
    return count * _real_operations(name, out)


def _real_operations(name: str, out: Any) -> int:
    """What one operation takes in real arithmetic."""
    if not is_complex(out):
        return 1
    return 6 if name in ("mul", "div", "integer_pow", "square") else 2


def _dot(eqn: Any) -> int | float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left, out = eqn.invars[0], eqn.outvars[0]
    summed = math.prod(left.aval.shape[axis] for axis in contracted)
    per_output = 2 * summed if contracted else 1
    return per_output * size(out) * (4 if is_complex(out) else 1)


def _convolution(eqn: Any) -> int | float:
    """Each output element meets every tap and every input channel of its group."""
    kernel, out = eqn.invars[1], eqn.outvars[0]
    outputs = kernel.aval.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2 * size(out) * size(kernel) / outputs


def _fft(eqn: Any) -> int | float:
    """5 N log2 N per transform, half of it between real and complex."""
    lengths = eqn.params["fft_lengths"]
    points, rows = math.prod(lengths), math.prod(eqn.invars[0].aval.shape[: -len(lengths)])
    real = not (is_complex(eqn.invars[0]) and is_complex(eqn.outvars[0]))
    return rows * 5 * points * math.log2(max(points, 2)) * (0.5 if real else 1)


def _triangular_solve(eqn: Any) -> int | float:
    """N^2 per right-hand side: N (N - 1) / 2 multiply-adds and N divisions."""
    matrix, right = (v.aval.shape for v in eqn.invars)
    return matrix[-1] * math.prod(right)


_CONTRACTIONS = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "fft": _fft,
    "triangular_solve": _triangular_solve,
}
