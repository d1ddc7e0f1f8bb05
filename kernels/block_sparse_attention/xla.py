"""Block-sparse attention: the chosen blocks gathered for a chunk of query blocks at a time."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from kernels import segments as packed
from kernels import vary
from kernels.block_sparse_attention import lists
from kernels.products import product, sum_type

CHUNK_BYTES = 4 << 20
FAR = np.iinfo(np.int32).max  # the position of a key that is not there
QUERY_PADDING, KEY_PADDING = -1, -2  # documents that equal no other


class Plan(NamedTuple):
    """What is fixed at compile time: block sizes, the mask's rules, list entries of one product."""

    block: int
    query_block: int
    causal: bool
    window: int
    scale: float
    entries: int = 1


class Places(NamedTuple):
    """Where queries or keys stand: positions, and documents (None: all are one)."""

    position: Int[Array, "..."]
    document: Int[Array, "..."] | None


def block_sparse_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    indices: Int[Array | np.ndarray, "C L N M"],
    *,
    block: int,
    query_block: int = 0,
    segments: Int[Array, "B T"] | None = None,
    causal: bool = True,
    window: int = 0,
    scale: float | None = None,
) -> Float[Array, "B T H V"]:
    """FLOPs follow the lists' length; blocks that a query cannot see cost as empty entries do."""
    batch, length = q.shape[:2]
    plan = _plan(q, block, query_block or block, causal, window, scale)
    edges = lists.reach(length, plan.query_block, block, causal, window)
    time = jnp.tile(jnp.arange(length, dtype=jnp.int32), (batch, 1))
    queries = keys = Places(time, None)
    if segments is not None:
        document, real = packed.ordinals(segments), packed.is_real(segments)
        queries = Places(time, jnp.where(real, document, QUERY_PADDING))
        keys = Places(time, jnp.where(real, document, KEY_PADDING))
    return _attend(q, k, v, indices, edges, queries, keys, plan)


def cached_block_sparse_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    indices: Int[Array | np.ndarray, "C L N M"],
    *,
    block: int,
    positions: Int[Array, "B T"],
    kv_positions: Int[Array, "B S"],
    query_block: int = 1,
    segments: Int[Array, "B T"] | None = None,
    kv_segments: Int[Array, "B S"] | None = None,
    window: int = 0,
    scale: float | None = None,
) -> Float[Array, "B T H V"]:
    """As `block_sparse_attention`, with places taken from the arguments."""
    plan = _plan(q, block, query_block, True, window, scale)
    count = math.ceil(q.shape[1] / query_block)
    last = math.ceil(k.shape[1] / block)
    edges = np.zeros(count, np.int32), np.full(count, last, np.int32)
    queries = keys = None
    if segments is not None and kv_segments is not None:
        queries = jnp.where(packed.is_real(segments), segments, QUERY_PADDING)
        keys = jnp.where(packed.is_real(kv_segments), kv_segments, KEY_PADDING)
    filled = jnp.where(kv_positions >= 0, kv_positions, FAR)
    places = Places(positions, queries), Places(filled, keys)
    return _attend(q, k, v, indices, edges, *places, plan)


def _plan(q, block, query_block, causal, window, scale) -> Plan:
    scale = float(q.shape[3] ** -0.5 if scale is None else scale)
    return Plan(block, query_block, causal, window, scale)


def _attend(q, k, v, indices, edges, queries: Places, keys: Places, plan: Plan) -> Array:
    """The groups of rows one after another, each with lists of its own width."""
    length, blocks = q.shape[1], math.ceil(k.shape[1] / plan.block)
    first, end = edges
    chosen = lists.distinct(indices, first, end, blocks)
    chosen, found = lists.groups(chosen, first, end, blocks)
    chosen_BLNM = _per_group(jnp.asarray(chosen), q.shape[0], k.shape[2])
    common = jnp.result_type(q, k, v)
    chosen_BLNM, queries, keys, q, k, v = vary.together(
        (chosen_BLNM, queries, keys, *(x.astype(common) for x in (q, k, v)))
    )
    keys = Places(
        _cut(keys.position, plan.block, FAR),
        None if keys.document is None else _cut(keys.document, plan.block, KEY_PADDING),
    )
    k_BGNX, v_BGNX = (rearrange(_cut(x, plan.block), "b n s g k -> b g n (s k)") for x in (k, v))
    by_row = jax.tree.map(functools.partial(_cut, size=plan.query_block), (q, queries))
    outs = []
    for rows, width in found:
        own, named = by_row, chosen_BLNM[..., :width].swapaxes(1, 2)
        if len(found) > 1:
            own, named = jax.tree.map(lambda x, rows=rows: x[:, rows], (own, named))
        outs.append(_group(own, named, k_BGNX, v_BGNX, keys, plan))
    out_BNCHV = jnp.concatenate(outs, axis=1)
    if len(found) > 1:
        out_BNCHV = out_BNCHV[:, np.argsort(np.concatenate([rows for rows, _ in found]))]
    return rearrange(out_BNCHV, "b n c h v -> b (n c) h v")[:, :length].astype(v.dtype)


def _per_group(chosen, batch: int, groups: int) -> Array:
    """Lists for every row of the batch, and at least one a key head."""
    count = max(chosen.shape[1], groups)
    return jnp.broadcast_to(chosen, (batch, count, *chosen.shape[2:]))


def _group(by_row, chosen_BNLM, k_BGNX, v_BGNX, keys, plan) -> Array:
    """(B, N, C, H, V) of the N query blocks of one group, some of them in each step of a scan."""
    q_BNCHK, queries = by_row
    (batch, count, rows, heads, key_dim), groups = q_BNCHK.shape, k_BGNX.shape[1]
    named, width = chosen_BNLM.shape[2:]
    values = v_BGNX.shape[3] // plan.block
    entry = 4 * batch * plan.block * (heads * rows + named * (key_dim + values))
    entries = min(width, max(1, CHUNK_BYTES // entry))
    most = min(count, max(1, CHUNK_BYTES // (entry * width)))
    size = min(range(most, most // 2, -1), key=lambda size: -count % size)
    plan = plan._replace(entries=math.ceil(width / math.ceil(width / entries)))
    none = k_BGNX.shape[2]
    missing = -width % plan.entries
    chosen_BNLM = jnp.pad(chosen_BNLM, ((0, 0),) * 3 + ((0, missing),), constant_values=none)
    chosen_BNLM = _lengthen(chosen_BNLM, size, none)
    q_BNCHK, queries = jax.tree.map(lambda x: _lengthen(x, size), (q_BNCHK, queries))
    each = named // groups
    q_JBGPCXK = rearrange(
        q_BNCHK, "b (j c) x (g p r) k -> j b g p c (r x) k", c=size, g=groups, p=each
    )
    chosen_JBGPCM = rearrange(chosen_BNLM, "b (j c) (g p) m -> j b g p c m", c=size, g=groups)
    queries = jax.tree.map(lambda x: rearrange(x, "b (j c) x -> j b c x", c=size), queries)
    out_JBGPCXV = _flash(q_JBGPCXK, k_BGNX, v_BGNX, chosen_JBGPCM, queries, keys, plan)
    out_BNCHV = rearrange(out_JBGPCXV, "j b g p c (r x) v -> b (j c) x (g p r) v", x=rows)
    return out_BNCHV[:, :count]  # pyright: ignore[reportIndexIssue]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _flash(q, k, v, chosen, queries, keys, plan):
    return _forward(q, k, v, chosen, queries, keys, plan)[0]


def _forward(q_JBGPCXK, k_BGNX, v_BGNX, chosen_JBGPCM, queries, keys, plan):
    """(out, residuals): a step of the online softmax for every `plan.entries` of a list."""
    wide = sum_type(q_JBGPCXK)
    one_BGPCX1 = vary.like(jnp.ones((*q_JBGPCXK.shape[1:-1], 1), wide), q_JBGPCXK)
    zero_BGPCXV = one_BGPCX1 * jnp.zeros(v_BGNX.shape[3] // plan.block, wide)

    def chunk(_, given):
        q_BGPCXK, chosen_BGPCM, here = given

        def step(carry, named_BGPCM):
            top_BGPCX1, sum_BGPCX1, o_BGPCXV = carry
            k_BGPCSK, v_BGPCSV = (_gather(x, named_BGPCM, plan) for x in (k_BGNX, v_BGNX))
            s_BGPCXS = product("bgpcxk,bgpcsk->bgpcxs", q_BGPCXK, k_BGPCSK)
            seen_BGPCXS = _visible(here, keys, named_BGPCM, q_BGPCXK.shape[-2], plan)
            s_BGPCXS = jnp.where(seen_BGPCXS, s_BGPCXS, -jnp.inf)
            new_BGPCX1 = jnp.maximum(top_BGPCX1, jnp.max(s_BGPCXS, axis=-1, keepdims=True))
            # Scaled after the subtraction: the top key's power is then 1 to the last bit.
            p_BGPCXS = jnp.exp(plan.scale * (s_BGPCXS - new_BGPCX1))
            keep_BGPCX1 = jnp.exp(plan.scale * (top_BGPCX1 - new_BGPCX1))
            sum_BGPCX1 = keep_BGPCX1 * sum_BGPCX1 + jnp.sum(p_BGPCXS, axis=-1, keepdims=True)
            o_BGPCXV = keep_BGPCX1 * o_BGPCXV
            o_BGPCXV += product("bgpcxs,bgpcsv->bgpcxv", p_BGPCXS.astype(v_BGNX.dtype), v_BGPCSV)
            return (new_BGPCX1, sum_BGPCX1, o_BGPCXV), None

        # The lowest finite number, not -inf: exp(-inf - -inf) is NaN in rows that see nothing.
        carry = (jnp.finfo(wide).min * one_BGPCX1, 0 * one_BGPCX1, zero_BGPCXV)
        carry, _ = jax.lax.scan(step, carry, _parts(chosen_BGPCM, plan))
        top_BGPCX1, sum_BGPCX1, o_BGPCXV = carry
        sum_BGPCX1 = jnp.where(sum_BGPCX1 > 0, sum_BGPCX1, 1)
        return None, (o_BGPCXV / sum_BGPCX1, top_BGPCX1, sum_BGPCX1)

    _, (out, top, total) = jax.lax.scan(chunk, None, (q_JBGPCXK, chosen_JBGPCM, queries))
    saved = (q_JBGPCXK, k_BGNX, v_BGNX, chosen_JBGPCM, queries, keys, out, top, total)
    return out.astype(v_BGNX.dtype), saved


def _backward(plan, saved, d_out):
    """The gradients, from scores computed again; those of keys are added where they were gathered.

    Where the softmax is 1 on one key to the last bit, the gradient of the scores is set to zero:
    it is the difference of two equal sums that were rounded apart.
    """
    q_JBGPCXK, k_BGNX, v_BGNX, chosen_JBGPCM, queries, keys, out, top, total = saved
    delta = jnp.sum(d_out.astype(out.dtype) * out, axis=-1, keepdims=True)
    dtype = k_BGNX.dtype

    def chunk(carry, given):
        q_BGPCXK, chosen_BGPCM, here, d_BGPCXV, delta_BGPCX1, top_BGPCX1, sum_BGPCX1 = given
        share_BGPCX1 = jnp.where(sum_BGPCX1 == 1, 0, plan.scale)

        def step(carry, named_BGPCM):
            dq_BGPCXK, dk_BGNX, dv_BGNX = carry
            k_BGPCSK, v_BGPCSV = (_gather(x, named_BGPCM, plan) for x in (k_BGNX, v_BGNX))
            s_BGPCXS = product("bgpcxk,bgpcsk->bgpcxs", q_BGPCXK, k_BGPCSK)
            seen_BGPCXS = _visible(here, keys, named_BGPCM, q_BGPCXK.shape[-2], plan)
            s_BGPCXS = jnp.where(seen_BGPCXS, s_BGPCXS, -jnp.inf)
            p_BGPCXS = jnp.exp(plan.scale * (s_BGPCXS - top_BGPCX1)) / sum_BGPCX1
            dp_BGPCXS = product("bgpcxv,bgpcsv->bgpcxs", d_BGPCXV, v_BGPCSV)
            ds_BGPCXS = (p_BGPCXS * (dp_BGPCXS - delta_BGPCX1) * share_BGPCX1).astype(dtype)
            dq_BGPCXK += product("bgpcxs,bgpcsk->bgpcxk", ds_BGPCXS, k_BGPCSK)
            dk_BGPCSK = product("bgpcxs,bgpcxk->bgpcsk", ds_BGPCXS, q_BGPCXK)
            dv_BGPCSV = product("bgpcxs,bgpcxv->bgpcsv", p_BGPCXS.astype(dtype), d_BGPCXV)
            dk_BGNX = _scatter(dk_BGNX, dk_BGPCSK, named_BGPCM)
            dv_BGNX = _scatter(dv_BGNX, dv_BGPCSV, named_BGPCM)
            return (dq_BGPCXK, dk_BGNX, dv_BGNX), None

        start = vary.like(jnp.zeros(q_BGPCXK.shape, out.dtype), q_BGPCXK)
        (dq_BGPCXK, *carry), _ = jax.lax.scan(step, (start, *carry), _parts(chosen_BGPCM, plan))
        return tuple(carry), dq_BGPCXK

    carry = tuple(vary.like(jnp.zeros(x.shape, out.dtype), x) for x in (k_BGNX, v_BGNX))
    given = (q_JBGPCXK, chosen_JBGPCM, queries, d_out, delta, top, total)
    (dk_BGNX, dv_BGNX), dq_JBGPCXK = jax.lax.scan(chunk, carry, given)
    return *(x.astype(dtype) for x in (dq_JBGPCXK, dk_BGNX, dv_BGNX)), None, None, None


_flash.defvjp(_forward, _backward)


def _gather(x_BGNX: Array, named_BGPCM: Array, plan: Plan) -> Array:
    """(B, G, P, C, M x block, K): the named blocks, any block where none is named."""
    flat_BGM = named_BGPCM.reshape(*named_BGPCM.shape[:2], -1)
    take = lambda x, at: jnp.take(x, at, axis=0, mode="clip")
    found = jax.vmap(jax.vmap(take))(x_BGNX, flat_BGM)
    return found.reshape(*named_BGPCM.shape[:4], named_BGPCM.shape[4] * plan.block, -1)


def _scatter(x_BGNX: Array, more_BGPCSK: Array, named_BGPCM: Array) -> Array:
    """`x` with `more` added to the named blocks."""
    flat_BGM = named_BGPCM.reshape(*named_BGPCM.shape[:2], -1)
    more_BGMX = more_BGPCSK.reshape(*flat_BGM.shape, -1)
    add = lambda x, at, more: x.at[at].add(more, mode="drop")
    return jax.vmap(jax.vmap(add))(x_BGNX, flat_BGM, more_BGMX)


def _visible(here: Places, keys: Places, named_BGPCM: Array, rows: int, plan: Plan) -> Array:
    """(B, G, P, C, X, S): which keys of the named blocks each query sees."""

    def of_keys(x_BNS, nothing):
        take = lambda x, at: jnp.take(x, at, axis=0, mode="fill", fill_value=nothing)
        found = jax.vmap(take)(x_BNS, named_BGPCM.reshape(named_BGPCM.shape[0], -1))
        return found.reshape(*named_BGPCM.shape[:4], 1, -1)

    def of_queries(x_BCX):
        x_BCX = jnp.tile(x_BCX, rows // plan.query_block)
        return x_BCX[:, None, None, :, :, None]

    k_at, q_at = of_keys(keys.position, FAR), of_queries(here.position)
    seen = k_at <= q_at if plan.causal else k_at < FAR
    if plan.window:
        seen &= q_at - k_at < plan.window
    if keys.document is not None:
        seen &= of_keys(keys.document, KEY_PADDING) == of_queries(here.document)
    return seen


def _parts(chosen_BGPCM: Array, plan: Plan) -> Array:
    return rearrange(chosen_BGPCM, "b g p c (i m) -> i b g p c m", m=plan.entries)


def _cut(x: Array, size: int, fill=0) -> Array:
    """(B, T, ...) -> (B, N, size, ...), the end filled up."""
    return rearrange(_lengthen(x, size, fill), "b (n c) ... -> b n c ...", c=size)


def _lengthen(x: Array, size: int, fill=0) -> Array:
    missing = -x.shape[1] % size
    pad = ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2)
    return jnp.pad(x, pad, constant_values=fill) if missing else x
