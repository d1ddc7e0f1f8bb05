"""One chunk of gated linear attention whose gates are vectors, one number a key dimension.

The chunk is split by halves until every pair of positions has met at an edge between two blocks,
with one product of decays on either side of it, both at most 1: any gate is exact, nothing is
divided by a decay, and every step is a matmul.
"""

import functools

import jax
import jax.numpy as jnp

from kernels import chunks
from kernels.gated_linear.scalar_gate import advance
from kernels.products import HIGHEST


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def vector_chunk(scale, lag, s_BHKV, inputs, within):
    """One chunk of heads with their own gates.

    Token t reads S_{t - lag}: with lag 1 neither its own gate nor its own write.
    """
    q_BHCK, k_BHCK, v_BHCV, e_BHCK, mask = by_head(scale, s_BHKV.dtype, within, *inputs)
    a_BHCS, qe_BHCK, ke_BHCK, keep_BHK, _ = halving(q_BHCK, k_BHCK, e_BHCK, lag)
    a_BHCS, qe_BHCK, ke_BHCK, keep_BHK = masked(mask, a_BHCS, qe_BHCK, ke_BHCK, keep_BHK, lag)
    o_BHCV = jnp.einsum("bhcs,bhsv->bhcv", a_BHCS, v_BHCV)
    o_BHCV += jnp.einsum("bhck,bhkv->bhcv", qe_BHCK, s_BHKV)
    written_BHKV = jnp.einsum("bhsk,bhsv->bhkv", ke_BHCK, v_BHCV)
    after_BHKV = keep_BHK[..., None] * s_BHKV + written_BHKV
    return after_BHKV, jnp.swapaxes(o_BHCV, 1, 2).astype(inputs[2].dtype)


def _forward(scale, lag, s_BHKV, inputs, within):
    return vector_chunk(scale, lag, s_BHKV, inputs, within), (s_BHKV, inputs, within)


def _backward(scale, lag, saved, cotangents):
    """What q dq ends and k dk starts passes the gates between; the diagonal passes none."""
    s_BHKV, inputs, within = saved
    ds_BHKV, do = cotangents
    accumulator = s_BHKV.dtype
    do_BHCV = jnp.swapaxes(do, 1, 2).astype(accumulator)
    q_BHCK, k_BHCK, v_BHCV, e_BHCK, mask = by_head(scale, accumulator, within, *inputs)
    a_BHCS, qe_BHCK, ke_BHCK, keep_BHK, levels = halving(q_BHCK, k_BHCK, e_BHCK, lag)
    a_BHCS, qe_BHCK, ke_BHCK, keep_BHK = masked(mask, a_BHCS, qe_BHCK, ke_BHCK, keep_BHK, lag)
    da_BHCS = jnp.einsum("bhcv,bhsv->bhcs", do_BHCV, v_BHCV)
    dqe_BHCK = jnp.einsum("bhcv,bhkv->bhck", do_BHCV, s_BHKV)
    dke_BHCK = jnp.einsum("bhsv,bhkv->bhsk", v_BHCV, ds_BHKV)
    da_BHCS, dqe_BHCK, dke_BHCK, _ = masked(mask, da_BHCS, dqe_BHCK, dke_BHCK, keep_BHK, lag)
    diagonal_BHC, dq_BHCK, dk_BHCK = halving_backward(
        da_BHCS, dqe_BHCK, dke_BHCK, e_BHCK, levels, lag
    )

    dv_BHCV = jnp.einsum("bhcs,bhcv->bhsv", a_BHCS, do_BHCV)
    dv_BHCV += jnp.einsum("bhsk,bhkv->bhsv", ke_BHCK, ds_BHKV)
    before_BHKV = keep_BHK[..., None] * ds_BHKV
    before_BHKV += jnp.einsum("bhck,bhcv->bhkv", qe_BHCK, do_BHCV)

    leaving_BHK = jnp.einsum("bhsk,bhsk->bhk", ke_BHCK, dke_BHCK)
    leaving_BHK += keep_BHK * jnp.einsum("bhkv,bhkv->bhk", s_BHKV, ds_BHKV)
    ends_BHCK = advance(q_BHCK * dq_BHCK, lag, axis=2)
    dg_BHCK = suffix_sums(ends_BHCK - k_BHCK * dk_BHCK) + leaving_BHK[:, :, None]
    dg_BHCK = jnp.where(mask.real[:, None, :, None], dg_BHCK, 0)
    dq_BHCK = scale * (dq_BHCK + diagonal_BHC[..., None] * k_BHCK)
    dk_BHCK = dk_BHCK + diagonal_BHC[..., None] * q_BHCK
    groups = inputs[0].shape[2]
    gradients = (
        sum_heads(dq_BHCK, groups),
        sum_heads(dk_BHCK, groups),
        jnp.swapaxes(dv_BHCV, 1, 2),
        jnp.swapaxes(dg_BHCK, 1, 2),
    )
    gradients = (d.astype(x.dtype) for d, x in zip(gradients, inputs, strict=True))
    return before_BHKV, tuple(gradients), None


vector_chunk.defvjp(_forward, _backward)


def by_head(scale, accumulator, within, q, k, v, log_decay):
    """A chunk's inputs with heads outermost, q scaled, and the gates' exponentials."""
    repeats = v.shape[2] // q.shape[2]
    mask = chunks.masks(within, q.shape[1])
    q_BHCK = scale * jnp.swapaxes(jnp.repeat(q, repeats, axis=2), 1, 2).astype(accumulator)
    k_BHCK = jnp.swapaxes(jnp.repeat(k, repeats, axis=2), 1, 2).astype(accumulator)
    v_BHCV = jnp.swapaxes(v, 1, 2).astype(accumulator)
    g_BHCK = jnp.swapaxes(log_decay, 1, 2).astype(accumulator)
    e_BHCK = jnp.exp(jnp.where(mask.real[:, None, :, None], g_BHCK, 0))
    return q_BHCK, k_BHCK, v_BHCV, e_BHCK, mask


def masked(mask, a_BHCS, read_BHCK, write_BHCK, keep_BHK, lag=0):
    """Scores and factors with zeros where a document boundary or padding stands between."""
    pair = mask.pair & jnp.tri(a_BHCS.shape[-1], k=-lag, dtype=bool)
    return (
        jnp.where(pair[:, None], a_BHCS, 0),
        jnp.where(mask.read[:, None, :, None], read_BHCK, 0),
        jnp.where(mask.write[:, None, :, None], write_BHCK, 0),
        jnp.where(mask.keep[:, None, None], keep_BHK, 0),
    )


def halving(q_BHCK, k_BHCK, e_BHCK, lag=0):
    """Scores sum_K q_C k_S prod(e between), S <= C, of a chunk whose length is a power of two.

    With lag 1 C's own gate is not between, and the diagonal means nothing: mask it.
    Returns them with q decayed from the chunk's start, k decayed to its end, the whole chunk's
    decay, and what the backward pass needs. Blocks of 1, 2, 4 ... positions are joined in pairs:
    q holds the decays since its block began, k those until its block ends, so the later block's q
    against the earlier block's k is one matmul a pair of blocks.
    """
    batch, heads, chunk, dim = q_BHCK.shape
    a_BHNCS = jnp.einsum("bhck,bhck->bhc", q_BHCK, k_BHCK)[..., None, None]
    q_BHCK, keep_BHNK, levels = q_BHCK if lag else q_BHCK * e_BHCK, e_BHCK, []
    block = 1
    while block < chunk:
        early_q, late_q = _pairs(q_BHCK, block)
        early_k, late_k = _pairs(k_BHCK, block)
        early_keep, late_keep = _pairs(keep_BHNK, 1)
        levels.append((late_q, early_k, early_keep, late_keep))
        if block == 1:
            cross = jnp.einsum("bhnck,bhnck->bhnc", late_q, early_k)[..., None]
        else:
            cross = jnp.einsum("bhnck,bhnsk->bhncs", late_q, early_k)
        early_a, late_a = a_BHNCS[:, :, ::2], a_BHNCS[:, :, 1::2]
        above = jnp.concatenate([early_a, jnp.zeros_like(cross)], axis=4)
        a_BHNCS = jnp.concatenate([above, jnp.concatenate([cross, late_a], axis=4)], axis=3)
        q_BHCK = _joined(early_q, late_q * early_keep)
        k_BHCK = _joined(early_k * late_keep, late_k)
        keep_BHNK = (early_keep * late_keep)[:, :, :, 0]
        block *= 2
    return a_BHNCS[:, :, 0], q_BHCK, k_BHCK, keep_BHNK[:, :, 0], levels


def halving_backward(da_BHCS, dq_BHCK, dk_BHCK, e_BHCK, levels, lag=0):
    """From the gradients of `halving`'s first three results: the diagonal's, and q's and k's.

    q's and k's are without the diagonal's share, which no gate touches.
    """
    da_BHNCS = da_BHCS[:, :, None]
    for late_q, early_k, early_keep, late_keep in reversed(levels):
        block = late_q.shape[3]
        cross = da_BHNCS[..., block:, :block]
        early_a, late_a = da_BHNCS[..., :block, :block], da_BHNCS[..., block:, block:]
        da_BHNCS = jnp.stack([early_a, late_a], axis=3)
        da_BHNCS = da_BHNCS.reshape(*da_BHNCS.shape[:2], -1, block, block)
        early_q, d_late_q = _pairs(dq_BHCK, block)
        d_early_k, late_k = _pairs(dk_BHCK, block)
        d_late_q = d_late_q * early_keep + jnp.einsum("bhncs,bhnsk->bhnck", cross, early_k)
        d_early_k = d_early_k * late_keep + jnp.einsum("bhncs,bhnck->bhnsk", cross, late_q)
        dq_BHCK, dk_BHCK = _joined(early_q, d_late_q), _joined(d_early_k, late_k)
    return da_BHNCS[..., 0, 0], dq_BHCK if lag else dq_BHCK * e_BHCK, dk_BHCK


def _pairs(x_BHCK, block):
    """Split the chunk into blocks; the earlier and the later of every two, as (B, H, N, C, K)."""
    batch, heads, chunk, dim = x_BHCK.shape
    x_BHN2CK = x_BHCK.reshape(batch, heads, chunk // (2 * block), 2, block, dim)
    return x_BHN2CK[:, :, :, 0], x_BHN2CK[:, :, :, 1]


def _joined(early_BHNCK, late_BHNCK):
    x_BHN2CK = jnp.stack([early_BHNCK, late_BHNCK], axis=3)
    return x_BHN2CK.reshape(*x_BHN2CK.shape[:2], -1, x_BHN2CK.shape[-1])


def suffix_sums(x_BHCK):
    """At each position the sum over it and all later ones of the chunk."""
    inclusive = jnp.tri(x_BHCK.shape[2], dtype=x_BHCK.dtype)
    return jnp.einsum("bhck,ct->bhtk", x_BHCK, inclusive, precision=HIGHEST)


def sum_heads(x_BHCK, groups):
    """Back to (B, C, G, K): the gradient of what the heads of a group share."""
    batch, heads, chunk, dim = x_BHCK.shape
    x_BGCK = x_BHCK.reshape(batch, groups, heads // groups, chunk, dim).sum(2)
    return jnp.swapaxes(x_BGCK, 1, 2)
