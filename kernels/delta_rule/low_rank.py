"""One chunk of a recurrence whose transition is diagonal plus low rank; backward written out.

In a chunk the recalls r_t = a_t^T S_{t-1} depend on each other through a unit lower triangular
matrix, as the delta rule's errors do. Two readers (q after the token's gate, a before it) meet two
writers (k, which brings v, and b, which brings r): four score matrices, found together by halving,
so that every decay is a product of gates and nothing is divided.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels import chunks
from kernels.delta_rule.inverse import unit_lower_inverse
from kernels.gated_linear.vector_gate import suffix_sums


class Pieces(NamedTuple):
    """What both passes need of a chunk; axis X holds q and a, axis Y holds k and b."""

    x_BHXCK: Array  # as given, q scaled
    y_BHYSK: Array
    e_BHCK: Array
    read_BHXCK: Array  # decayed from the chunk's start
    write_BHYSK: Array  # decayed to its end
    keep_BHK1: Array
    score_BHXCYS: Array
    inverse_BHCS: Array
    values_BHYSV: Array  # v and the recalls
    levels: list
    mask: chunks.Masks


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def low_rank_chunk(scale, s_BHKV, inputs, within):
    """(state, (q, k, v, a, b, log_decay), boundaries) -> (state, out)."""
    p = _pieces(scale, s_BHKV, inputs, within)
    o_BHCV = jnp.einsum("bhck,bhkv->bhcv", p.read_BHXCK[:, :, 0], s_BHKV)
    o_BHCV += _weigh(p.score_BHXCYS[:, :, 0], p.values_BHYSV)
    written_BHKV = jnp.einsum("bhyk,bhyv->bhkv", _rows(p.write_BHYSK), _rows(p.values_BHYSV))
    after_BHKV = p.keep_BHK1 * s_BHKV + written_BHKV
    return after_BHKV, jnp.swapaxes(o_BHCV, 1, 2).astype(inputs[2].dtype)


def _pieces(scale, s_BHKV, inputs, within) -> Pieces:
    accumulator, chunk = s_BHKV.dtype, inputs[0].shape[1]
    mask = chunks.masks(within, chunk)
    q, k, v, a, b, g = (jnp.swapaxes(x_BCHX, 1, 2).astype(accumulator) for x_BCHX in inputs)
    e_BHCK = jnp.exp(jnp.where(mask.real[:, None, :, None], g, 0))
    x_BHXCK, y_BHYSK = jnp.stack([scale * q, a], axis=2), jnp.stack([k, b], axis=2)
    score_BHXCYS, read_BHXCK, write_BHYSK, keep_BHK, levels = _halving(x_BHXCK, y_BHYSK, e_BHCK)
    score_BHXCYS = jnp.where(_pairs_seen(mask), score_BHXCYS, 0)
    read_BHXCK = jnp.where(mask.read[:, None, None, :, None], read_BHXCK, 0)
    inverse_BHCS = unit_lower_inverse(-score_BHXCYS[:, :, 1, :, 1])
    recalled_BHCV = jnp.einsum("bhck,bhkv->bhcv", read_BHXCK[:, :, 1], s_BHKV)
    recalled_BHCV += jnp.einsum("bhcs,bhsv->bhcv", score_BHXCYS[:, :, 1, :, 0], v)
    r_BHCV = jnp.einsum("bhcs,bhsv->bhcv", inverse_BHCS, recalled_BHCV)
    return Pieces(
        x_BHXCK=x_BHXCK,
        y_BHYSK=y_BHYSK,
        e_BHCK=e_BHCK,
        read_BHXCK=read_BHXCK,
        write_BHYSK=jnp.where(mask.write[:, None, None, :, None], write_BHYSK, 0),
        keep_BHK1=jnp.where(mask.keep[:, None, None], keep_BHK, 0)[..., None],
        score_BHXCYS=score_BHXCYS,
        inverse_BHCS=inverse_BHCS,
        values_BHYSV=jnp.stack([v, r_BHCV], axis=2),
        levels=levels,
        mask=mask,
    )


def _pairs_seen(mask):
    """q sees its own position, a only those before it: (B, 1, X, C, 1, S)."""
    strict = mask.pair & jnp.tri(mask.pair.shape[1], k=-1, dtype=bool)
    return jnp.stack([mask.pair, strict], axis=1)[:, None, :, :, None]


def _rows(x_BHYSK):
    """Both writers one below the other."""
    return x_BHYSK.reshape(*x_BHYSK.shape[:2], -1, x_BHYSK.shape[-1])


def _weigh(score_BHCYS, values_BHYSV):
    score_BHCS = score_BHCYS.reshape(*score_BHCYS.shape[:3], -1)
    return jnp.einsum("bhcs,bhsv->bhcv", score_BHCS, _rows(values_BHYSV))


def _forward(scale, s_BHKV, inputs, within):
    return low_rank_chunk(scale, s_BHKV, inputs, within), (s_BHKV, inputs, within)


def _backward(scale, saved, cotangents):
    """r = (I - M)^-1 z: dz is the transposed solve, dM is dz r^T; gates as in `vector_gate`."""
    s_BHKV, inputs, within = saved
    ds_BHKV, do = cotangents
    p = _pieces(scale, s_BHKV, inputs, within)
    do_BHCV = jnp.swapaxes(do, 1, 2).astype(s_BHKV.dtype)

    dvalues_BHYSV = jnp.einsum("bhcys,bhcv->bhysv", p.score_BHXCYS[:, :, 0], do_BHCV)
    dvalues_BHYSV += jnp.einsum("bhysk,bhkv->bhysv", p.write_BHYSK, ds_BHKV)
    dz_BHCV = jnp.einsum("bhcs,bhcv->bhsv", p.inverse_BHCS, dvalues_BHYSV[:, :, 1])
    dv_BHCV = dvalues_BHYSV[:, :, 0]
    dv_BHCV += jnp.einsum("bhcs,bhcv->bhsv", p.score_BHXCYS[:, :, 1, :, 0], dz_BHCV)
    dread_BHXCV = jnp.stack([do_BHCV, dz_BHCV], axis=2)

    dscore_BHXCYS = jnp.einsum("bhxcv,bhysv->bhxcys", dread_BHXCV, p.values_BHYSV)
    dscore_BHXCYS = jnp.where(_pairs_seen(p.mask), dscore_BHXCYS, 0)
    dread_BHXCK = jnp.einsum("bhxcv,bhkv->bhxck", dread_BHXCV, s_BHKV)
    dread_BHXCK = jnp.where(p.mask.read[:, None, None, :, None], dread_BHXCK, 0)
    dwrite_BHYSK = jnp.einsum("bhysv,bhkv->bhysk", p.values_BHYSV, ds_BHKV)
    dwrite_BHYSK = jnp.where(p.mask.write[:, None, None, :, None], dwrite_BHYSK, 0)
    before_BHKV = p.keep_BHK1 * ds_BHKV
    before_BHKV += jnp.einsum("bhck,bhcv->bhkv", _rows(p.read_BHXCK), _rows(dread_BHXCV))

    diagonal_BHCY, dx_BHXCK, dy_BHYSK = _halving_backward(
        dscore_BHXCYS, dread_BHXCK, dwrite_BHYSK, p.e_BHCK, p.levels
    )
    leaving_BHK = jnp.einsum("bhysk,bhysk->bhk", p.write_BHYSK, dwrite_BHYSK)
    leaving_BHK += p.keep_BHK1[..., 0] * jnp.einsum("bhkv,bhkv->bhk", s_BHKV, ds_BHKV)
    passed_BHXCK = p.x_BHXCK * dx_BHXCK
    dg_BHCK = suffix_sums(passed_BHXCK.sum(2) - (p.y_BHYSK * dy_BHYSK).sum(2))
    dg_BHCK += leaving_BHK[:, :, None] - passed_BHXCK[:, :, 1]
    dg_BHCK = jnp.where(p.mask.real[:, None, :, None], dg_BHCK, 0)
    to_k_BHC1, to_b_BHC1 = diagonal_BHCY[..., :1], diagonal_BHCY[..., 1:]
    k_BHCK, b_BHCK = p.y_BHYSK[:, :, 0], p.y_BHYSK[:, :, 1]
    q_BHCK = p.x_BHXCK[:, :, 0]
    gradients = (
        scale * (dx_BHXCK[:, :, 0] + to_k_BHC1 * k_BHCK + to_b_BHC1 * b_BHCK),
        dy_BHYSK[:, :, 0] + to_k_BHC1 * q_BHCK,
        dv_BHCV,
        dx_BHXCK[:, :, 1],
        dy_BHYSK[:, :, 1] + to_b_BHC1 * q_BHCK,
        dg_BHCK,
    )
    pairs = zip(gradients, inputs, strict=True)
    return before_BHKV, tuple(jnp.swapaxes(d, 1, 2).astype(x.dtype) for d, x in pairs), None


low_rank_chunk.defvjp(_forward, _backward)


def _halving(x_BHXCK, y_BHYSK, e_BHCK):
    """Scores sum_K x_C y_S prod(gates between) of two readers and two writers, S <= C.

    As `gated_linear.vector_gate.halving`, but for a, whose own gate is not between. a's diagonal
    holds nothing: it does not read its own position.
    """
    chunk = e_BHCK.shape[2]
    own_BHCY = jnp.einsum("bhck,bhyck->bhcy", x_BHXCK[:, :, 0], y_BHYSK)
    own_BHCXY = jnp.stack([own_BHCY, jnp.zeros_like(own_BHCY)], axis=3)
    score_BHNXCYS = own_BHCXY[:, :, :, :, None, :, None]
    x_BHXCK = jnp.stack([x_BHXCK[:, :, 0] * e_BHCK, x_BHXCK[:, :, 1]], axis=2)
    x_BHNXCK = jnp.moveaxis(x_BHXCK, 3, 2)[:, :, :, :, None]
    y_BHNYSK = jnp.moveaxis(y_BHYSK, 3, 2)[:, :, :, :, None]
    keep_BHN11K, levels = e_BHCK[:, :, :, None, None], []
    for _ in range(chunk.bit_length() - 1):
        early_x, late_x = x_BHNXCK[:, :, ::2], x_BHNXCK[:, :, 1::2]
        early_y, late_y = y_BHNYSK[:, :, ::2], y_BHNYSK[:, :, 1::2]
        early_keep, late_keep = keep_BHN11K[:, :, ::2], keep_BHN11K[:, :, 1::2]
        levels.append((late_x, early_y, early_keep, late_keep))
        cross = jnp.einsum("bhnxck,bhnysk->bhnxcys", late_x, early_y)
        early_own, late_own = score_BHNXCYS[:, :, ::2], score_BHNXCYS[:, :, 1::2]
        above = jnp.concatenate([early_own, jnp.zeros_like(cross)], axis=6)
        below = jnp.concatenate([cross, late_own], axis=6)
        score_BHNXCYS = jnp.concatenate([above, below], axis=4)
        x_BHNXCK = jnp.concatenate([early_x, late_x * early_keep], axis=4)
        y_BHNYSK = jnp.concatenate([early_y * late_keep, late_y], axis=4)
        keep_BHN11K = early_keep * late_keep
    keep_BHK = keep_BHN11K[:, :, 0, 0, 0]
    return score_BHNXCYS[:, :, 0], x_BHNXCK[:, :, 0], y_BHNYSK[:, :, 0], keep_BHK, levels


def _halving_backward(dscore_BHXCYS, dread_BHXCK, dwrite_BHYSK, e_BHCK, levels):
    """From the gradients of `_halving`'s first three results: q's diagonal, readers, writers.

    Readers and writers are without the diagonal's share, which no gate touches.
    """
    dscore, dx, dy = dscore_BHXCYS[:, :, None], dread_BHXCK[:, :, None], dwrite_BHYSK[:, :, None]
    for late_x, early_y, early_keep, late_keep in reversed(levels):
        block = late_x.shape[4]
        cross = dscore[..., block:, :, :block]
        dscore = _interleave(dscore[..., :block, :, :block], dscore[..., block:, :, block:])
        d_late_x = dx[..., block:, :] * early_keep
        d_late_x += jnp.einsum("bhnxcys,bhnysk->bhnxck", cross, early_y)
        d_early_y = dy[..., :block, :] * late_keep
        d_early_y += jnp.einsum("bhnxcys,bhnxck->bhnysk", cross, late_x)
        dx = _interleave(dx[..., :block, :], d_late_x)
        dy = _interleave(d_early_y, dy[..., block:, :])
    diagonal_BHCY = dscore[:, :, :, 0, 0, :, 0]
    dx_BHXCK, dy_BHYSK = (jnp.moveaxis(d[..., 0, :], 2, 3) for d in (dx, dy))
    dx_BHXCK = jnp.stack([dx_BHXCK[:, :, 0] * e_BHCK, dx_BHXCK[:, :, 1]], axis=2)
    return diagonal_BHCY, dx_BHXCK, dy_BHYSK


def _interleave(early_BHNxx, late_BHNxx):
    """Blocks in order of time, from the earlier and the later of every two."""
    both = jnp.stack([early_BHNxx, late_BHNxx], axis=3)
    return both.reshape(*both.shape[:2], -1, *both.shape[4:])
