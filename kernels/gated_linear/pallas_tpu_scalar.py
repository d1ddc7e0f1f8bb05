"""One chunk with scalar gates inside a TPU kernel: the mathematics of scalar_gate.py on matrices.

The state is (K, X): heads lie beside one another as their values do, so that what a group of heads
reads and writes is one product.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.gated_linear.pallas_tpu_chunk import (
    Form,
    Mask,
    across,
    beside,
    down,
    gather,
    part,
    rounded_as,
    spread,
)
from kernels.gated_linear.scalar_gate import FLOOR, GRAIN
from kernels.products import exact_product


class Sums(NamedTuple):
    """Sums of gates from the chunk's start, each as [coarse, fine]: see scalar_gate.py."""

    read_CH: list[jax.Array]  # up to C - lag
    write_SH: list[jax.Array]  # up to S
    write_HS: list[jax.Array]


class Pairs(NamedTuple):
    """What the products of a group's pairs of positions give, backward."""

    da_CS: jax.Array  # of the scores, which the heads share
    dv_SX: jax.Array
    ends_CH: jax.Array  # by reading position, of pairs that pass gates
    starts_HS: jax.Array  # the same by writing position


def forward(form: Form, mask: Mask, q_CX, k_CX, v_CX, g_HC, s_KX):
    """(o, leaving state)."""
    dot = rounded_as(q_CX, k_CX, v_CX)
    sums = prefix(form, mask, g_HC)
    read_CX, write_CX, keep_1X = factors(form, mask, sums)
    written_CX = write_CX * v_CX
    outs, states = [], []
    for group in range(form.groups):
        ours = values_of(form, group)
        q_CK, k_SK = part(q_CX, form.key, group), part(k_CX, form.key, group)
        a_CS = dot("ck,sk->cs", q_CK, k_SK)
        inner = [
            dot("cs,sv->cv", a_CS * decay(form, mask, sums, h), part(v_CX, form.value, h))
            for h in form.members(group)
        ]
        outs.append(beside(inner) + ours(read_CX) * dot("ck,kx->cx", q_CK, ours(s_KX)))
        states.append(dot("sk,sx->kx", k_SK, ours(written_CX)))
    return beside(outs), keep_1X * s_KX + beside(states)


def backward(form: Form, mask: Mask, q_CX, k_CX, v_CX, g_HC, s_KX, do_CX, ds_KX):
    """(dq, dk, dv, dg, gradient of the entering state)."""
    dot = rounded_as(q_CX, k_CX, v_CX)
    sums = prefix(form, mask, g_HC)
    read_CX, write_CX, keep_1X = factors(form, mask, sums)
    read_do_CX, written_CX = read_CX * do_CX, write_CX * v_CX
    dqs, dks, dvs, befores, recalled, dws, ends, starts = ([] for _ in range(8))
    for group in range(form.groups):
        ours = values_of(form, group)
        q_CK, k_SK = part(q_CX, form.key, group), part(k_CX, form.key, group)
        pairs = pairs_backward(form, mask, sums, group, q_CK, k_SK, v_CX, do_CX)
        s, ds, read_do = ours(s_KX), ours(ds_KX), ours(read_do_CX)
        dqs.append(dot("cs,sk->ck", pairs.da_CS, k_SK) + dot("cx,kx->ck", read_do, s))
        dks.append(dot("cs,ck->sk", pairs.da_CS, q_CK) + dot("sx,kx->sk", ours(written_CX), ds))
        dvs.append(pairs.dv_SX)
        befores.append(dot("ck,cx->kx", q_CK, read_do))
        recalled.append(dot("ck,kx->cx", q_CK, s))
        dws.append(dot("sk,kx->sx", k_SK, ds))
        ends.append(pairs.ends_CH)
        starts.append(pairs.starts_HS)
    kept_1X = (keep_1X * s_KX * ds_KX).sum(axis=0, keepdims=True)
    dg_HC = between(
        ends_CH=beside(ends) + gather(read_do_CX * beside(recalled), form.heads),
        starts_HS=jnp.concatenate(starts, axis=0),
        writes_SH=gather(written_CX * beside(dws), form.heads),
        kept_1H=gather(kept_1X, form.heads),
        lag=form.lag,
    )
    dv_CX = beside(dvs) + write_CX * beside(dws)
    before_KX = keep_1X * ds_KX + beside(befores)
    return beside(dqs), beside(dks), dv_CX, dg_HC * mask.real_1C, before_KX


def pairs_backward(form, mask, sums, group, q_CK, k_SK, v_CX, do_CX) -> Pairs:
    """The share of the pairs S <= C of a chunk, head by head."""
    dot = rounded_as(q_CK, k_SK, v_CX)
    a_CS = dot("ck,sk->cs", q_CK, k_SK)
    da_CS, dvs, ends, starts = jnp.zeros_like(a_CS), [], [], []
    strict_CS = down(*a_CS.shape) > across(*a_CS.shape)
    for h in form.members(group):
        do_CV, v_SV = part(do_CX, form.value, h), part(v_CX, form.value, h)
        decay_CS = decay(form, mask, sums, h)
        dvs.append(dot("cs,cv->sv", a_CS * decay_CS, do_CV))
        mine_CS = dot("cv,sv->cs", do_CV, v_SV) * decay_CS
        da_CS += mine_CS
        passing_CS = jnp.where(strict_CS, mine_CS * a_CS, 0)
        ends.append(passing_CS.sum(axis=1, keepdims=True))
        starts.append(passing_CS.sum(axis=0, keepdims=True))
    return Pairs(da_CS, beside(dvs), beside(ends), jnp.concatenate(starts, axis=0))


def values_of(form: Form, group: int):
    """Takes a group's lanes out of what is as wide as the values of all heads."""
    members = form.members(group)
    return functools.partial(part, width=form.value, first=members[0], count=len(members))


def prefix(form: Form, mask: Mask, g_HC) -> Sums:
    """By a triangle of ones, since the compiler has no running sum."""
    square = g_HC.shape[1], g_HC.shape[1]
    g_HC = jnp.maximum(g_HC, FLOOR) * mask.real_1C
    coarse = jnp.round(g_HC * GRAIN) / GRAIN
    parts = coarse, g_HC - coarse
    including = down(*square) >= across(*square)
    sums = [exact_product("hs,cs->hc", x, including, g_HC.dtype) for x in parts]
    before = [x - form.lag * own for x, own in zip(sums, parts, strict=True)]
    return Sums([x.T for x in before], [x.T for x in sums], sums)


def decay(form: Form, mask: Mask, sums: Sums, h: int):
    """scale times the decay from S to C - lag, 0 where C does not read what S wrote."""
    coarse, fine = (
        read[:, h : h + 1] - write[h : h + 1]
        for read, write in zip(sums.read_CH, sums.write_HS, strict=True)
    )
    return jnp.where(mask.pair_CS, form.scale * jnp.exp(jnp.minimum(coarse + fine, 0)), 0)


def factors(form: Form, mask: Mask, sums: Sums):
    """(scale times the decay of the entering state to C - lag, from S to the end, of the state)."""
    read_CH = form.scale * mask.read_C1 * jnp.exp(sum(sums.read_CH))
    coarse, fine = (x[-1:] - x for x in sums.write_SH)
    write_CH = mask.write_C1 * jnp.exp(jnp.minimum(coarse + fine, 0))
    keep_1H = mask.keep_11 * jnp.exp(sum(x[-1:] for x in sums.write_SH))
    return tuple(spread(x, form.value) for x in (read_CH, write_CH, keep_1H))


def between(ends_CH, starts_HS, writes_SH, kept_1H, lag: int):
    """Sum at gate t what passes it: from S < t to C >= t + lag, the chunk's edges included."""
    square = starts_HS.shape[1], starts_HS.shape[1]
    exact = functools.partial(exact_product, dtype=starts_HS.dtype)
    position, gate = down(*square), across(*square)
    ended = exact("ch,ct->ht", ends_CH, position >= gate + lag)
    started = exact("hs,st->ht", starts_HS, position >= gate)
    written = exact("sh,st->ht", writes_SH, position < gate)
    kept = exact("ch,ct->ht", kept_1H, jnp.ones((1, square[1])))
    return ended - started + written + kept
