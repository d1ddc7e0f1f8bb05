"""What a chunk is inside a TPU kernel: matrices with time in rows and heads side by side in lanes.

Names end in the letters of the two dimensions: C and S are positions, K and V one head's key and
value, H heads, X the lanes of several heads (each K or V wide), R kinds of marks, 1 one of them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.products import exact_product


class Form(NamedTuple):
    """What a program works on, and how it reads; static."""

    groups: int  # of q and k
    heads: int  # of v, a multiple of groups
    key: int
    value: int
    scale: float
    lag: int  # token t reads S_{t - lag}; 1 with a bonus, through which it reads its own write

    def members(self, group: int) -> range:
        """The heads of a group."""
        each = self.heads // self.groups
        return range(group * each, (group + 1) * each)


class Mask(NamedTuple):
    """Who sees whom; all but `pair` are 0 or 1 in the accumulator's type."""

    pair_CS: jax.Array  # bool: what position S <= C - lag writes, position C reads
    real_1C: jax.Array
    real_C1: jax.Array
    read_C1: jax.Array  # the position reads the entering state
    write_C1: jax.Array  # the position writes the leaving state
    keep_11: jax.Array  # the entering state survives the chunk


def mask(marks_RC: jax.Array, lag: int, dtype) -> Mask:
    """From rows (document of the token or -1 at padding, entering document, leaving document)."""
    document_1C, entering_1C, leaving_1C = (marks_RC[n : n + 1] for n in range(3))
    marks_CR = marks_RC.T
    document_C1, entering_C1, leaving_C1 = (marks_CR[:, n : n + 1] for n in range(3))
    pair_CS = (document_C1 == document_1C) & (document_C1 >= 0)
    return Mask(
        pair_CS=pair_CS & (down(*pair_CS.shape) >= across(*pair_CS.shape) + lag),
        real_1C=(document_1C >= 0).astype(dtype),
        real_C1=(document_C1 >= 0).astype(dtype),
        read_C1=(document_C1 == entering_C1).astype(dtype),
        write_C1=(document_C1 == leaving_C1).astype(dtype),
        keep_11=(entering_1C[:, :1] == leaving_1C[:, :1]).astype(dtype),
    )


def own_write(form: Form, mask: Mask, q_CX, k_CX, v_CX, u_1X):
    """What tokens read of their own writes through the bonus: scale q^T diag(u) k v^T."""
    q_CX, k_CX = (by_head(form, x, u_1X.dtype) for x in (q_CX, k_CX))
    weight_CH = form.scale * mask.real_C1 * gather(q_CX * k_CX * u_1X, form.heads)
    return spread(weight_CH, form.value) * v_CX


def own_write_backward(form: Form, mask: Mask, q_CX, k_CX, v_CX, u_1X, do_CX):
    """(dq, dk, dv, du) of `own_write`; dv is linear in do as o is in v."""
    dv_CX = own_write(form, mask, q_CX, k_CX, do_CX, u_1X)
    q_CX, k_CX = (by_head(form, x, u_1X.dtype) for x in (q_CX, k_CX))
    pulled_CH = gather(do_CX.astype(u_1X.dtype) * v_CX, form.heads)
    pull_CX = spread(form.scale * mask.real_C1 * pulled_CH, form.key)
    du_1X = (pull_CX * q_CX * k_CX).sum(axis=0, keepdims=True)
    dq_CX, dk_CX = (sum_heads(form, pull_CX * u_1X * x) for x in (k_CX, q_CX))
    return dq_CX, dk_CX, dv_CX, du_1X


def rounded_as(*arrays: jax.Array):
    """`exact_product` in the common dtype of what the caller gave."""
    return functools.partial(exact_product, dtype=jnp.result_type(*arrays))


def down(height: int, width: int) -> jax.Array:
    """Each entry's row number."""
    return jax.lax.broadcasted_iota(jnp.int32, (height, width), 0)


def across(height: int, width: int) -> jax.Array:
    """Each entry's lane number."""
    return jax.lax.broadcasted_iota(jnp.int32, (height, width), 1)


def part(x_CX: jax.Array, width: int, first: int, count: int = 1) -> jax.Array:
    """The lanes of `count` heads from head `first` on, each `width` wide."""
    return x_CX[:, first * width : (first + count) * width]


def beside(parts: list[jax.Array]) -> jax.Array:
    """One matrix of all heads' lanes."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def spread(x_CH: jax.Array, width: int) -> jax.Array:
    """One lane a head to `width` equal lanes a head."""
    each = (x_CH[:, h : h + 1] for h in range(x_CH.shape[1]))
    return beside([jnp.broadcast_to(x_C1, (x_CH.shape[0], width)) for x_C1 in each])


def gather(x_CX: jax.Array, heads: int) -> jax.Array:
    """Sum each head's lanes to one lane a head."""
    width = x_CX.shape[1] // heads
    return beside([part(x_CX, width, h).sum(axis=1, keepdims=True) for h in range(heads)])


def by_head(form: Form, x_CX: jax.Array, dtype) -> jax.Array:
    """The lanes of a group's key once for each of its heads."""
    each = range(form.groups)
    x_CX = x_CX.astype(dtype)
    return beside([part(x_CX, form.key, g) for g in each for _ in form.members(g)])


def sum_heads(form: Form, x_CX: jax.Array) -> jax.Array:
    """The gradient of what the heads of a group share."""
    each = range(form.groups)
    return beside([sum(part(x_CX, form.key, h) for h in form.members(g)) for g in each])
