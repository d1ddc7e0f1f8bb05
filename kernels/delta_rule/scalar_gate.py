"""One chunk of the delta rule with scalar gates, or none; the backward pass is written out."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels.delta_rule.inverse import unit_lower_inverse
from kernels.gated_linear.scalar_gate import between, decays, merge_heads, reads, split_heads


class Pieces(NamedTuple):
    """What both passes need of a chunk. Scores are decayed, recalls are not."""

    q_BGCK: Array
    k_BGCK: Array
    decay_BGRCS: Array
    strict_BGRCS: Array  # decays without the diagonal: a write does not hear itself
    read_BGCR1: Array
    write_BGCR1: Array
    keep_BG1R1: Array
    real_BC: Array
    q_score_BGRCS: Array
    k_score_BGRCS: Array
    k_recall_BGCRV: Array
    beta_BGRC1: Array
    error_BGRCV: Array
    inverse_BGRCS: Array
    u_BGRCV: Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scalar_chunk(scale, s_BGKRV, inputs, within):
    """(state, (q, k, v, beta, log_decay or None), boundaries) -> (state, out)."""
    p = _pieces(scale, s_BGKRV, inputs, within)
    heads = s_BGKRV.shape[3]
    q_recall = jnp.einsum("bgck,bgky->bgcy", p.q_BGCK, merge_heads(s_BGKRV))
    inner_BGRCV = jnp.einsum("bgrcs,bgrsv->bgrcv", p.q_score_BGRCS, p.u_BGRCV)
    o_BGCRV = p.read_BGCR1 * split_heads(q_recall, heads) + jnp.swapaxes(inner_BGRCV, 2, 3)
    leaving_BGCRV = p.write_BGCR1 * jnp.swapaxes(p.u_BGRCV, 2, 3)
    written = jnp.einsum("bgsk,bgsy->bgky", p.k_BGCK, merge_heads(leaving_BGCRV))
    after_BGKRV = p.keep_BG1R1 * s_BGKRV + split_heads(written, heads)
    v = inputs[2]
    return after_BGKRV, jnp.swapaxes(o_BGCRV, 1, 2).reshape(v.shape).astype(v.dtype)


def _pieces(scale, s_BGKRV, inputs, within) -> Pieces:
    q, k, v, beta, log_decay = inputs
    accumulator = s_BGKRV.dtype
    batch, chunk, groups, _ = q.shape
    heads = v.shape[2] // groups
    q_BGCK = scale * jnp.swapaxes(q, 1, 2).astype(accumulator)
    k_BGCK = jnp.swapaxes(k, 1, 2).astype(accumulator)
    v_BGRCV = jnp.moveaxis(v.reshape(batch, chunk, groups, heads, -1), 1, 3).astype(accumulator)
    by_head = (batch, chunk, groups, heads)
    beta_BGRC1 = jnp.moveaxis(beta.reshape(by_head), 1, 3)[..., None].astype(accumulator)
    gates = jnp.zeros(by_head, accumulator) if log_decay is None else log_decay.reshape(by_head)
    decay_BGRCS, read_BGCR1, write_BGCR1, keep_BG1R1, real_BC = decays(
        jnp.moveaxis(gates, 1, 3).astype(accumulator), within
    )
    strict_BGRCS = decay_BGRCS * jnp.tri(chunk, k=-1, dtype=accumulator)
    qk_BGCS = jnp.einsum("bgck,bgsk->bgcs", q_BGCK, k_BGCK)
    kk_BGCS = jnp.einsum("bgck,bgsk->bgcs", k_BGCK, k_BGCK)
    k_score_BGRCS = kk_BGCS[:, :, None] * strict_BGRCS
    k_recall = jnp.einsum("bgck,bgky->bgcy", k_BGCK, merge_heads(s_BGKRV))
    k_recall_BGCRV = split_heads(k_recall, heads)
    error_BGRCV = v_BGRCV - jnp.swapaxes(read_BGCR1 * k_recall_BGCRV, 2, 3)
    inverse_BGRCS = unit_lower_inverse(beta_BGRC1 * k_score_BGRCS)
    return Pieces(
        q_BGCK=q_BGCK,
        k_BGCK=k_BGCK,
        decay_BGRCS=decay_BGRCS,
        strict_BGRCS=strict_BGRCS,
        read_BGCR1=read_BGCR1,
        write_BGCR1=write_BGCR1,
        keep_BG1R1=keep_BG1R1,
        real_BC=real_BC,
        q_score_BGRCS=qk_BGCS[:, :, None] * decay_BGRCS,
        k_score_BGRCS=k_score_BGRCS,
        k_recall_BGCRV=k_recall_BGCRV,
        beta_BGRC1=beta_BGRC1,
        error_BGRCV=error_BGRCV,
        inverse_BGRCS=inverse_BGRCS,
        u_BGRCV=jnp.einsum("bgrcs,bgrsv->bgrcv", inverse_BGRCS, beta_BGRC1 * error_BGRCV),
    )


def _forward(scale, s_BGKRV, inputs, within):
    return scalar_chunk(scale, s_BGKRV, inputs, within), (s_BGKRV, inputs, within)


def _backward(scale, saved, cotangents):
    """With r = beta error, u = (I + beta m)^-1 r: dr is the transposed solve, d(beta m) -dr u^T."""
    s_BGKRV, inputs, within = saved
    ds_BGKRV, do = cotangents
    p = _pieces(scale, s_BGKRV, inputs, within)
    do_BGRCV = jnp.moveaxis(do.reshape(jnp.moveaxis(p.u_BGRCV, 3, 1).shape), 1, 3)
    do_BGRCV = do_BGRCV.astype(s_BGKRV.dtype)

    left = jnp.einsum("bgsk,bgky->bgsy", p.k_BGCK, merge_heads(ds_BGKRV))
    left_BGCRV = split_heads(left, s_BGKRV.shape[3])
    du_BGRCV = jnp.einsum("bgrcs,bgrcv->bgrsv", p.q_score_BGRCS, do_BGRCV)
    du_BGRCV += jnp.swapaxes(p.write_BGCR1 * left_BGCRV, 2, 3)
    dr_BGRCV = jnp.einsum("bgrcs,bgrcv->bgrsv", p.inverse_BGRCS, du_BGRCV)
    dlower_BGRCS = -jnp.einsum("bgrcv,bgrsv->bgrcs", dr_BGRCV, p.u_BGRCV)
    dbeta_BGRC = jnp.einsum("bgrcv,bgrcv->bgrc", dr_BGRCV, p.error_BGRCV)
    dbeta_BGRC += jnp.einsum("bgrcs,bgrcs->bgrc", dlower_BGRCS, p.k_score_BGRCS)
    dq_score_BGRCS = jnp.einsum("bgrcv,bgrsv->bgrcs", do_BGRCV, p.u_BGRCV)
    dk_score_BGRCS = p.beta_BGRC1 * dlower_BGRCS
    dqk_BGCS = (dq_score_BGRCS * p.decay_BGRCS).sum(2)
    dkk_BGCS = (dk_score_BGRCS * p.strict_BGRCS).sum(2)
    do_BGCRV, dv_BGCRV = jnp.swapaxes(do_BGRCV, 2, 3), jnp.swapaxes(p.beta_BGRC1 * dr_BGRCV, 2, 3)
    q_read_BGCRV, k_read_BGCRV = p.read_BGCR1 * do_BGCRV, -p.read_BGCR1 * dv_BGCRV
    leaving_BGCRV = p.write_BGCR1 * jnp.swapaxes(p.u_BGRCV, 2, 3)

    s, ds = merge_heads(s_BGKRV), merge_heads(ds_BGKRV)
    q_read, k_read = merge_heads(q_read_BGCRV), merge_heads(k_read_BGCRV)
    dq_read_BGCK = jnp.einsum("bgcy,bgky->bgck", q_read, s)
    dq_BGCK = dq_read_BGCK + jnp.einsum("bgcs,bgsk->bgck", dqk_BGCS, p.k_BGCK)
    dk_BGCK = jnp.einsum("bgcs,bgck->bgsk", dqk_BGCS, p.q_BGCK)
    dk_BGCK += jnp.einsum("bgcs,bgsk->bgck", dkk_BGCS + jnp.swapaxes(dkk_BGCS, 2, 3), p.k_BGCK)
    dk_BGCK += jnp.einsum("bgcy,bgky->bgck", k_read, s)
    dk_BGCK += jnp.einsum("bgsy,bgky->bgsk", merge_heads(leaving_BGCRV), ds)
    before = jnp.einsum("bgck,bgcy->bgky", p.q_BGCK, q_read)
    before += jnp.einsum("bgck,bgcy->bgky", p.k_BGCK, k_read)
    before_BGKRV = p.keep_BG1R1 * ds_BGKRV + split_heads(before, s_BGKRV.shape[3])
    dg_BGRC = None
    if inputs[4] is not None:
        reads_BGCR = reads(p.q_BGCK, dq_read_BGCK, q_read_BGCRV, s)
        reads_BGCR += jnp.einsum("bgcrv,bgcrv->bgcr", k_read_BGCRV, p.k_recall_BGCRV)
        writes_BGCR = jnp.einsum("bgcrv,bgcrv->bgcr", leaving_BGCRV, left_BGCRV)
        kept_BGKR = jnp.einsum("bgkrv,bgkrv->bgkr", s_BGKRV, ds_BGKRV)
        dg_BGRC = between(
            dq_score_BGRCS * p.q_score_BGRCS + dk_score_BGRCS * p.k_score_BGRCS,
            jnp.swapaxes(reads_BGCR, 2, 3),
            jnp.swapaxes(writes_BGCR, 2, 3),
        )
        dg_BGRC += (p.keep_BG1R1[:, :, 0, :, 0] * kept_BGKR.sum(2))[..., None]
        dg_BGRC = jnp.where(p.real_BC[:, None, None], dg_BGRC, 0)
    gradients = (
        jnp.swapaxes(scale * dq_BGCK, 1, 2),
        jnp.swapaxes(dk_BGCK, 1, 2),
        jnp.swapaxes(dv_BGCRV, 1, 2),
        jnp.moveaxis(dbeta_BGRC, 3, 1),
        None if dg_BGRC is None else jnp.moveaxis(dg_BGRC, 3, 1),
    )
    as_input = functools.partial(jax.tree.map, lambda x, d: d.reshape(x.shape).astype(x.dtype))
    return before_BGKRV, as_input(inputs, gradients), None


scalar_chunk.defvjp(_forward, _backward)
