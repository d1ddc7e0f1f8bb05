"""Attention over the visible pairs of blocks, with a backward pass of its own."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from kernels import segments as packed
from kernels import vary
from kernels.attention import scores
from kernels.products import product, sum_type

SCORE_BYTES = 8 << 20
ROWS = 512
CHUNK_ROWS = 32


class Joined(NamedTuple):
    """What joins the scores of a cache: all None where it is off."""

    sinks: Float[Array, " H"] | None
    bias_q: Float[Array, "B C H"] | None
    bias_k: Float[Array, "B S H"] | None


class Plan(NamedTuple):
    """What is fixed at compile time: who sees whom, and the blocks of `rows` x `cols` scores."""

    length: int
    rows: int
    cols: int
    causal: bool
    window: int
    scale: float
    softcap: float


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    *,
    segments: Int[Array, "B T"] | None = None,
    causal: bool = True,
    window: int = 0,
    sinks: Float[Array, " H"] | None = None,
    softcap: float = 0.0,
    log_forget: Float[Array, "B T H"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B T H V"]:
    """FlashAttention-2 (arXiv:2307.08691, algorithms 1 and 2) as scans over pairs of blocks.

    Only pairs that hold a visible score are computed, and only pairs cut by the diagonal, the
    window or the end are masked (all are when `segments` is given).
    """
    scale = float(q.shape[3] ** -0.5 if scale is None else scale)
    arrays = q, k, v, segments, sinks, log_forget
    q, k, v, segments, sinks, log_forget = vary.together(arrays)
    rows, cols = block_sizes(q.shape[0] * q.shape[2], q.shape[1], window)
    plan = Plan(q.shape[1], rows, cols, causal, window, scale, softcap)
    common = jnp.result_type(q, k, v)
    padding = -plan.length % rows
    given = [_pad(x.astype(common), padding) for x in (q, k, v)]
    wide = sum_type(given[0])
    sinks = None if sinks is None else sinks.astype(wide)
    sums = None
    if log_forget is not None:
        sums = scores.forget_sums(log_forget.astype(wide), segments)
        sums = tuple(_pad(x, padding) for x in sums)
    docs = None if segments is None else _documents(segments, padding)
    out = _flash(*given, sinks, sums, docs, plan)
    return out[:, : plan.length].astype(v.dtype)  # pyright: ignore[reportIndexIssue]


def cached_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    *,
    positions: Int[Array, "B T"],
    kv_positions: Int[Array, "B S"],
    segments: Int[Array, "B T"] | None = None,
    kv_segments: Int[Array, "B S"] | None = None,
    window: int = 0,
    sinks: Float[Array, " H"] | None = None,
    softcap: float = 0.0,
    bias_q: Float[Array, "B T H"] | None = None,
    bias_k: Float[Array, "B S H"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B T H V"]:
    """Whole rows of scores, for at most a chunk of queries at a time; a scan if there are more.

    The backward pass of a scan forms each chunk's scores again.
    """
    (batch, length, heads, _), slots = q.shape, k.shape[1]
    scale = float(q.shape[3] ** -0.5 if scale is None else scale)
    common = jnp.result_type(q, k, v)
    q_BTHK, k_BSGK, v_BSGV = (x.astype(common) for x in (q, k, v))

    def attend(q_BCHK, position_BC, segment_BC, bias_BCH):
        visible_BCS = _visible_slots(position_BC, kv_positions, segment_BC, kv_segments, window)
        given = q_BCHK, k_BSGK, v_BSGV, visible_BCS, Joined(sinks, bias_BCH, bias_k)
        return _attend(*given, scale=scale, softcap=softcap).astype(v.dtype)

    count = math.ceil(length / max(SCORE_BYTES // (4 * batch * heads * slots), CHUNK_ROWS))
    if count == 1:
        return attend(q_BTHK, positions, segments, bias_q)

    def split(x):
        pad = [(0, 0), (0, -length % count)] + [(0, 0)] * (x.ndim - 2)
        return rearrange(jnp.pad(x, pad), "b (n c) ... -> n b c ...", n=count)

    def step(_, chunk):
        return None, jax.checkpoint(attend, prevent_cse=False)(*chunk)

    chunks = jax.tree.map(split, (q_BTHK, positions, segments, bias_q))
    _, out_NBCHV = jax.lax.scan(step, None, chunks)
    return rearrange(out_NBCHV, "n b c h v -> b (n c) h v")[:, :length]


def block_sizes(batch_heads: int, length: int, window: int) -> tuple[int, int]:
    """(rows, cols) of a block; cols divides rows.

    About an eighth of the row, so that little is computed above the diagonal; no more than the
    window; and about SCORE_BYTES of scores at most.
    """
    rows = min(ROWS, max(128, length // 8))
    if window:
        rows = min(rows, max(64, window))
    while rows > 128 and batch_heads * rows * min(rows, 256) * 4 > SCORE_BYTES:
        rows //= 2
    count = math.ceil(length / rows)
    if count == 1:
        return length, length
    rows = math.ceil(length / count / 32) * 32
    return rows, rows // 2 if rows > 256 else rows


def _documents(segments: Int[Array, "B T"], padding: int) -> Int[Array, "B S"]:
    """The document of each token, -1 at padding."""
    docs = jnp.where(packed.is_real(segments), packed.ordinals(segments), -1)
    return jnp.pad(docs, ((0, 0), (0, padding)), constant_values=-1)


def _pad(x: Array, padding: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2)) if padding else x


def block_pairs(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """(pairs seen in full, pairs cut by a mask), each (n, 2): block of queries, block of keys."""
    blocks = math.ceil(plan.length / plan.rows)
    i, j = np.meshgrid(np.arange(blocks), np.arange(blocks * plan.rows // plan.cols), indexing="ij")
    first_q, last_q = i * plan.rows, np.minimum((i + 1) * plan.rows, plan.length) - 1
    first_k, last_k = j * plan.cols, (j + 1) * plan.cols - 1
    seen, full = first_k < plan.length, last_k < plan.length
    if plan.causal:
        seen &= first_k <= last_q
        full &= last_k <= first_q
    if plan.window:
        seen &= first_q - last_k < plan.window
        full &= last_q - first_k < plan.window
    pairs = np.stack([i, j], axis=-1).astype(np.int32)
    return pairs[seen & full], pairs[seen & ~full]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _flash(
    q: Array,
    k: Array,
    v: Array,
    sinks: Array | None,
    sums: tuple[Array, Array] | None,
    docs: Array | None,
    plan: Plan,
) -> Array:
    return _forward(q, k, v, sinks, sums, docs, plan)[0]


def _forward(q, k, v, sinks, sums, docs, plan):
    """(out, residuals): for each pair of blocks one step of the online softmax."""
    wide = sum_type(q)
    groups, repeats = k.shape[2], q.shape[2] // k.shape[2]
    q_NBGCK = _blocks(q, plan.rows, groups)
    k_NBGSK, v_NBGSV = (_blocks(x, plan.cols, groups) for x in (k, v))
    seen = _visible(plan, docs, repeats, q_axis=-2)
    score, unit = _score(plan, sums, groups, q_axis=-2)

    def step(cut, carry, pair):
        top_NBGC1, sum_NBGC1, o_NBGCV = carry
        i, j = pair
        s_BGCS = score(product("bgck,bgsk->bgcs", _at(q_NBGCK, i), _at(k_NBGSK, j)), i, j)
        if cut or docs is not None:
            s_BGCS = jnp.where(seen(i, j, cut), s_BGCS, -jnp.inf)
        before_BGC1 = _at(top_NBGC1, i)
        top_BGC1 = jnp.maximum(before_BGC1, jnp.max(s_BGCS, axis=-1, keepdims=True))
        # Scaled after the subtraction: the top key's power is then 1 to the last bit.
        p_BGCS = jnp.exp(unit * (s_BGCS - top_BGC1))
        keep_BGC1 = jnp.exp(unit * (before_BGC1 - top_BGC1))
        sum_BGC1 = keep_BGC1 * _at(sum_NBGC1, i) + jnp.sum(p_BGCS, axis=-1, keepdims=True)
        o_BGCV = product("bgcs,bgsv->bgcv", p_BGCS.astype(v.dtype), _at(v_NBGSV, j))
        o_BGCV += keep_BGC1 * _at(o_NBGCV, i)
        new = (top_BGC1, sum_BGC1, o_BGCV)
        return tuple(_put(a, b, i) for a, b in zip(carry, new, strict=True)), None

    # The lowest finite number, not -inf: exp(-inf - -inf) is NaN in rows that see nothing.
    one_NBGC1 = jnp.ones((*q_NBGCK.shape[:-1], 1), wide)
    zero_NBGCV = jnp.zeros((*q_NBGCK.shape[:-1], v.shape[3]), wide)
    start_NBGC1 = jnp.finfo(wide).min * one_NBGC1
    if sinks is not None:  # the first key of every row, with value zero
        start_NBGC1 = one_NBGC1 * jnp.repeat(sinks.reshape(groups, repeats, 1), plan.rows, 1) / unit
    carry = (start_NBGC1, (0 if sinks is None else 1) * one_NBGC1, zero_NBGCV)
    for pairs, cut in zip(block_pairs(plan), (False, True), strict=True):
        carry = _scan(functools.partial(step, cut), vary.like(carry, q), pairs)
    top_NBGC1, sum_NBGC1, o_NBGCV = carry
    sum_NBGC1 = jnp.where(sum_NBGC1 > 0, sum_NBGC1, 1)
    out = _rows(o_NBGCV / sum_NBGC1, plan.rows)
    lse_NBGC1 = unit * top_NBGC1 + jnp.log(sum_NBGC1)
    sure_NBGC1 = sum_NBGC1 == 1
    if sinks is not None:
        sure_NBGC1 &= top_NBGC1 > start_NBGC1
    return out.astype(v.dtype), (q, k, v, sinks, sums, docs, out, lse_NBGC1, sure_NBGC1)


def _backward(plan, residuals, d_out):
    """The gradients, from scores computed again with keys down and queries across.

    Of its five products only one (dq) then contracts over the leading axis of the scores, which
    is the slow way on a CPU; with queries down it would be two. Where the softmax is 1 on one key
    to the last bit, the gradient of the scores is set to zero: it is the difference of two equal
    sums that were rounded apart.
    """
    q, k, v, sinks, sums, docs, out, lse_NBGC1, sure_NBGC1 = residuals
    groups, repeats = k.shape[2], q.shape[2] // k.shape[2]
    delta = jnp.sum(d_out.astype(out.dtype) * out, axis=-1, keepdims=True)
    q_NBGCK, d_NBGCV = (_blocks(x, plan.rows, groups) for x in (q, d_out))
    k_NBGSK, v_NBGSV = (_blocks(x, plan.cols, groups) for x in (k, v))
    k_NBGKS = jax.lax.optimization_barrier(k_NBGSK.swapaxes(-1, -2))
    lse_NBG1C = lse_NBGC1.swapaxes(-1, -2)
    mixed_NBG1C = jnp.where(sure_NBGC1, 0, 1).astype(out.dtype).swapaxes(-1, -2)
    delta_NBG1C = _blocks(delta, plan.rows, groups).swapaxes(-1, -2)
    seen = _visible(plan, docs, repeats, q_axis=-1)
    score, unit = _score(plan, sums, groups, q_axis=-1)

    def step(cut, carry, pair):
        i, j = pair
        q_BGCK, d_BGCV = _at(q_NBGCK, i), _at(d_NBGCV, i)
        a_BGSC = product("bgsk,bgck->bgsc", _at(k_NBGSK, j), q_BGCK)
        s_BGSC = unit * score(a_BGSC, i, j) - _at(lse_NBG1C, i)
        if cut or docs is not None:
            s_BGSC = jnp.where(seen(i, j, cut), s_BGSC, -jnp.inf)
        p_BGSC = jnp.exp(s_BGSC)
        dp_BGSC = product("bgsv,bgcv->bgsc", _at(v_NBGSV, j), d_BGCV)
        ds_BGSC = p_BGSC * (dp_BGSC - _at(delta_NBG1C, i)) * _at(mixed_NBG1C, i)
        at_query, at_key = {}, {}
        if sinks is not None:
            at_query["delta"] = jnp.sum(p_BGSC * dp_BGSC, axis=2)
        if sums is not None:
            ds_BGSRC = rearrange(ds_BGSC, "b g s (r c) -> b g s r c", r=repeats)
            at_query["sums"], at_key["sums"] = jnp.sum(ds_BGSRC, axis=2), -jnp.sum(ds_BGSRC, axis=4)
        if plan.softcap:
            ds_BGSC *= scores.slope(plan.scale * a_BGSC, plan.softcap)
        ds_BGSC = ds_BGSC.astype(q.dtype)
        at_query["q"] = product("bgks,bgsc->bgkc", _at(k_NBGKS, j), ds_BGSC)
        at_key["k"] = product("bgsc,bgck->bgsk", ds_BGSC, q_BGCK)
        at_key["v"] = product("bgsc,bgcv->bgsv", p_BGSC.astype(q.dtype), d_BGCV)
        return (_add(carry[0], at_query, i), _add(carry[1], at_key, j)), None

    zeros = functools.partial(jnp.zeros, dtype=sum_type(q))
    at_queries = {"q": zeros(q_NBGCK.swapaxes(-1, -2).shape)}
    at_keys = {"k": zeros(k_NBGSK.shape), "v": zeros(v_NBGSV.shape)}
    if sinks is not None:
        at_queries["delta"] = zeros(q_NBGCK.shape[:-1])
    if sums is not None:
        at_queries["sums"] = zeros((*q_NBGCK.shape[:3], repeats, plan.rows))
        at_keys["sums"] = zeros((*k_NBGSK.shape[:4], repeats))
    carry = at_queries, at_keys
    for pairs, cut in zip(block_pairs(plan), (False, True), strict=True):
        by_keys = pairs[np.argsort(pairs[:, 1], kind="stable")]
        carry = _scan(functools.partial(step, cut), vary.like(carry, q), by_keys)
    return _gradients(plan, residuals, *carry)


def _gradients(plan, residuals, at_queries, at_keys):
    """The sums over blocks in the shapes and types of the inputs.

    The sinks' gradient sums over all queries and may nearly cancel: its delta comes from weights
    that were not rounded to the type of `v`, as those of the output were.
    """
    q, k, v, sinks, _, _, _, lse_NBGC1, _ = residuals
    dq = plan.scale * _rows(at_queries["q"].swapaxes(-1, -2), plan.rows)
    dk, dv = plan.scale * _rows(at_keys["k"], plan.cols), _rows(at_keys["v"], plan.cols)
    d_sinks, d_sums = None, None
    if sinks is not None:
        both = lse_NBGC1, at_queries["delta"][..., None]
        d_sinks = scores.sink_slopes(sinks, *(_rows(x, plan.rows)[..., 0] for x in both))
    if "sums" in at_queries:
        d_high = rearrange(at_queries["sums"], "n b g r c -> b (n c) (g r)")
        d_high += rearrange(at_keys["sums"], "n b g s r -> b (n s) (g r)")
        d_sums = d_high, jnp.zeros_like(d_high)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), d_sinks, d_sums, None


_flash.defvjp(_forward, _backward)


def _blocks(x_BTHK: Array, size: int, groups: int) -> Array:
    """(B, T, H, K) -> (N, B, G, H/G x size, K): the heads of a group become rows."""
    return rearrange(x_BTHK, "b (n c) (g r) k -> n b g (r c) k", c=size, g=groups)


def _rows(x_NBGCK: Array, size: int) -> Array:
    """The inverse of `_blocks`."""
    return rearrange(x_NBGCK, "n b g (r c) k -> b (n c) (g r) k", c=size)


def _at(x: Array, i: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)


def _put(x: Array, block: Array, i: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(x, block, i, 0)


def _add(arrays: dict, blocks: dict, i: Array) -> dict:
    return {name: _put(x, _at(x, i) + blocks[name], i) for name, x in arrays.items()}


def _scan(step: Callable, carry: tuple, pairs: np.ndarray) -> tuple:
    if len(pairs) == 0:
        return carry
    return jax.lax.scan(step, carry, (pairs[:, 0], pairs[:, 1]))[0]


def _score(plan: Plan, sums: tuple | None, groups: int, *, q_axis: int) -> tuple[Callable, float]:
    """(the function (products, i, j) -> scores of a pair of blocks, the scores' unit)."""
    if not plan.softcap and sums is None:
        return lambda a, i, j: a, plan.scale
    bias = None if sums is None else _forgotten(plan, sums, groups, q_axis)

    def score(a, i, j):
        s = plan.scale * a
        if plan.softcap:
            s = scores.capped(s, plan.softcap)
        return s if bias is None else s + bias(i, j)

    return score, 1.0


def _forgotten(plan: Plan, sums: tuple, groups: int, q_axis: int) -> Callable:
    """The function (i, j) -> sum of the gates between the queries and the keys of two blocks."""
    order = "n b g r 1 c" if q_axis == -2 else "n b g c r 1"
    keys = [rearrange(x, f"b (n c) (g r) -> {order}", c=plan.cols, g=groups) for x in sums]
    order = "n b g r c 1" if q_axis == -2 else "n b g 1 r c"
    queries = [rearrange(x, f"b (n c) (g r) -> {order}", c=plan.rows, g=groups) for x in sums]
    heads = "b g r c s -> b g (r c) s" if q_axis == -2 else "b g s r c -> b g s (r c)"

    def bias(i, j):
        high, low = (_at(q, i) - _at(k, j) for q, k in zip(queries, keys, strict=True))
        return rearrange(high + low, heads)

    return bias


def _visible(plan: Plan, docs: Array | None, repeats: int, *, q_axis: int) -> Callable:
    """The function (i, j, cut) -> mask of one pair of blocks, queries along `q_axis` (-2 or -1)."""
    k_axis = -3 - q_axis
    row, col = np.tile(np.arange(plan.rows), repeats), np.arange(plan.cols)

    def inside(i, j):
        q_pos = jnp.expand_dims(i * plan.rows + row, k_axis)
        k_pos = jnp.expand_dims(j * plan.cols + col, q_axis)
        visible = k_pos < plan.length
        if plan.causal:
            visible &= k_pos <= q_pos
        if plan.window:
            visible &= q_pos - k_pos < plan.window
        return visible

    if docs is None:
        return lambda i, j, cut: inside(i, j)
    q_doc_NBC = jnp.tile(rearrange(docs, "b (n c) -> n b c", c=plan.rows), repeats)
    k_doc_NBS = rearrange(docs, "b (n s) -> n b s", s=plan.cols)

    def mask(i, j, cut):
        q_doc = jnp.expand_dims(_at(q_doc_NBC, i)[:, None], k_axis)
        k_doc = jnp.expand_dims(_at(k_doc_NBS, j)[:, None], q_axis)
        visible = (q_doc == k_doc) & (k_doc >= 0)
        return visible & inside(i, j) if cut else visible

    return mask


def _visible_slots(position_BC, kv_positions, segment_BC, kv_segments, window) -> Array:
    """(B, C, S): which slots of the cache each query sees."""
    distance_BCS = position_BC[:, :, None] - kv_positions[:, None, :]
    visible_BCS = (kv_positions[:, None, :] >= 0) & (distance_BCS >= 0)
    if window:
        visible_BCS &= distance_BCS < window
    if segment_BC is not None:
        visible_BCS &= segment_BC[:, :, None] == kv_segments[:, None, :]
        visible_BCS &= segment_BC[:, :, None] != 0
    return visible_BCS


def _attend(q_BCHK: Array, *others, scale: float, softcap: float) -> Array:
    """Softmax attention by its definition, in the products' wide type."""
    settings = {"scale": scale, "softcap": softcap}
    if q_BCHK.shape[1] > 1:
        return _attend_by_group(q_BCHK, *others, **settings)
    return jax.lax.platform_dependent(
        q_BCHK,
        *others,
        cpu=functools.partial(_attend_across_groups, **settings),
        default=functools.partial(_attend_by_group, **settings),
    )


def _attend_by_group(q_BCHK, k_BSGK, v_BSGV, visible_BCS, joined, **settings):
    q_BCGRK = rearrange(q_BCHK, "b c (g r) k -> b c g r k", g=k_BSGK.shape[2])
    a_BGRCS = product("bcgrk,bsgk->bgrcs", q_BCGRK, k_BSGK)
    a_BHCS = rearrange(a_BGRCS, "b g r c s -> b (g r) c s")
    p_BHCS, sum_BHC1 = _powers(a_BHCS, visible_BCS, joined, **settings)
    p_BGRCS = p_BHCS.astype(v_BSGV.dtype).reshape(a_BGRCS.shape)
    o_BGRCV = product("bgrcs,bsgv->bgrcv", p_BGRCS, v_BSGV)
    o_BGRCV /= sum_BHC1.reshape(*a_BGRCS.shape[:-1], 1)
    return rearrange(o_BGRCV, "b g r c v -> b c (g r) v")


def _attend_across_groups(q_B1HK, k_BSGK, v_BSGV, visible_B1S, joined, **settings):
    """One query: each head as a row over all groups' keys, zero outside its own group.

    XLA on a CPU copies a whole cache to bring the group in front of the slot. Multiplying by
    zeros instead is free as long as reading the cache is what takes the time.
    """
    own_GJ = jnp.eye(k_BSGK.shape[2], dtype=k_BSGK.dtype)
    q_BGRK = rearrange(q_B1HK, "b 1 (g r) k -> b g r k", g=k_BSGK.shape[2])
    q_BHX = rearrange(jnp.einsum("bgrk,gj->bgrjk", q_BGRK, own_GJ), "b g r j k -> b (g r) (j k)")
    a_BHS = product("bhx,bsx->bhs", q_BHX, rearrange(k_BSGK, "b s g k -> b s (g k)"))
    p_BH1S, sum_BH11 = _powers(a_BHS[:, :, None], visible_B1S, joined, **settings)
    v_BSX = rearrange(v_BSGV, "b s g v -> b s (g v)")
    o_BHX = product("bhs,bsx->bhx", p_BH1S[:, :, 0].astype(v_BSX.dtype), v_BSX) / sum_BH11[:, :, 0]
    o_BGRJV = rearrange(o_BHX, "b (g r) (j v) -> b g r j v", g=own_GJ.shape[0], j=own_GJ.shape[0])
    return rearrange(jnp.einsum("bgrjv,gj->bgrv", o_BGRJV, own_GJ), "b g r v -> b 1 (g r) v")


def _powers(
    a_BHCS: Array, visible_BCS: Array, joined: Joined, *, scale: float, softcap: float
) -> tuple[Array, Array]:
    """(exp(scores - max) where visible, their sum or 1 if it is 0), over the last axis."""
    wide, visible_B1CS = a_BHCS.dtype, visible_BCS[:, None]
    sinks, bias_q, bias_k = (None if x is None else x.astype(wide) for x in joined)
    s_BHCS = scale * a_BHCS
    if softcap:
        s_BHCS = scores.capped(s_BHCS, softcap)
    bias_BHC1 = 0 if bias_q is None else rearrange(bias_q, "b c h -> b h c 1")
    bias_BH1S = 0 if bias_k is None else rearrange(bias_k, "b s h -> b h 1 s")
    s_BHCS += bias_BHC1 + bias_BH1S  # the biases first: large ones may cancel
    s_BHCS = jnp.where(visible_B1CS, s_BHCS, jnp.finfo(wide).min)
    top_BHC1 = jnp.max(s_BHCS, axis=-1, keepdims=True)
    if sinks is not None:
        top_BHC1 = jnp.maximum(top_BHC1, sinks[:, None, None])
    top_BHC1 = jax.lax.stop_gradient(top_BHC1)
    p_BHCS = jnp.where(visible_B1CS, jnp.exp(s_BHCS - top_BHC1), 0)
    sum_BHC1 = jnp.sum(p_BHCS, axis=-1, keepdims=True)
    if sinks is not None:
        sum_BHC1 += jnp.exp(sinks[:, None, None] - top_BHC1)
    return p_BHCS, jnp.where(sum_BHC1 > 0, sum_BHC1, 1)
