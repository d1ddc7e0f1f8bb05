"""One chunk of the delta rule with vector gates, one number a key dimension.

Scores of queries and of keys against keys come from `gated_linear`'s halving, so nothing is divided
by a decay. The backward pass is written out.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels import chunks
from kernels.delta_rule.inverse import unit_lower_inverse
from kernels.gated_linear.vector_gate import (
    by_head,
    halving,
    halving_backward,
    suffix_sums,
    sum_heads,
)


class Pieces(NamedTuple):
    """What both passes need of a chunk: `qe`, `ke` decayed from its start, `kw` to its end."""

    q_BHCK: Array
    k_BHCK: Array
    e_BHCK: Array
    qe_BHCK: Array
    ke_BHCK: Array
    kw_BHCK: Array
    keep_BHK1: Array
    q_score_BHCS: Array
    k_score_BHCS: Array
    q_levels: list
    k_levels: list
    beta_BHC1: Array
    error_BHCV: Array
    inverse_BHCS: Array
    u_BHCV: Array
    mask: chunks.Masks


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def vector_chunk(scale, s_BHKV, inputs, within):
    """(state, (q, k, v, beta, log_decay), boundaries) -> (state, out)."""
    p = _pieces(scale, s_BHKV, inputs, within)
    o_BHCV = jnp.einsum("bhck,bhkv->bhcv", p.qe_BHCK, s_BHKV)
    o_BHCV += jnp.einsum("bhcs,bhsv->bhcv", p.q_score_BHCS, p.u_BHCV)
    after_BHKV = p.keep_BHK1 * s_BHKV + jnp.einsum("bhsk,bhsv->bhkv", p.kw_BHCK, p.u_BHCV)
    return after_BHKV, jnp.swapaxes(o_BHCV, 1, 2).astype(inputs[2].dtype)


def _pieces(scale, s_BHKV, inputs, within) -> Pieces:
    q, k, v, beta, log_decay = inputs
    accumulator, chunk = s_BHKV.dtype, q.shape[1]
    q_BHCK, k_BHCK, v_BHCV, e_BHCK, mask = by_head(scale, accumulator, within, q, k, v, log_decay)
    beta_BHC1 = jnp.swapaxes(beta, 1, 2)[..., None].astype(accumulator)
    q_score_BHCS, qe_BHCK, kw_BHCK, keep_BHK, q_levels = halving(q_BHCK, k_BHCK, e_BHCK)
    k_score_BHCS, ke_BHCK, _, _, k_levels = halving(k_BHCK, k_BHCK, e_BHCK)
    pair, read = mask.pair[:, None], mask.read[:, None, :, None]
    strict = pair & jnp.tri(chunk, k=-1, dtype=bool)
    k_score_BHCS = jnp.where(strict, k_score_BHCS, 0)
    ke_BHCK = jnp.where(read, ke_BHCK, 0)
    error_BHCV = v_BHCV - jnp.einsum("bhck,bhkv->bhcv", ke_BHCK, s_BHKV)
    inverse_BHCS = unit_lower_inverse(beta_BHC1 * k_score_BHCS)
    u_BHCV = jnp.einsum("bhcs,bhsv->bhcv", inverse_BHCS, beta_BHC1 * error_BHCV)
    return Pieces(
        q_BHCK=q_BHCK,
        k_BHCK=k_BHCK,
        e_BHCK=e_BHCK,
        qe_BHCK=jnp.where(read, qe_BHCK, 0),
        ke_BHCK=ke_BHCK,
        kw_BHCK=jnp.where(mask.write[:, None, :, None], kw_BHCK, 0),
        keep_BHK1=jnp.where(mask.keep[:, None, None], keep_BHK, 0)[..., None],
        q_score_BHCS=jnp.where(pair, q_score_BHCS, 0),
        k_score_BHCS=k_score_BHCS,
        q_levels=q_levels,
        k_levels=k_levels,
        beta_BHC1=beta_BHC1,
        error_BHCV=error_BHCV,
        inverse_BHCS=inverse_BHCS,
        u_BHCV=u_BHCV,
        mask=mask,
    )


def _forward(scale, s_BHKV, inputs, within):
    return vector_chunk(scale, s_BHKV, inputs, within), (s_BHKV, inputs, within)


def _backward(scale, saved, cotangents):
    """With r = beta error, u = (I + beta m)^-1 r: dr is the transposed solve, d(beta m) -dr u^T."""
    s_BHKV, inputs, within = saved
    ds_BHKV, do = cotangents
    p = _pieces(scale, s_BHKV, inputs, within)
    pair, strict = (
        p.mask.pair[:, None],
        p.mask.pair[:, None] & jnp.tri(do.shape[1], k=-1, dtype=bool),
    )
    read, write = p.mask.read[:, None, :, None], p.mask.write[:, None, :, None]
    do_BHCV = jnp.swapaxes(do, 1, 2).astype(s_BHKV.dtype)

    du_BHCV = jnp.einsum("bhcs,bhcv->bhsv", p.q_score_BHCS, do_BHCV)
    du_BHCV += jnp.einsum("bhsk,bhkv->bhsv", p.kw_BHCK, ds_BHKV)
    dr_BHCV = jnp.einsum("bhcs,bhcv->bhsv", p.inverse_BHCS, du_BHCV)
    dv_BHCV = p.beta_BHC1 * dr_BHCV
    dlower_BHCS = -jnp.einsum("bhcv,bhsv->bhcs", dr_BHCV, p.u_BHCV)
    dbeta_BHC = jnp.einsum("bhcv,bhcv->bhc", dr_BHCV, p.error_BHCV)
    dbeta_BHC += jnp.einsum("bhcs,bhcs->bhc", dlower_BHCS, p.k_score_BHCS)
    dk_score_BHCS = jnp.where(strict, p.beta_BHC1 * dlower_BHCS, 0)
    dq_score_BHCS = jnp.where(pair, jnp.einsum("bhcv,bhsv->bhcs", do_BHCV, p.u_BHCV), 0)

    dqe_BHCK = jnp.where(read, jnp.einsum("bhcv,bhkv->bhck", do_BHCV, s_BHKV), 0)
    dke_BHCK = jnp.where(read, -jnp.einsum("bhcv,bhkv->bhck", dv_BHCV, s_BHKV), 0)
    dkw_BHCK = jnp.where(write, jnp.einsum("bhsv,bhkv->bhsk", p.u_BHCV, ds_BHKV), 0)
    before_BHKV = p.keep_BHK1 * ds_BHKV
    before_BHKV += jnp.einsum("bhck,bhcv->bhkv", p.qe_BHCK, do_BHCV)
    before_BHKV -= jnp.einsum("bhck,bhcv->bhkv", p.ke_BHCK, dv_BHCV)

    diagonal_BHC, dq_BHCK, written_BHCK = halving_backward(
        dq_score_BHCS, dqe_BHCK, dkw_BHCK, p.e_BHCK, p.q_levels
    )
    _, recalled_BHCK, more_BHCK = halving_backward(
        dk_score_BHCS, dke_BHCK, jnp.zeros_like(dke_BHCK), p.e_BHCK, p.k_levels
    )
    written_BHCK += more_BHCK
    leaving_BHK = jnp.einsum("bhsk,bhsk->bhk", p.kw_BHCK, dkw_BHCK)
    leaving_BHK += p.keep_BHK1[..., 0] * jnp.einsum("bhkv,bhkv->bhk", s_BHKV, ds_BHKV)
    dg_BHCK = suffix_sums(p.q_BHCK * dq_BHCK + p.k_BHCK * (recalled_BHCK - written_BHCK))
    dg_BHCK = jnp.where(p.mask.real[:, None, :, None], dg_BHCK + leaving_BHK[:, :, None], 0)
    diagonal_BHC1 = diagonal_BHC[..., None]
    groups = inputs[0].shape[2]
    gradients = (
        sum_heads(scale * (dq_BHCK + diagonal_BHC1 * p.k_BHCK), groups),
        sum_heads(recalled_BHCK + written_BHCK + diagonal_BHC1 * p.q_BHCK, groups),
        jnp.swapaxes(dv_BHCV, 1, 2),
        jnp.swapaxes(dbeta_BHC, 1, 2),
        jnp.swapaxes(dg_BHCK, 1, 2),
    )
    as_input = functools.partial(jax.tree.map, lambda x, d: d.astype(x.dtype))
    return before_BHKV, as_input(inputs, gradients), None


vector_chunk.defvjp(_forward, _backward)
