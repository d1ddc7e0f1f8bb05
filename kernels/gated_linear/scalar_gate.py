"""One chunk of gated linear attention whose gates are scalars, one a head and token.

Decays are exponentials of sums of gates, never quotients, so any gate is exact and no exponent is
ever positive. The backward pass is written out: it shares the forward pass's pieces and takes the
gates' gradients from products that it has anyway.
"""

import functools

import jax
import jax.numpy as jnp

from kernels import chunks
from kernels.products import HIGHEST

# Gates are summed in two parts, multiples of 1/64 (sums exact in float32) and the rest, so that a
# weak gate behind strong ones keeps its digits. Below -1000 every decay is 0, in float64 too.
GRAIN, FLOOR = 64.0, -1000.0


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def scalar_chunk(scale, lag, s_BGKRV, inputs, within):
    """One chunk; the state's heads lie beside its values, so that a group is one matmul.

    Token t reads S_{t - lag}: with lag 1 neither its own gate nor its own write.
    """
    q_BGCK, k_BGCK, v_BGCRV, g_BGRC = _group(scale, s_BGKRV.dtype, *inputs)
    heads = v_BGCRV.shape[3]
    decay_BGRCS, read_BGCR1, write_BGCR1, keep_BG1R1, _ = decays(g_BGRC, within, lag)
    a_BGCS = jnp.einsum("bgck,bgsk->bgcs", q_BGCK, k_BGCK)
    inner_BGRCV = jnp.einsum(
        "bgrcs,bgrsv->bgrcv", a_BGCS[:, :, None] * decay_BGRCS, jnp.swapaxes(v_BGCRV, 2, 3)
    )
    outer_BGCRV = split_heads(jnp.einsum("bgck,bgkx->bgcx", q_BGCK, merge_heads(s_BGKRV)), heads)
    o_BGCRV = jnp.swapaxes(inner_BGRCV, 2, 3) + read_BGCR1 * outer_BGCRV
    written = jnp.einsum("bgsk,bgsx->bgkx", k_BGCK, merge_heads(v_BGCRV * write_BGCR1))
    after_BGKRV = keep_BG1R1 * s_BGKRV + split_heads(written, heads)
    return after_BGKRV, _ungroup(o_BGCRV, inputs[2])


def _forward(scale, lag, s_BGKRV, inputs, within):
    return scalar_chunk(scale, lag, s_BGKRV, inputs, within), (s_BGKRV, inputs, within)


def _backward(scale, lag, saved, cotangents):
    """Pairs, reads and writes each carry the gates between two positions: see `between`."""
    s_BGKRV, inputs, within = saved
    ds_BGKRV, do = cotangents
    q_BGCK, k_BGCK, v_BGCRV, g_BGRC = _group(scale, s_BGKRV.dtype, *inputs)
    heads = v_BGCRV.shape[3]
    do_BGCRV = jnp.swapaxes(do.reshape(jnp.swapaxes(v_BGCRV, 1, 2).shape), 1, 2)
    do_BGCRV = do_BGCRV.astype(s_BGKRV.dtype)
    do_BGRCV, v_BGRCV = jnp.swapaxes(do_BGCRV, 2, 3), jnp.swapaxes(v_BGCRV, 2, 3)
    decay_BGRCS, read_BGCR1, write_BGCR1, keep_BG1R1, real = decays(g_BGRC, within, lag)
    a_BGCS = jnp.einsum("bgck,bgsk->bgcs", q_BGCK, k_BGCK)
    da_BGRCS = jnp.einsum("bgrcv,bgrsv->bgrcs", do_BGRCV, v_BGRCV) * decay_BGRCS
    pairs_BGRCS = da_BGRCS * a_BGCS[:, :, None]
    da_BGCS = da_BGRCS.sum(2)

    read_do_BGCRV, written_BGCRV = do_BGCRV * read_BGCR1, v_BGCRV * write_BGCR1
    s, ds = merge_heads(s_BGKRV), merge_heads(ds_BGKRV)
    dw_BGCRV = split_heads(jnp.einsum("bgsk,bgkx->bgsx", k_BGCK, ds), heads)
    dq_read_BGCK = jnp.einsum("bgcx,bgkx->bgck", merge_heads(read_do_BGCRV), s)
    dq_BGCK = dq_read_BGCK + jnp.einsum("bgcs,bgsk->bgck", da_BGCS, k_BGCK)
    dk_BGCK = jnp.einsum("bgcs,bgck->bgsk", da_BGCS, q_BGCK)
    dk_BGCK += jnp.einsum("bgsx,bgkx->bgsk", merge_heads(written_BGCRV), ds)
    dv_BGRCV = jnp.einsum("bgrcs,bgrcv->bgrsv", a_BGCS[:, :, None] * decay_BGRCS, do_BGRCV)
    dv_BGCRV = jnp.swapaxes(dv_BGRCV, 2, 3) + write_BGCR1 * dw_BGCRV
    before = jnp.einsum("bgck,bgcx->bgkx", q_BGCK, merge_heads(read_do_BGCRV))
    before_BGKRV = keep_BG1R1 * ds_BGKRV + split_heads(before, heads)

    reads_BGCR = reads(q_BGCK, dq_read_BGCK, read_do_BGCRV, s)
    writes_BGCR = jnp.einsum("bgcrv,bgcrv->bgcr", written_BGCRV, dw_BGCRV)
    kept_BGKR = jnp.einsum("bgkrv,bgkrv->bgkr", s_BGKRV, ds_BGKRV)
    kept_BGR = keep_BG1R1[:, :, 0, :, 0] * kept_BGKR.sum(2)
    reads_BGRC, writes_BGRC = jnp.swapaxes(reads_BGCR, 2, 3), jnp.swapaxes(writes_BGCR, 2, 3)
    dg_BGRC = between(pairs_BGRCS, reads_BGRC, writes_BGRC, lag)
    dg_BGRC = jnp.where(real[:, None, None], dg_BGRC + kept_BGR[..., None], 0)
    gradients = (
        jnp.swapaxes(scale * dq_BGCK, 1, 2),
        jnp.swapaxes(dk_BGCK, 1, 2),
        jnp.swapaxes(dv_BGCRV, 1, 2),
        jnp.moveaxis(dg_BGRC, 3, 1),
    )
    gradients = (d.reshape(x.shape).astype(x.dtype) for d, x in zip(gradients, inputs, strict=True))
    return before_BGKRV, tuple(gradients), None


scalar_chunk.defvjp(_forward, _backward)


def _group(scale, accumulator, q, k, v, log_decay):
    """A chunk's inputs with groups outermost; q scaled."""
    batch, chunk, groups, _ = q.shape
    heads = v.shape[2] // groups
    q_BGCK = scale * jnp.swapaxes(q, 1, 2).astype(accumulator)
    k_BGCK = jnp.swapaxes(k, 1, 2).astype(accumulator)
    v_BGCRV = jnp.swapaxes(v.reshape(batch, chunk, groups, heads, -1), 1, 2).astype(accumulator)
    g_BGRC = jnp.moveaxis(log_decay.reshape(batch, chunk, groups, heads), 1, 3)
    return q_BGCK, k_BGCK, v_BGCRV, g_BGRC.astype(accumulator)


def _ungroup(o_BGCRV, like):
    return jnp.swapaxes(o_BGCRV, 1, 2).reshape(like.shape).astype(like.dtype)


def merge_heads(x_xxxRV):
    """Heads beside values as one matmul dimension."""
    return x_xxxRV.reshape(*x_xxxRV.shape[:-2], -1)


def split_heads(x, heads):
    """The inverse of merging heads: (..., H x V) to (..., H, V)."""
    return x.reshape(*x.shape[:-1], heads, -1)


def decays(g_BGRC, within, lag=0):
    """Decays from position S to C, from the entering state, to the leaving state, and of it.

    The first two are as of position C - lag, where C reads.
    """
    chunk = g_BGRC.shape[-1]
    mask = chunks.masks(within, chunk)
    g_BGRC = jnp.where(mask.real[:, None, None], jnp.maximum(g_BGRC, FLOOR), 0)
    coarse = jnp.round(g_BGRC * GRAIN) / GRAIN
    parts = coarse, g_BGRC - coarse
    write = [_prefix(part, 0) for part in parts]
    read = [_prefix(part, lag) for part in parts] if lag else write
    end = [part[..., -1:] for part in write]

    def decay(later, earlier):
        (coarse, fine), (coarse_before, fine_before) = later, earlier
        return jnp.exp(jnp.minimum((coarse - coarse_before) + (fine - fine_before), 0))

    decay_BGRCS = decay([x[..., None] for x in read], [x[..., None, :] for x in write])
    pair = mask.pair & jnp.tri(chunk, k=-lag, dtype=bool)
    decay_BGRCS = jnp.where(pair[:, None, None], decay_BGRCS, 0)
    read_BGRC = jnp.where(mask.read[:, None, None], jnp.exp(sum(read)), 0)
    write_BGRC = jnp.where(mask.write[:, None, None], decay(end, write), 0)
    keep_BGR = jnp.where(mask.keep[:, None, None], jnp.exp(sum(end))[..., 0], 0)
    read_BGCR1, write_BGCR1 = (jnp.swapaxes(x, 2, 3)[..., None] for x in (read_BGRC, write_BGRC))
    return decay_BGRCS, read_BGCR1, write_BGCR1, keep_BGR[:, :, None, :, None], mask.real


def _prefix(x, lag):
    """Sums up to C - lag; a triangular product is the fastest form on every device."""
    chunk = x.shape[-1]
    return jnp.einsum("...s,cs->...c", x, jnp.tri(chunk, k=-lag, dtype=x.dtype), precision=HIGHEST)


def between(pairs_xCS, reads_xC, writes_xC, lag=0):
    """Sum at gate t what passes it: pairs S < t <= C - lag, reads t <= C - lag, writes S < t."""
    chunk = pairs_xCS.shape[-1]
    strict = jnp.tri(chunk, k=-1, dtype=pairs_xCS.dtype)
    ones = jnp.ones(chunk, pairs_xCS.dtype)
    pairs_xCS = pairs_xCS * strict
    total = functools.partial(jnp.einsum, precision=HIGHEST)
    ends_xC = advance(total("...cs,s->...c", pairs_xCS, ones) + reads_xC, lag, axis=-1)
    starts_xC = total("...cs,c->...s", pairs_xCS, ones)
    inclusive = strict + jnp.eye(chunk, dtype=strict.dtype)
    return total("...c,ct->...t", ends_xC - starts_xC, inclusive) + total(
        "...s,ts->...t", writes_xC, strict
    )


def advance(x, lag, axis):
    """Move every position `lag` earlier; zeros come in at the end."""
    if lag == 0:
        return x
    moved = jnp.roll(x, -lag, axis)
    place = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis % x.ndim)
    return jnp.where(place < x.shape[axis] - lag, moved, 0)


def reads(q_BGCK, dq_BGCK, do_BGCRV, s):
    """Each head's do^T S^T q, where dq = do S^T is summed over the heads of a group."""
    heads = do_BGCRV.shape[3]
    if heads == 1:
        return jnp.einsum("bgck,bgck->bgc", q_BGCK, dq_BGCK)[..., None]
    recalled_BGCRV = split_heads(jnp.einsum("bgck,bgkx->bgcx", q_BGCK, s), heads)
    return jnp.einsum("bgcrv,bgcrv->bgcr", do_BGCRV, recalled_BGCRV)
