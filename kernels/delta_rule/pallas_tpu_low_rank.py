"""One chunk of `dplr` on a TPU core, as `pallas_tpu_chunk` does the delta rule.

Two readers, q after its token's gate and a before it, meet two writers, k that brings v and b that
brings the recalls r_t = a_t^T S_{t-1}. The recalls depend on each other through a unit lower
triangular matrix.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from kernels.delta_rule import pallas_tpu_chunk
from kernels.delta_rule.pallas_tpu_chunk import NN, NT, TN, Marks, only, product


class Pieces(NamedTuple):
    """What both passes need of a chunk."""

    q_RCK: Array  # scaled
    k_RCK: Array
    a_RCK: Array
    b_RCK: Array
    e_RCK: Array
    q_read_RCK: Array  # decayed from the chunk's start
    a_read_RCK: Array
    k_write_RCK: Array  # decayed to its end
    b_write_RCK: Array
    keep_RK1: Array
    read_1C1: Array  # masks
    write_1C1: Array
    qk_RCS: Array  # scores, masked
    qb_RCS: Array
    ak_RCS: Array
    inverse_RCS: Array
    r_RCV: Array
    rest: tuple


def _pieces(scale, narrow, s_RKV, inputs: list, marks: Marks) -> Pieces:
    wide, chunk = s_RKV.dtype, inputs[0].shape[1]
    v_RCV = inputs[2]
    q_RCK, k_RCK, _, a_RCK, b_RCK, g_RCK = (x.astype(wide) for x in inputs)
    q_RCK, e_RCK = scale * q_RCK, jnp.exp(only(marks.real_1C1, g_RCK))
    scores, (q_read_RCK, a_read_RCK), (k_write_RCK, b_write_RCK), keep_RCK, rest = (
        pallas_tpu_chunk.halving(narrow, [q_RCK * e_RCK, a_RCK], [k_RCK, b_RCK], e_RCK)
    )
    row, column = pallas_tpu_chunk.positions(chunk, chunk)
    (qk_RCS, qb_RCS), (ak_RCS, ab_RCS) = scores
    qk_RCS = jnp.where(row == column, jnp.sum(q_RCK * k_RCK, axis=2, keepdims=True), qk_RCS)
    qb_RCS = jnp.where(row == column, jnp.sum(q_RCK * b_RCK, axis=2, keepdims=True), qb_RCS)
    qk_RCS, qb_RCS, ak_RCS, ab_RCS = (
        jnp.where(marks.pair_1CS, x, 0) for x in (qk_RCS, qb_RCS, ak_RCS, ab_RCS)
    )
    one_1C1 = jnp.ones((1, chunk, 1), wide)
    read_1C1, write_1C1 = only(marks.read_1C1, one_1C1), only(marks.write_1C1, one_1C1)
    recalled_RCV = read_1C1 * product(a_read_RCK, s_RKV, NN, narrow)
    recalled_RCV += product(ak_RCS, v_RCV, NN, narrow)
    inverse_RCS = pallas_tpu_chunk.unit_lower_inverse(narrow, -ab_RCS)
    return Pieces(
        q_RCK=q_RCK,
        k_RCK=k_RCK,
        a_RCK=a_RCK,
        b_RCK=b_RCK,
        e_RCK=e_RCK,
        q_read_RCK=q_read_RCK,
        a_read_RCK=a_read_RCK,
        k_write_RCK=k_write_RCK,
        b_write_RCK=b_write_RCK,
        keep_RK1=only(marks.keep_111, pallas_tpu_chunk.as_column(keep_RCK[:, :1])),
        read_1C1=read_1C1,
        write_1C1=write_1C1,
        qk_RCS=qk_RCS,
        qb_RCS=qb_RCS,
        ak_RCS=ak_RCS,
        inverse_RCS=inverse_RCS,
        r_RCV=product(inverse_RCS, recalled_RCV, NN, narrow),
        rest=rest,
    )


def forward(scale, narrow, s_RKV, inputs: list, marks: Marks):
    """(state after the chunk, output); the inputs are q, k, v, a, b and the gate."""
    p, v_RCV = _pieces(scale, narrow, s_RKV, inputs, marks), inputs[2]
    o_RCV = p.read_1C1 * product(p.q_read_RCK, s_RKV, NN, narrow)
    o_RCV += product(p.qk_RCS, v_RCV, NN, narrow) + product(p.qb_RCS, p.r_RCV, NN, narrow)
    written_RKV = product(p.write_1C1 * p.k_write_RCK, v_RCV, TN, narrow)
    written_RKV += product(p.write_1C1 * p.b_write_RCK, p.r_RCV, TN, narrow)
    return p.keep_RK1 * s_RKV + written_RKV, o_RCV


def backward(scale, narrow, s_RKV, inputs: list, marks: Marks, ds_RKV, do_RCV):
    """(gradient of the entering state, those of the inputs).

    r = (I - M)^-1 z: dz is the transposed solve, dM is dz r^T.
    """
    p, v_RCV = _pieces(scale, narrow, s_RKV, inputs, marks), inputs[2]
    row, column = pallas_tpu_chunk.positions(v_RCV.shape[1], v_RCV.shape[1])
    strict_1CS = marks.pair_1CS & (row > column)

    dr_RCV = p.write_1C1 * product(p.b_write_RCK, ds_RKV, NN, narrow)
    dr_RCV += product(p.qb_RCS, do_RCV, TN, narrow)
    dz_RCV = product(p.inverse_RCS, dr_RCV, TN, narrow)
    dv_RCV = p.write_1C1 * product(p.k_write_RCK, ds_RKV, NN, narrow)
    dv_RCV += product(p.qk_RCS, do_RCV, TN, narrow) + product(p.ak_RCS, dz_RCV, TN, narrow)

    values = (v_RCV, p.r_RCV)
    dscores = [
        [jnp.where(mask, product(d, value, NT, narrow), 0) for value in values]
        for d, mask in ((do_RCV, marks.pair_1CS), (dz_RCV, strict_1CS))
    ]
    dreads = [p.read_1C1 * product(d, s_RKV, NT, narrow) for d in (do_RCV, dz_RCV)]
    dwrites = [p.write_1C1 * product(value, ds_RKV, NT, narrow) for value in values]
    before_RKV = p.keep_RK1 * ds_RKV
    before_RKV += product(p.q_read_RCK, p.read_1C1 * do_RCV, TN, narrow)
    before_RKV += product(p.a_read_RCK, p.read_1C1 * dz_RCV, TN, narrow)
    leaving_R1K = jnp.sum(p.k_write_RCK * dwrites[0], axis=1, keepdims=True)
    leaving_R1K += jnp.sum(p.b_write_RCK * dwrites[1], axis=1, keepdims=True)
    kept_RK1 = jnp.sum(p.keep_RK1 * s_RKV * ds_RKV, axis=2, keepdims=True)
    leaving_R1K += pallas_tpu_chunk.as_row(kept_RK1)
    slopes = _gradients(scale, narrow, p, dscores, dreads, dwrites, leaving_R1K)
    dq_RCK, dk_RCK, da_RCK, db_RCK, dg_RCK = slopes
    dg_RCK = only(marks.real_1C1, dg_RCK)
    return before_RKV, (dq_RCK, dk_RCK, dv_RCV, da_RCK, db_RCK, dg_RCK)


def _gradients(scale, narrow, p: Pieces, dscores, dreads, dwrites, leaving_R1K):
    """Of q, k, a, b and the gate. The diagonal has no gate in it, and a's own gate is not in a."""
    row, column = pallas_tpu_chunk.positions(p.q_RCK.shape[1], p.q_RCK.shape[1])
    (dq_RCK, da_RCK), (dk_RCK, db_RCK) = pallas_tpu_chunk.halving_backward(
        narrow, dscores, dreads, dwrites, p.rest
    )
    dq_RCK = dq_RCK * p.e_RCK
    to_k_RC1, to_b_RC1 = (
        jnp.sum(jnp.where(row == column, d, 0), axis=2, keepdims=True) for d in dscores[0]
    )
    passed_RCK = p.a_RCK * da_RCK
    dg_RCK = pallas_tpu_chunk.suffix_sums(
        p.q_RCK * dq_RCK + passed_RCK - p.k_RCK * dk_RCK - p.b_RCK * db_RCK
    )
    return (
        scale * (dq_RCK + to_k_RC1 * p.k_RCK + to_b_RC1 * p.b_RCK),
        dk_RCK + to_k_RC1 * p.q_RCK,
        da_RCK,
        db_RCK + to_b_RC1 * p.q_RCK,
        dg_RCK + leaving_R1K - passed_RCK,
    )
