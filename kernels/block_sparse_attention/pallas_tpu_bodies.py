"""What the TPU kernels of block-sparse attention do in one step: scores, masks and products.

Letters: R the queries of all heads that share a list, S the keys that a step visits (or, where
keys are the owners, R the queries that it visits and S the owner's keys).
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.block_sparse_attention import pallas_tpu_schedule as schedule
from kernels.products import precision, sum_type

FAR = 1 << 30  # the position of a key that is not there


class Plan(NamedTuple):
    """What is fixed at compile time."""

    length: int
    queries: int  # of a query block, of each head
    keys: int  # of a key block
    lists: int  # per key head
    heads: int  # that share a list
    causal: bool
    window: int
    scale: float
    fine: int  # keys that one bit stands for; 0 without bits
    packed: bool

    @property
    def rows(self) -> int:
        """Queries of all heads that share a list."""
        return self.heads * self.queries

    @property
    def count(self) -> int:
        """Query blocks of a row."""
        return math.ceil(self.length / self.queries)

    @property
    def words(self) -> int:
        """Words of bits of a key block."""
        return math.ceil(self.keys // self.fine / schedule.WORD) if self.fine else 0


class Walk(NamedTuple):
    """One pass: its steps, and over which axes (row, key head) its scalars differ."""

    steps: int
    each: int
    owners: tuple[int, int]
    members: tuple[int, int]

    def owner(self, owner, b, g, s):
        """The block whose results step s of row b and key head g adds to."""
        return owner[_unit(self.owners, b, g) * self.steps + s]

    def member(self, member, b, g, s, e):
        """The e-th block that the step visits, -1 for none."""
        return member[(_unit(self.members, b, g) * self.steps + s) * self.each + e]

    def visited(self, member, b, g, s, e):
        """The same for index maps: 0 for none. Plain arithmetic, which NumPy and JAX share."""
        found = self.member(member, b, g, s, e)
        return found * (found >= 0)


def _unit(axes: tuple[int, int], b, g):
    rows, heads = axes
    return (b if rows > 1 else 0) * heads + (g if heads > 1 else 0)


class _Step(NamedTuple):
    """Where a body stands: its owner, its members (-1: none) and its place among the owner's."""

    owner: Any
    members: list
    is_first: Any
    is_last: Any

    @property
    def has_work(self):
        return functools.reduce(jnp.maximum, self.members) >= 0


def _step(walk: Walk, owner, member) -> _Step:
    b, g, s = (pl.program_id(axis) for axis in range(3))
    own = walk.owner(owner, b, g, s)
    last = walk.steps - 1
    return _Step(
        own,
        [walk.member(member, b, g, s, e) for e in range(walk.each)],
        (s == 0) | (walk.owner(owner, b, g, jnp.maximum(s - 1, 0)) != own),
        (s == last) | (walk.owner(owner, b, g, jnp.minimum(s + 1, last)) != own),
    )


def forward_body(plan: Plan, walk: Walk, owner, member, *refs):
    """One step of the online softmax; at a query block's last, its output, maxima and sums."""
    refs = list(refs)
    *refs, out_ref, stats_ref, top_ref, sum_ref, o_ref = refs
    step = _step(walk, owner, member)
    q_ref, *refs = refs

    @pl.when(step.is_first)
    def _():
        # The lowest finite number, not -inf: exp(-inf - -inf) is NaN in rows that see nothing.
        top_ref[...] = jnp.full_like(top_ref, jnp.finfo(top_ref.dtype).min)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        o_ref[...] = jnp.zeros_like(o_ref)

    @pl.when(step.has_work)
    def _():
        k_SK, v_SV = (_together(refs[n * walk.each :][: walk.each]) for n in (0, 1))
        s_RS = _dot(q_ref[...], k_SK, 1, 1) + _hidden_down(plan, walk, step, refs[2 * walk.each :])
        top_R1 = jnp.maximum(top_ref[...], jnp.max(s_RS, axis=1, keepdims=True))
        # Scaled after the subtraction: the top key's power is then 1 to the last bit.
        p_RS = jnp.exp(plan.scale * (s_RS - top_R1))
        keep_R1 = jnp.exp(plan.scale * (top_ref[...] - top_R1))
        sum_ref[...] = keep_R1 * sum_ref[...] + jnp.sum(p_RS, axis=1, keepdims=True)
        o_ref[...] = keep_R1 * o_ref[...] + _dot(p_RS.astype(v_SV.dtype), v_SV, 1, 0)
        top_ref[...] = top_R1

    @pl.when(step.is_last)
    def _():
        sum_R1 = jnp.where(sum_ref[...] > 0, sum_ref[...], 1)
        out_ref[...] = (o_ref[...] / sum_R1).astype(out_ref.dtype)
        stats_ref[...] = _as_rows([top_ref[...], sum_R1])


def dq_body(plan: Plan, walk: Walk, owner, member, *refs):
    """A few key blocks' share of dq; at a query block's last step, dq."""
    *refs, dq_ref, scratch = refs
    step = _step(walk, owner, member)
    q_ref, do_ref, stats_ref, delta_ref, *refs = refs

    @pl.when(step.is_first)
    def _():
        scratch[...] = jnp.zeros_like(scratch)

    @pl.when(step.has_work)
    def _():
        k_SK, v_SV = (_together(refs[n * walk.each :][: walk.each]) for n in (0, 1))
        top_R1, sum_R1 = _as_columns(stats_ref[...])
        (delta_R1,) = _as_columns(delta_ref[...])
        s_RS = _dot(q_ref[...], k_SK, 1, 1) + _hidden_down(plan, walk, step, refs[2 * walk.each :])
        p_RS = jnp.exp(plan.scale * (s_RS - top_R1)) / sum_R1
        dp_RS = _dot(do_ref[...], v_SV, 1, 1)
        ds_RS = p_RS * (dp_RS - delta_R1) * _share(plan, sum_R1)
        scratch[...] += _dot(ds_RS.astype(k_SK.dtype), k_SK, 1, 0)

    @pl.when(step.is_last)
    def _():
        dq_ref[...] = scratch[...].astype(dq_ref.dtype)


def dkv_body(plan: Plan, walk: Walk, owner, member, *refs):
    """A few query blocks' share of dk and dv; at a key block's last step, both."""
    *refs, dk_ref, dv_ref, dk_scratch, dv_scratch = refs
    step = _step(walk, owner, member)
    k_ref, v_ref, *refs = refs

    @pl.when(step.is_first)
    def _():
        dk_scratch[...] = jnp.zeros_like(dk_scratch)
        dv_scratch[...] = jnp.zeros_like(dv_scratch)

    @pl.when(step.has_work)
    def _():
        parts = [refs[n * walk.each :][: walk.each] for n in range(4)]
        q_RK, do_RV = (_together(part) for part in parts[:2])
        stats_2R, delta_1R = (_together(part, axis=1) for part in parts[2:])
        top_1R, sum_1R = stats_2R[:1], stats_2R[1:]
        s_SR = _dot(k_ref[...], q_RK, 1, 1) + _hidden_across(
            plan, walk, step, refs[4 * walk.each :]
        )
        p_SR = jnp.exp(plan.scale * (s_SR - top_1R)) / sum_1R
        dv_scratch[...] += _dot(p_SR.astype(do_RV.dtype), do_RV, 1, 0)
        dp_SR = _dot(v_ref[...], do_RV, 1, 1)
        ds_SR = p_SR * (dp_SR - delta_1R) * _share(plan, sum_1R)
        dk_scratch[...] += _dot(ds_SR.astype(q_RK.dtype), q_RK, 1, 0)

    @pl.when(step.is_last)
    def _():
        dk_ref[...] = dk_scratch[...].astype(dk_ref.dtype)
        dv_ref[...] = dv_scratch[...].astype(dv_ref.dtype)


def _share(plan: Plan, total):
    """The scale; 0 where the softmax is 1 on one key to the last bit.

    The gradient of such scores is the difference of two equal sums that were rounded apart.
    """
    return jnp.where(total == 1, 0, plan.scale).astype(total.dtype)


def _hidden_down(plan: Plan, walk: Walk, step: _Step, refs):
    """(R, S): 0 where a query sees a key, -inf elsewhere; queries of the owner down."""
    refs, size = list(refs), (plan.queries, plan.keys)
    q_doc = _as_columns(refs.pop(0)[...])[0] if plan.packed else None
    k_docs = [refs.pop(0)[...] for _ in range(walk.each)] if plan.packed else [None] * walk.each
    q_at = step.owner % plan.count * plan.queries + _iota(size, 0)
    found = []
    for m, k_doc in zip(step.members, k_docs, strict=True):
        k_at = jnp.where(m < 0, FAR, m * plan.keys) + _iota(size, 1)
        seen = _sees(plan, q_at, k_at, q_doc, k_doc)
        if plan.fine:
            words = _words(plan, refs[0], m)
            columns = [_as_columns(word)[0] for word in words]
            seen &= _has_bit(plan, columns, size, 1)
        found.append(seen)
    hidden = [jnp.where(seen, 0.0, -jnp.inf) for seen in found]
    return jnp.concatenate([jnp.concatenate(hidden, axis=1)] * plan.heads, axis=0)


def _hidden_across(plan: Plan, walk: Walk, step: _Step, refs):
    """(S, R): the same with keys of the owner down and queries of the members across."""
    refs, size = list(refs), (plan.keys, plan.queries)
    k_doc = _as_columns(refs.pop(0)[...])[0] if plan.packed else None
    q_docs = [refs.pop(0)[...] for _ in range(walk.each)] if plan.packed else [None] * walk.each
    k_at = step.owner * plan.keys + _iota(size, 0)
    found = []
    for e, (m, q_doc) in enumerate(zip(step.members, q_docs, strict=True)):
        q_at = m % plan.count * plan.queries + _iota(size, 1)
        seen = _sees(plan, q_at, jnp.where(m < 0, FAR, k_at), q_doc, k_doc)
        if plan.fine:
            seen &= _has_bit(plan, _words(plan, refs[e], step.owner), size, 0)
        found += [jnp.where(seen, 0.0, -jnp.inf)] * plan.heads
    return jnp.concatenate(found, axis=1)


def _sees(plan: Plan, q_at, k_at, q_doc, k_doc):
    seen = k_at <= q_at if plan.causal else k_at < plan.length
    if plan.window:
        seen &= q_at - k_at < plan.window
    if plan.packed:
        seen &= q_doc == k_doc
    return seen


def _words(plan: Plan, bits_ref, block) -> list:
    """The rows (1, X) of words that say which queries chose which parts of a key block."""
    at = jnp.maximum(block, 0) * plan.words
    return [bits_ref[pl.ds(at + w, 1), :] for w in range(plan.words)]


def _has_bit(plan: Plan, words: list, size: tuple[int, int], axis: int):
    """Whether the bit of each key's part is set, keys along `axis`."""
    part = _iota(size, axis) // plan.fine
    word = jnp.broadcast_to(words[0], size)
    for w, other in enumerate(words[1:], 1):
        word = jnp.where(part >= w * schedule.WORD, jnp.broadcast_to(other, size), word)
    return jax.lax.shift_right_logical(word, part % schedule.WORD) & 1 == 1


def _together(refs, axis: int = 0):
    blocks = [ref[...] for ref in refs]
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=axis)


def _as_columns(x_NR) -> list:
    """Each row (1, R) of a few as a column (R, 1)."""
    count, size = x_NR.shape
    rows = jnp.concatenate([x_NR, jnp.zeros((8 - count, size), x_NR.dtype)], axis=0)
    columns = rows.T
    return [columns[:, n : n + 1] for n in range(count)]


def _as_rows(columns: list):
    """A few columns (R, 1) as the rows of one array."""
    size, lane = columns[0].shape[0], _iota((columns[0].shape[0], 128), 1)
    found = jnp.zeros((size, 128), columns[0].dtype)
    for n, column in enumerate(columns):
        found = jnp.where(lane == n, column, found)
    return found.T[: len(columns)]


def _iota(size: tuple[int, int], axis: int):
    return jax.lax.broadcasted_iota(jnp.int32, size, axis)


def _dot(a, b, over_a: int, over_b: int):
    return jax.lax.dot_general(
        a,
        b,
        (((over_a,), (over_b,)), ((), ())),
        precision=precision(a, b),
        preferred_element_type=sum_type(a, b),
    )
