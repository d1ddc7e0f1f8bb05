"""One chunk of the delta rule with scalar gates, or none.

Queries and keys read the state and the chunk's earlier writes in the same way, so they are stacked
as readers x = [q; k], 2C rows. The backward pass is written out.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels.delta_rule.inverse import unit_lower_inverse
from kernels.gated_linear.scalar_gate import between, decays, merge_heads, split_heads


class Pieces(NamedTuple):
    """What both passes need of a chunk; X counts the 2C readers."""

    x_BGXK: Array
    k_BGCK: Array
    decay_BGRXS: Array
    read_BGCR1: Array
    write_BGCR1: Array
    keep_BG1R1: Array
    real_BC: Array
    score_BGRXS: Array
    recalled_BGXRV: Array
    beta_BGRC1: Array
    error_BGRCV: Array
    inverse_BGRCS: Array
    u_BGRCV: Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scalar_chunk(scale, s_BGKRV, inputs, within):
    """(state, (q, k, v, beta, log_decay or None), boundaries) -> (state, out)."""
    p = _pieces(scale, s_BGKRV, inputs, within)
    chunk, heads = p.k_BGCK.shape[2], s_BGKRV.shape[3]
    inner_BGRCV = jnp.einsum("bgrcs,bgrsv->bgrcv", p.score_BGRXS[..., :chunk, :], p.u_BGRCV)
    o_BGCRV = p.read_BGCR1 * p.recalled_BGXRV[:, :, :chunk] + jnp.swapaxes(inner_BGRCV, 2, 3)
    leaving_BGCRV = p.write_BGCR1 * jnp.swapaxes(p.u_BGRCV, 2, 3)
    written = jnp.einsum("bgsk,bgsx->bgkx", p.k_BGCK, merge_heads(leaving_BGCRV))
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
    x_BGXK = jnp.concatenate([q_BGCK, k_BGCK], axis=2)
    v_BGRCV = jnp.moveaxis(v.reshape(batch, chunk, groups, heads, -1), 1, 3).astype(accumulator)
    by_head = (batch, chunk, groups, heads)
    beta_BGRC1 = jnp.moveaxis(beta.reshape(by_head), 1, 3)[..., None].astype(accumulator)
    gates = jnp.zeros(by_head, accumulator) if log_decay is None else log_decay.reshape(by_head)
    decay_BGRCS, read_BGCR1, write_BGCR1, keep_BG1R1, real_BC = decays(
        jnp.moveaxis(gates, 1, 3).astype(accumulator), within
    )
    strict_BGRCS = decay_BGRCS * jnp.tri(chunk, k=-1, dtype=accumulator)
    decay_BGRXS = jnp.concatenate([decay_BGRCS, strict_BGRCS], axis=3)
    pair_BGXS = jnp.einsum("bgxk,bgsk->bgxs", x_BGXK, k_BGCK)
    score_BGRXS = pair_BGXS[:, :, None] * decay_BGRXS
    recalled = jnp.einsum("bgxk,bgky->bgxy", x_BGXK, merge_heads(s_BGKRV))
    recalled_BGXRV = split_heads(recalled, heads)
    recalled_BGCRV = read_BGCR1 * recalled_BGXRV[:, :, chunk:]
    error_BGRCV = v_BGRCV - jnp.swapaxes(recalled_BGCRV, 2, 3)
    inverse_BGRCS = unit_lower_inverse(beta_BGRC1 * score_BGRXS[..., chunk:, :])
    u_BGRCV = jnp.einsum("bgrcs,bgrsv->bgrcv", inverse_BGRCS, beta_BGRC1 * error_BGRCV)
    return Pieces(
        x_BGXK,
        k_BGCK,
        decay_BGRXS,
        read_BGCR1,
        write_BGCR1,
        keep_BG1R1,
        real_BC,
        score_BGRXS,
        recalled_BGXRV,
        beta_BGRC1,
        error_BGRCV,
        inverse_BGRCS,
        u_BGRCV,
    )


def _forward(scale, s_BGKRV, inputs, within):
    return scalar_chunk(scale, s_BGKRV, inputs, within), (s_BGKRV, inputs, within)


def _backward(scale, saved, cotangents):
    """With r = beta error, u = (I + beta m)^-1 r: dr is the transposed solve, d(beta m) -dr u^T."""
    s_BGKRV, inputs, within = saved
    ds_BGKRV, do = cotangents
    p = _pieces(scale, s_BGKRV, inputs, within)
    chunk, heads = p.k_BGCK.shape[2], s_BGKRV.shape[3]
    batch, groups = p.k_BGCK.shape[:2]
    do_BGCRV = jnp.swapaxes(do.reshape(batch, chunk, groups, heads, -1), 1, 2)
    do_BGCRV = do_BGCRV.astype(s_BGKRV.dtype)
    do_BGRCV = jnp.swapaxes(do_BGCRV, 2, 3)
    s, ds = merge_heads(s_BGKRV), merge_heads(ds_BGKRV)

    du_BGRCV = jnp.einsum("bgrcs,bgrcv->bgrsv", p.score_BGRXS[..., :chunk, :], do_BGRCV)
    left_BGCRV = split_heads(jnp.einsum("bgsk,bgky->bgsy", p.k_BGCK, ds), heads)
    du_BGRCV += jnp.swapaxes(p.write_BGCR1 * left_BGCRV, 2, 3)
    dr_BGRCV = jnp.einsum("bgrcs,bgrcv->bgrsv", p.inverse_BGRCS, du_BGRCV)
    dv_BGCRV = jnp.swapaxes(p.beta_BGRC1 * dr_BGRCV, 2, 3)

    heard_BGRXV = jnp.concatenate([do_BGRCV, -dr_BGRCV], axis=3)
    dscore_BGRXS = jnp.einsum("bgrxv,bgrsv->bgrxs", heard_BGRXV, p.u_BGRCV)
    dlower_BGRCS = dscore_BGRXS[..., chunk:, :]
    dbeta_BGRC = jnp.einsum("bgrcv,bgrcv->bgrc", dr_BGRCV, p.error_BGRCV)
    dbeta_BGRC += jnp.einsum("bgrcs,bgrcs->bgrc", dlower_BGRCS, p.score_BGRXS[..., chunk:, :])
    dscore_BGRXS = jnp.concatenate(
        [dscore_BGRXS[..., :chunk, :], p.beta_BGRC1 * dlower_BGRCS], axis=3
    )
    dpair_BGXS = (dscore_BGRXS * p.decay_BGRXS).sum(2)
    read_BGXR1 = jnp.concatenate([p.read_BGCR1, p.read_BGCR1], axis=2)
    dread_BGXRV = read_BGXR1 * jnp.concatenate([do_BGCRV, -dv_BGCRV], axis=2)
    leaving_BGCRV = p.write_BGCR1 * jnp.swapaxes(p.u_BGRCV, 2, 3)

    dx_BGXK = jnp.einsum("bgxs,bgsk->bgxk", dpair_BGXS, p.k_BGCK)
    dx_BGXK += jnp.einsum("bgxy,bgky->bgxk", merge_heads(dread_BGXRV), s)
    dk_BGCK = jnp.einsum("bgxs,bgxk->bgsk", dpair_BGXS, p.x_BGXK) + dx_BGXK[:, :, chunk:]
    dk_BGCK += jnp.einsum("bgsy,bgky->bgsk", merge_heads(leaving_BGCRV), ds)
    before = jnp.einsum("bgxk,bgxy->bgky", p.x_BGXK, merge_heads(dread_BGXRV))
    before_BGKRV = p.keep_BG1R1 * ds_BGKRV + split_heads(before, heads)
    dg_BGRC = None
    if inputs[4] is not None:
        pairs_BGRXS = dscore_BGRXS * p.score_BGRXS
        reads_BGXR = jnp.einsum("bgxrv,bgxrv->bgxr", dread_BGXRV, p.recalled_BGXRV)
        writes_BGCR = jnp.einsum("bgcrv,bgcrv->bgcr", leaving_BGCRV, left_BGCRV)
        kept_BGKR = jnp.einsum("bgkrv,bgkrv->bgkr", s_BGKRV, ds_BGKRV)
        dg_BGRC = between(
            pairs_BGRXS[..., :chunk, :] + pairs_BGRXS[..., chunk:, :],
            jnp.swapaxes(reads_BGXR[:, :, :chunk] + reads_BGXR[:, :, chunk:], 2, 3),
            jnp.swapaxes(writes_BGCR, 2, 3),
        )
        dg_BGRC += (p.keep_BG1R1[:, :, 0, :, 0] * kept_BGKR.sum(2))[..., None]
        dg_BGRC = jnp.where(p.real_BC[:, None, None], dg_BGRC, 0)
    gradients = (
        jnp.swapaxes(scale * dx_BGXK[:, :, :chunk], 1, 2),
        jnp.swapaxes(dk_BGCK, 1, 2),
        jnp.swapaxes(dv_BGCRV, 1, 2),
        jnp.moveaxis(dbeta_BGRC, 3, 1),
        None if dg_BGRC is None else jnp.moveaxis(dg_BGRC, 3, 1),
    )
    as_input = functools.partial(jax.tree.map, lambda x, d: d.reshape(x.shape).astype(x.dtype))
    return before_BGKRV, as_input(inputs, gradients), None


scalar_chunk.defvjp(_forward, _backward)
