"""Block-sparse attention as TPU kernels: chosen blocks are copied where they lie, never gathered.

Three kernels, each a walk along the steps of `visits` for every row and key head:

- forward: a step brings a few chosen key blocks of one query block into VMEM and does one step of
  the online softmax on them together; the sums and the output stay in scratch until the query
  block's last step. Beside the output two numbers a query are kept, the largest score and the sum
  of powers.
- gradient of q: the same walk with the scores computed again, dq in scratch.
- gradients of k and v: the walk the other way round. A step brings a few of the query blocks that
  chose one key block; scores lie with keys down and queries across, dk and dv stay in scratch.

The lists travel ahead as scalars and choose the blocks that are copied. Steps without a block
compute nothing. Where fewer than `LEAST_QUERIES` share a list, as where every token chooses for
itself, single lists would leave the matrix unit idle; then a tile of queries visits spans of key
blocks that any of them chose, and bits say who chose what.

Queries of the heads that share a list are the rows of one product. XLA lays the arrays out once as
(row, key head, block, position, dim).
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels import segments as packed
from kernels import tpu
from kernels.block_sparse_attention import lists, visits

LEAST_QUERIES, LEAST_KEYS = 16, 8  # of blocks that are taken singly
ROWS, COLUMNS = 512, 512  # scores of one step, about
LONG = 32768  # tokens, above which spans are twice as wide: half the steps
MOST_BLOCKS = 8  # copied in one step
MOST_ENTRIES = 256  # of a list whose bits are taken
SCALAR_BYTES = 768 << 10  # of lists, of a TPU's 1 MiB of scalar memory
FAR = 1 << 30  # the position of a key that is not there
QUERY_PADDING, KEY_PADDING = -1, -2  # documents that equal no other


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
        return math.ceil(self.keys // self.fine / visits.WORD) if self.fine else 0


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


def uncovered(
    function: str, q, k, v, indices, *, block, query_block=0, causal=True, window=0, **others
) -> str:
    """Why the kernels do not serve this call; "" where they do."""
    query_block, given = query_block or block, (causal, window)
    plan, single = _plan(q, k, indices, block, query_block, *given, 1.0, False)
    entries = indices.shape[3]
    if plan.fine and entries > MOST_ENTRIES:
        return (
            f"{entries} entries a list for {query_block} queries; the most are {MOST_ENTRIES} "
            f"for less than {LEAST_QUERIES} queries or blocks of less than {LEAST_KEYS} keys"
        )
    if plan.keys < LEAST_KEYS:
        return f"block {block} has no divisor from {LEAST_KEYS} to {COLUMNS}"
    prepare = functools.partial(_visits, plan, single, block, query_block)
    found = (
        prepare(indices) if isinstance(indices, np.ndarray) else jax.eval_shape(prepare, indices)
    )
    down, across, _ = found
    lengths = (x.shape[2] for x in (down.owner, down.member, across.owner, across.member))
    size = _scalar_bytes(*lengths)
    if size > SCALAR_BYTES:
        return f"{size} bytes of lists a key head; the most are {SCALAR_BYTES}"
    return ""


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
    """The operation of `kernels.block_sparse_attention` in TPU kernels, forward and backward."""
    query_block = query_block or block
    given = {"block": block, "query_block": query_block, "causal": causal, "window": window}
    if reason := uncovered("block_sparse_attention", q, k, v, indices, **given):
        raise ValueError(f"pallas_tpu does not serve {reason}; use impl='xla'.")
    scale = float(q.shape[3] ** -0.5 if scale is None else scale)
    is_packed = segments is not None
    plan, single = _plan(q, k, indices, block, query_block, causal, window, scale, is_packed)
    down, across, bits = _visits(plan, single, block, query_block, indices)
    _, steps = np.unique(np.asarray(down.owner), return_counts=True)
    scalars = {"down": down.member, "owner": across.owner, "across": across.member, "bits": bits}
    return tpu.over_mesh(
        functools.partial(_local, plan=plan, steps=tuple(steps.tolist())),
        dict(q=q, k=k, v=v, segments=segments, **scalars),
        dims={"q": "b t h k", "k": "b t g k", "v": "b t g v", "segments": "b t"}
        | {name: _letters(x) for name, x in scalars.items() if x is not None},
        outputs=("b t h v",),
    )


def _letters(x) -> str:
    """Axes of lists for `tpu.over_mesh`: rows and key heads, unless all share the list."""
    first = ["b" if x.shape[0] > 1 else "one", "g" if x.shape[1] > 1 else "one"]
    return " ".join(first + ["whole"] * (x.ndim - 2))


def _plan(q, k, indices, block, query_block, causal, window, scale, is_packed):
    """(plan, whether blocks are taken singly): block sizes that fit the matrix unit and VMEM."""
    length, heads, groups = q.shape[1], q.shape[2], k.shape[2]
    each = heads // groups if indices.shape[1] == heads > groups else 1
    sharing = heads // groups // each
    single = query_block >= LEAST_QUERIES and block >= LEAST_KEYS
    if single:
        queries = _divisor(query_block, max(1, 2 * ROWS // sharing))
        keys = _divisor(block, COLUMNS)
    else:
        unit = math.lcm(query_block, 8)
        most = math.ceil(length / 4 / unit)
        queries = unit * min(most, max(1, ROWS // sharing // unit))
        columns = COLUMNS if length <= LONG else 2 * COLUMNS
        keys = block * min(math.ceil(length / block / 4), max(1, columns // block))
    fine = 0 if single else block
    plan = Plan(length, queries, keys, each, sharing, causal, window, scale, fine, is_packed)
    return plan, single


def _divisor(size: int, most: int) -> int:
    return next(n for n in range(min(size, most), 0, -1) if size % n == 0)


def _visits(plan: Plan, single: bool, block: int, query_block: int, indices):
    """(steps by query block, steps by key block, bits or None)."""
    xp, length = (np if isinstance(indices, np.ndarray) else jnp), plan.length
    rule = (plan.causal, plan.window)
    first, end = lists.reach(length, query_block, block, *rule)
    none = math.ceil(length / block)
    chosen = lists.distinct(indices, first, end, none)
    chosen = chosen.reshape(chosen.shape[0], chosen.shape[1] // plan.lists, -1, chosen.shape[3])
    bits = None
    if single:
        chosen = _divide(chosen, plan.lists, query_block // plan.queries, plan.count, axis=2)
        parts = np.arange(block // plan.keys, dtype=np.int32)
        last = math.ceil(length / plan.keys)
        chosen = xp.minimum(chosen[..., None] * len(parts) + parts, last)
        chosen = xp.sort(chosen.reshape(*chosen.shape[:3], -1), axis=-1)
    else:
        rows = plan.queries // query_block
        chosen, bits = visits.tile(chosen, plan.lists, rows, plan.keys // block, none)
        chosen = chosen[..., : rows * indices.shape[3]]
        bits = xp.repeat(bits, query_block, axis=4)
    none = math.ceil(length / plan.keys)
    first, end = lists.reach(length, plan.queries, plan.keys, *rule)
    counts = np.tile(np.minimum(end - first, chosen.shape[3]), plan.lists)
    if xp is np:
        counts = (chosen != none).sum(-1).max((0, 1))
    spans = np.arange(none)
    reached = plan.lists * ((first[:, None] <= spans) & (spans < end[:, None])).sum(0)
    most = min(MOST_BLOCKS, max(1, COLUMNS // plan.keys), chosen.shape[3])
    down = visits.by_query(chosen, counts, most, none)
    most = min(MOST_BLOCKS, max(1, ROWS // plan.rows), chosen.shape[2])
    return down, visits.by_key(chosen, counts, reached, most), bits


def _divide(chosen, heads: int, parts: int, count: int, axis: int):
    """Every list `parts` times in a row, cut to `count` lists a head."""
    xp = np if isinstance(chosen, np.ndarray) else jnp
    first, second, _, width = chosen.shape
    chosen = xp.repeat(chosen.reshape(first, second, heads, -1, width), parts, axis=3)
    return chosen[:, :, :, :count].reshape(first, second, -1, width)


def _local(q, k, v, down, owner, across, segments=None, bits=None, *, plan: Plan, steps):
    """One device's rows and heads: arrays as the kernels want them, and back."""
    groups = k.shape[2]
    common = jnp.result_type(q, k, v)
    fit = lambda x, size: jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0)))
    q_BGNRK = rearrange(
        fit(q.astype(common), plan.queries),
        "b (n x) (g p r) k -> b g (p n) (r x) k",
        x=plan.queries,
        g=groups,
        p=plan.lists,
    )
    k_BGJCK, v_BGJCV = (
        rearrange(fit(x.astype(common), plan.keys), "b (j c) g k -> b g j c k", c=plan.keys)
        for x in (k, v)
    )
    given = {"q": q_BGNRK, "k": k_BGJCK, "v": v_BGJCV, "down": down, "owner": owner}
    given |= {"across": across, "bits": bits} | _documents(plan, segments)
    out_BGNRV = _in_pieces(functools.partial(_attend, plan, steps), sum(steps), given)
    out = rearrange(
        out_BGNRV, "b g (p n) (r x) v -> b (n x) (g p r) v", p=plan.lists, x=plan.queries
    )
    return out[:, : plan.length].astype(v.dtype)


def _documents(plan: Plan, segments) -> dict[str, Array]:
    """Documents of queries (B, N, 1, X) and keys (B, J, 1, C), as numbers that float32 holds."""
    if segments is None:
        return {}
    document, real = packed.ordinals(segments), packed.is_real(segments)

    def cut(size, padding):
        own = jnp.where(real, document, padding).astype(jnp.float32)
        own = jnp.pad(own, ((0, 0), (0, -own.shape[1] % size)), constant_values=padding)
        return rearrange(own, "b (n x) -> b n 1 x", x=size)

    return {
        "q_doc": cut(plan.queries, QUERY_PADDING),
        "k_doc": cut(plan.keys, KEY_PADDING),
    }


def _in_pieces(run, steps: int, given: dict):
    """`run(given)`, for fewer rows and key heads at a time if all lists together have no room."""
    down, owner, across = (given[name].size for name in ("down", "owner", "across"))
    if _scalar_bytes(steps, down, owner, across) <= SCALAR_BYTES:
        return run(given)
    rows, heads = given["k"].shape[:2]

    def split(name, x):
        """(rows x heads, 1, ...), or as it is if it is the same for all."""
        if x is None or x.shape[:2] == (1, 1):
            return x
        if name.endswith("_doc"):
            return jnp.repeat(x, heads, axis=0)
        return jnp.broadcast_to(x, (rows, heads, *x.shape[2:])).reshape(-1, 1, *x.shape[2:])

    given = {name: split(name, x) for name, x in given.items()}
    each = [given[name].shape[2] for name in ("down", "owner", "across")]
    fits = lambda n: _scalar_bytes(steps, *(n * x for x in each)) <= SCALAR_BYTES
    units = rows * heads
    size = next(n for n in range(units, 0, -1) if units % n == 0 and (n == 1 or fits(n)))
    own = {n: x for n, x in given.items() if x is not None and x.shape[0] > 1}
    rest = {n: x for n, x in given.items() if n not in own}
    pieces = jax.tree.map(lambda x: rearrange(x, "(i b) ... -> i b ...", b=size), own)
    out = jax.lax.map(lambda piece: run(piece | rest), pieces)
    return rearrange(out, "i b 1 ... -> (i b) ...").reshape(rows, heads, *out.shape[3:])


def _scalar_bytes(steps: int, down: int, owner: int, across: int) -> int:
    """Of the lists of the pass that has the longer ones."""
    return 4 * max(steps + down, owner + across)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(plan, steps, given):
    return _forward(plan, steps, given)[0]


def _forward(plan, steps, given):
    q_BGNRK, v_BGJCV = given["q"], given["v"]
    wide = _wide(q_BGNRK)
    walk, scalars = _walk_down(steps, given)
    names, specs = _inputs_down(plan, walk, given, ("q", "k", "v"))
    value = v_BGJCV.shape[4]
    shape = q_BGNRK.shape[:3]
    types = [
        jax.ShapeDtypeStruct((*q_BGNRK.shape[:4], value), v_BGJCV.dtype),
        jax.ShapeDtypeStruct((*shape, 2, plan.rows), wide),
    ]
    out, top_and_sum = tpu.call(
        functools.partial(_forward_body, plan, walk),
        *names,
        grid=(*shape[:2], walk.steps),
        ins=specs,
        outs=[_own(walk, x.shape) for x in types],
        out_types=types,
        semantics="ppa",
        scratch=[pltpu.VMEM((plan.rows, n), wide) for n in (1, 1, value)],
        lists=scalars,
        name="block_sparse_attention_forward",
    )
    return out, (given, out, top_and_sum)


def _backward(plan, steps, saved, d_out):
    given, out, top_and_sum = saved
    wide = top_and_sum.dtype
    delta_BGNR = jnp.sum(d_out.astype(wide) * out.astype(wide), axis=-1)
    given = given | {"do": d_out, "stats": top_and_sum, "delta": delta_BGNR[:, :, :, None]}
    dq = _gradient_of_q(plan, steps, given)
    dk, dv = _gradients_of_kv(plan, given)
    slopes = {name: None for name in saved[0]}
    return (slopes | {"q": dq, "k": dk, "v": dv},)


_attend.defvjp(_forward, _backward)


def _gradient_of_q(plan, steps, given):
    q_BGNRK = given["q"]
    walk, scalars = _walk_down(steps, given)
    arrays, specs = _inputs_down(plan, walk, given, ("q", "do", "stats", "delta", "k", "v"))
    (dq,) = tpu.call(
        functools.partial(_dq_body, plan, walk),
        *arrays,
        grid=(*q_BGNRK.shape[:2], walk.steps),
        ins=specs,
        outs=[_own(walk, q_BGNRK.shape)],
        out_types=[jax.ShapeDtypeStruct(q_BGNRK.shape, q_BGNRK.dtype)],
        semantics="ppa",
        scratch=[pltpu.VMEM((plan.rows, q_BGNRK.shape[4]), _wide(q_BGNRK))],
        lists=scalars,
        name="block_sparse_attention_dq",
    )
    return dq


def _gradients_of_kv(plan, given):
    k_BGJCK, v_BGJCV, owner, across = (given[n] for n in ("k", "v", "owner", "across"))
    steps = owner.shape[2]
    walk = Walk(steps, across.shape[2] // steps, owner.shape[:2], across.shape[:2])
    arrays, specs = _inputs_across(plan, walk, given)
    like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_BGJCK, v_BGJCV)]
    return tpu.call(
        functools.partial(_dkv_body, plan, walk),
        *arrays,
        grid=(*k_BGJCK.shape[:2], steps),
        ins=specs,
        outs=[_own(walk, x.shape) for x in like],
        out_types=like,
        semantics="ppa",
        scratch=[pltpu.VMEM(x.shape[3:], _wide(x)) for x in like],
        lists=(owner.reshape(-1), across.reshape(-1)),
        name="block_sparse_attention_dkv",
    )


def _walk_down(steps: tuple[int, ...], given) -> tuple[Walk, tuple]:
    owner = np.repeat(np.arange(len(steps), dtype=np.int32), steps)
    member = given["down"]
    walk = Walk(len(owner), member.shape[2] // len(owner), (1, 1), member.shape[:2])
    return walk, (owner, member.reshape(-1))


def _own(walk: Walk, shape: tuple[int, ...]) -> pl.BlockSpec:
    """The owner's block of an array (row, key head, block, ...)."""
    return pl.BlockSpec(
        (None, None, None, *shape[3:]),
        lambda b, g, s, owner, member: (b, g, walk.owner(owner, b, g, s), 0, 0),
    )


def _visited(walk: Walk, shape: tuple[int, ...]) -> list[pl.BlockSpec]:
    """The blocks of the step's members; block 0 in place of none."""

    def spec(e):
        def index(b, g, s, owner, member):
            return b, g, walk.visited(member, b, g, s, e), 0, 0

        return pl.BlockSpec((None, None, None, *shape[3:]), index)

    return [spec(e) for e in range(walk.each)]


def _inputs_down(plan: Plan, walk: Walk, given, names) -> tuple[list, list]:
    """(arrays, blocks) with query blocks as owners, in the order in which `_Refs` takes them."""
    arrays, specs = [], []
    for name in names:
        x, visited = given[name], name in ("k", "v")
        found = _visited(walk, x.shape) if visited else [_own(walk, x.shape)]
        arrays += [x] * len(found)
        specs += found
    if plan.packed:
        count = plan.count
        own = lambda b, g, s, owner, member: (b, walk.owner(owner, b, g, s) % count, 0, 0)
        arrays.append(given["q_doc"])
        specs.append(pl.BlockSpec((None, None, 1, plan.queries), own))
        arrays += [given["k_doc"]] * walk.each
        specs += [_without_head(one) for one in _visited(walk, (0, 0, 0, 1, plan.keys))]
    if plan.fine:
        arrays.append(given["bits"])
        specs.append(
            _bits(given["bits"], lambda b, g, s, owner, member: walk.owner(owner, b, g, s))
        )
    return arrays, specs


def _inputs_across(plan: Plan, walk: Walk, given) -> tuple[list, list]:
    """(arrays, blocks) with key blocks as owners."""
    arrays, specs = [given["k"], given["v"]], [_own(walk, given[n].shape) for n in ("k", "v")]
    for name in ("q", "do", "stats", "delta"):
        arrays += [given[name]] * walk.each
        specs += _visited(walk, given[name].shape)
    if plan.packed:
        own = _without_head(_own(walk, (0, 0, 0, 1, plan.keys)))
        members = _visited(walk, (0, 0, 0, 1, plan.queries))
        arrays += [given["k_doc"]] + [given["q_doc"]] * walk.each
        specs += [own, *(_without_head(one, plan.count) for one in members)]
    if plan.fine:
        for e in range(walk.each):
            arrays.append(given["bits"])
            at = lambda b, g, s, owner, member, e=e: jnp.maximum(walk.member(member, b, g, s, e), 0)
            specs.append(_bits(given["bits"], at))
    return arrays, specs


def _without_head(spec: pl.BlockSpec, count: int = 0) -> pl.BlockSpec:
    """The block of an array without key heads; modulo `count` blocks a list, if not 0."""

    def index(*at):
        b, _, n, *rest = spec.index_map(*at)
        return b, (n % count if count else n), *rest

    return pl.BlockSpec(spec.block_shape[1:], index)


def _bits(bits, at) -> pl.BlockSpec:
    """All words of a query block."""
    rows, heads = bits.shape[:2]
    return pl.BlockSpec(
        (None, None, None, *bits.shape[3:]),
        lambda b, g, *rest: (
            b if rows > 1 else 0,
            g if heads > 1 else 0,
            at(b, g, *rest),
            0,
            0,
        ),
    )


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


def _forward_body(plan: Plan, walk: Walk, owner, member, *refs):
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


def _dq_body(plan: Plan, walk: Walk, owner, member, *refs):
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


def _dkv_body(plan: Plan, walk: Walk, owner, member, *refs):
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
        word = jnp.where(part >= w * visits.WORD, jnp.broadcast_to(other, size), word)
    return jax.lax.shift_right_logical(word, part % visits.WORD) & 1 == 1


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
    wide = _wide(a)
    exact = a.dtype.itemsize >= 4
    return jax.lax.dot_general(
        a,
        b,
        (((over_a,), (over_b,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else None,
        preferred_element_type=wide,
    )


def _wide(x) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)
