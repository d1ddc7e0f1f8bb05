"""One chunk with vector gates inside a TPU kernel: the halving of vector_gate.py on whole matrices.

At level n positions are in blocks of 2^n. q holds the decays since its block began, k those until
its block ends, so one product of the two is right wherever C's block and S's are the two halves of
a block of the next level; the matrix unit computes the other entries too, and they are dropped.
That is 7 products of a whole chunk of 128, and no sum of gates that could lose digits.

The state is (V, X), transposed, so that a head's decays multiply its lanes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.gated_linear.pallas_tpu_chunk import (
    Form,
    Mask,
    across,
    beside,
    by_head,
    down,
    part,
    rounded_as,
    spread,
    sum_heads,
)
from kernels.gated_linear.scalar_gate import advance
from kernels.products import exact_product


class Level(NamedTuple):
    """q and k at one level, as products take them, and what they are multiplied by for the next."""

    q_CX: jax.Array
    k_CX: jax.Array
    late_CX: jax.Array  # the decay of the block before; 1 in the first of two blocks
    early_CX: jax.Array  # the decay of the block behind; 1 in the second


def forward(form: Form, mask: Mask, q_CX, k_CX, v_CX, g_CX, s_VX):
    """(o, leaving state)."""
    dot = rounded_as(q_CX, k_CX, v_CX)
    q_CX, k_CX, e_CX = widened(form, mask, q_CX, k_CX, g_CX, s_VX.dtype)
    scores, qe_CX, ke_CX, keep_1X, _ = halving(form, dot, q_CX, k_CX, e_CX)
    qe_CX, ke_CX = mask.read_C1 * qe_CX, mask.write_C1 * ke_CX
    outs, written = [], []
    for h in range(form.heads):
        v_SV = part(v_CX, form.value, h)
        inner = dot("cs,sv->cv", jnp.where(mask.pair_CS, scores[h], 0), v_SV)
        outs.append(inner + dot("ck,vk->cv", part(qe_CX, form.key, h), part(s_VX, form.key, h)))
        written.append(dot("sv,sk->vk", v_SV, part(ke_CX, form.key, h)))
    return beside(outs), mask.keep_11 * keep_1X * s_VX + beside(written)


def backward(form: Form, mask: Mask, q_CX, k_CX, v_CX, g_CX, s_VX, do_CX, ds_VX):
    """(dq, dk, dv, dg, gradient of the entering state)."""
    dot = rounded_as(q_CX, k_CX, v_CX)
    q_CX, k_CX, e_CX = widened(form, mask, q_CX, k_CX, g_CX, s_VX.dtype)
    scores, qe_CX, ke_CX, keep_1X, levels = halving(form, dot, q_CX, k_CX, e_CX)
    qe_CX, ke_CX, keep_1X = mask.read_C1 * qe_CX, mask.write_C1 * ke_CX, mask.keep_11 * keep_1X
    das, dvs, dqes, dkes, befores = ([] for _ in range(5))
    for h in range(form.heads):
        do_CV, v_SV = part(do_CX, form.value, h), part(v_CX, form.value, h)
        s_VK, ds_VK = part(s_VX, form.key, h), part(ds_VX, form.key, h)
        a_CS = jnp.where(mask.pair_CS, scores[h], 0)
        das.append(jnp.where(mask.pair_CS, dot("cv,sv->cs", do_CV, v_SV), 0))
        dvs.append(
            dot("cs,cv->sv", a_CS, do_CV) + dot("sk,vk->sv", part(ke_CX, form.key, h), ds_VK)
        )
        dqes.append(dot("cv,vk->ck", do_CV, s_VK))
        dkes.append(dot("sv,vk->sk", v_SV, ds_VK))
        befores.append(dot("cv,ck->vk", do_CV, part(qe_CX, form.key, h)))
    dqe_CX, dke_CX = mask.read_C1 * beside(dqes), mask.write_C1 * beside(dkes)
    dq_CX, dk_CX, ends_CX, starts_CX = halving_backward(form, dot, das, dqe_CX, dke_CX, levels)
    dq_CX = dq_CX if form.lag else dq_CX * e_CX

    written_CX = ke_CX * dke_CX
    kept_1X = keep_1X * (s_VX * ds_VX).sum(axis=0, keepdims=True)
    ends_CX = advance(ends_CX + qe_CX * dqe_CX, form.lag, axis=0)
    dg_CX = suffix_sums(ends_CX - starts_CX - written_CX)
    dg_CX = mask.real_C1 * (dg_CX + written_CX.sum(axis=0, keepdims=True) + kept_1X)
    own_CS = down(*das[0].shape) == across(*das[0].shape)
    own_CH = beside([jnp.where(own_CS, da_CS, 0).sum(axis=1, keepdims=True) for da_CS in das])
    own_CX = spread(own_CH, form.key)
    dq_CX = sum_heads(form, form.scale * (dq_CX + own_CX * k_CX))
    dk_CX = sum_heads(form, dk_CX + own_CX * q_CX)
    return dq_CX, dk_CX, beside(dvs), dg_CX, keep_1X * ds_VX + beside(befores)


def widened(form: Form, mask: Mask, q_CX, k_CX, g_CX, dtype):
    """q, scaled, and k for every head, and the gates' exponentials."""
    e_CX = jnp.exp(mask.real_C1 * g_CX.astype(dtype))
    return form.scale * by_head(form, q_CX, dtype), by_head(form, k_CX, dtype), e_CX


def halving(form: Form, dot, q_CX, k_CX, e_CX):
    """(scores by head, q decayed from the chunk's start, k to its end, the chunk's decay, levels).

    Scores mean something up to the diagonal; with lag 1, below it.
    """
    chunk, rounded = e_CX.shape[0], dot.keywords["dtype"]
    apart_CS, row_CX = down(chunk, chunk) ^ across(chunk, chunk), down(*e_CX.shape)

    def scores(q_CX, k_CX):
        heads = range(form.heads)
        return [dot("ck,sk->cs", part(q_CX, form.key, h), part(k_CX, form.key, h)) for h in heads]

    found, levels = scores(q_CX, k_CX), []
    q_CX, keep_CX = q_CX if form.lag else q_CX * e_CX, e_CX
    for n in range(chunk.bit_length() - 1):
        late = (row_CX >> n) & 1 == 1
        before, behind = jnp.roll(keep_CX, 1 << n, axis=0), jnp.roll(keep_CX, -(1 << n), axis=0)
        late_CX, early_CX = jnp.where(late, before, 1), jnp.where(late, 1, behind)
        level = Level(q_CX.astype(rounded), k_CX.astype(rounded), late_CX, early_CX)
        met_CS = apart_CS >> n == 1
        crossing = scores(level.q_CX, level.k_CX)
        found = [jnp.where(met_CS, new, old) for new, old in zip(crossing, found, strict=True)]
        q_CX, k_CX = q_CX * late_CX, k_CX * early_CX
        keep_CX = keep_CX * late_CX * early_CX
        levels.append(level)
    return found, q_CX, k_CX, keep_CX[:1], levels


def halving_backward(form: Form, dot, das, dq_CX, dk_CX, levels):
    """(dq, dk, what q dq ends of pairs, what k dk starts of them).

    q and k are those that entered the first level; the diagonal's share is left out. Ends and
    starts are of the rounded numbers that both products had: where no gate lies between a pair's
    ends the two must cancel.
    """
    chunk = dq_CX.shape[0]
    apart_CS = down(chunk, chunk) ^ across(chunk, chunk)
    ends_CX = starts_CX = jnp.zeros_like(dq_CX)
    for n, level in reversed(list(enumerate(levels))):
        crossing = [jnp.where(apart_CS >> n == 1, da_CS, 0) for da_CS in das]
        of_q, of_k = [], []
        for h, da_CS in enumerate(crossing):
            of_q.append(dot("cs,sk->ck", da_CS, part(level.k_CX, form.key, h)))
            of_k.append(dot("cs,ck->sk", da_CS, part(level.q_CX, form.key, h)))
        ends_CX += beside(of_q) * level.q_CX
        starts_CX += beside(of_k) * level.k_CX
        dq_CX = dq_CX * level.late_CX + beside(of_q)
        dk_CX = dk_CX * level.early_CX + beside(of_k)
    return dq_CX, dk_CX, ends_CX, starts_CX


def suffix_sums(x_CX):
    """At each position the sum over it and all later ones."""
    square = x_CX.shape[0], x_CX.shape[0]
    return exact_product("tc,cx->tx", across(*square) >= down(*square), x_CX, x_CX.dtype)
