"""Block-sparse attention as TPU kernels: chosen blocks are copied where they lie, never gathered.

Three kernels, each a walk along the steps of a schedule for every row and key head:

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
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels import segments as packed
from kernels import tpu
from kernels.block_sparse_attention import lists
from kernels.block_sparse_attention import pallas_tpu_bodies as bodies
from kernels.block_sparse_attention import pallas_tpu_schedule as schedule
from kernels.block_sparse_attention.pallas_tpu_bodies import Plan, Walk
from kernels.products import sum_type

LEAST_QUERIES, LEAST_KEYS = 16, 8  # of blocks that are taken singly
ROWS, COLUMNS = 512, 512  # scores of one step, about
LONG = 32768  # tokens, above which spans are twice as wide: half the steps
MOST_BLOCKS = 8  # copied in one step
MOST_ENTRIES = 256  # of a list whose bits are taken
SCALAR_BYTES = 768 << 10  # of lists, of a TPU's 1 MiB of scalar memory
QUERY_PADDING, KEY_PADDING = -1, -2  # documents that equal no other


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
    if single and plan.keys < LEAST_KEYS:
        return f"block {block} has no divisor from {LEAST_KEYS} to {COLUMNS}"
    prepare = functools.partial(_schedules, plan, single, block, query_block)
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
    down, across, bits = _schedules(plan, single, block, query_block, indices)
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


def _schedules(plan: Plan, single: bool, block: int, query_block: int, indices):
    """(steps by query block, steps by key block, bits or None)."""
    xp, length = (np if isinstance(indices, np.ndarray) else jnp), plan.length
    rule = (plan.causal, plan.window)
    first, end = lists.reach(length, query_block, block, *rule)
    none = math.ceil(length / block)
    chosen = lists.distinct(indices, first, end, none)
    chosen = chosen.reshape(chosen.shape[0], chosen.shape[1] // plan.lists, -1, chosen.shape[3])
    bits = None
    if single:
        chosen = _divide(chosen, plan.lists, query_block // plan.queries, plan.count)
        parts = np.arange(block // plan.keys, dtype=np.int32)
        last = math.ceil(length / plan.keys)
        chosen = xp.minimum(chosen[..., None] * len(parts) + parts, last)
        chosen = xp.sort(chosen.reshape(*chosen.shape[:3], -1), axis=-1)
    else:
        rows = plan.queries // query_block
        chosen, bits = schedule.tile(chosen, plan.lists, rows, plan.keys // block, none)
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
    down = schedule.by_query(chosen, counts, most, none)
    most = min(MOST_BLOCKS, max(1, ROWS // plan.rows), chosen.shape[2])
    return down, schedule.by_key(chosen, counts, reached, most), bits


def _divide(chosen, heads: int, parts: int, count: int):
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
        if name.endswith("_doc"):
            return jnp.repeat(x, heads, axis=0)
        if x is None or x.shape[:2] == (1, 1):
            return x
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
    wide, value = sum_type(q_BGNRK), v_BGJCV.shape[4]
    types = [
        jax.ShapeDtypeStruct((*q_BGNRK.shape[:4], value), v_BGJCV.dtype),
        jax.ShapeDtypeStruct((*q_BGNRK.shape[:3], 2, plan.rows), wide),
    ]
    walk, scalars = _walk_down(steps, given)
    blocks = _blocks_down(plan, walk, given, ("q",))
    scratch = [(plan.rows, n) for n in (1, 1, value)]
    out, top_and_sum = _launch(bodies.forward_body, plan, walk, scalars, blocks, types, scratch)
    return out, (given, out, top_and_sum)


def _backward(plan, steps, saved, d_out):
    given, out, top_and_sum = saved
    slopes = {name: None for name in given}
    q_BGNRK, k_BGJCK, v_BGJCV = (given[name] for name in ("q", "k", "v"))
    like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q_BGNRK, k_BGJCK, v_BGJCV)]
    wide = top_and_sum.dtype
    delta_BGNR = jnp.sum(d_out.astype(wide) * out.astype(wide), axis=-1)
    given = given | {"do": d_out, "stats": top_and_sum, "delta": delta_BGNR[:, :, :, None]}

    walk, scalars = _walk_down(steps, given)
    blocks = _blocks_down(plan, walk, given, ("q", "do", "stats", "delta"))
    scratch = [(plan.rows, q_BGNRK.shape[4])]
    (dq,) = _launch(bodies.dq_body, plan, walk, scalars, blocks, like[:1], scratch)

    walk, scalars = _walk_across(given)
    blocks = _blocks_across(plan, walk, given)
    scratch = [x.shape[3:] for x in like[1:]]
    dk, dv = _launch(bodies.dkv_body, plan, walk, scalars, blocks, like[1:], scratch)
    return (slopes | {"q": dq, "k": dk, "v": dv},)


_attend.defvjp(_forward, _backward)


def _walk_down(steps: tuple[int, ...], given) -> tuple[Walk, tuple]:
    owner, member = np.repeat(np.arange(len(steps), dtype=np.int32), steps), given["down"]
    walk = Walk(len(owner), member.shape[2] // len(owner), (1, 1), member.shape[:2])
    return walk, (owner, member.reshape(-1))


def _walk_across(given) -> tuple[Walk, tuple]:
    owner, member = given["owner"], given["across"]
    steps = owner.shape[2]
    walk = Walk(steps, member.shape[2] // steps, owner.shape[:2], member.shape[:2])
    return walk, (owner.reshape(-1), member.reshape(-1))


class _Block(NamedTuple):
    """An array of a launch: its block, and whether that is the owner's (else a member's)."""

    array: Array
    spec: pl.BlockSpec
    is_own: bool


def _launch(body, plan: Plan, walk: Walk, scalars, blocks: list[_Block], types, scratch):
    """One pass. An owner's block is copied once, a member's at every step."""
    rows, heads, owners = types[0].shape[:3]
    steps = rows * heads * walk.steps
    copies = [rows * heads * owners if one.is_own else steps for one in blocks]
    return tpu.call(
        functools.partial(body, plan, walk),
        *(one.array for one in blocks),
        grid=(rows, heads, walk.steps),
        ins=[one.spec for one in blocks],
        outs=[_own(walk, x.shape) for x in types],
        out_types=types,
        semantics="ppa",
        scratch=[pltpu.VMEM(shape, sum_type(types[0])) for shape in scratch],
        lists=scalars,
        copies=copies + [rows * heads * owners] * len(types),
        name=f"block_sparse_attention_{body.__name__.removesuffix('_body')}",
    )


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


def _blocks_down(plan: Plan, walk: Walk, given, own: tuple[str, ...]) -> list[_Block]:
    """What a pass with query blocks as owners reads, in the order in which its body takes it."""
    found = [_Block(given[n], _own(walk, given[n].shape), True) for n in own]
    for n in ("k", "v"):
        found += [_Block(given[n], spec, False) for spec in _visited(walk, given[n].shape)]
    if plan.packed:
        q_doc, k_doc = given["q_doc"], given["k_doc"]
        own_doc = _without_head(_own(walk, (0, 0, 0, 1, plan.queries)), plan)
        found.append(_Block(q_doc, own_doc, True))
        specs = _visited(walk, (0, 0, 0, 1, plan.keys))
        found += [_Block(k_doc, _without_head(spec), False) for spec in specs]
    if plan.fine:
        shape = given["bits"].shape
        found.append(_Block(given["bits"], _where_it_differs(_own(walk, shape), shape), True))
    return found


def _blocks_across(plan: Plan, walk: Walk, given) -> list[_Block]:
    """The same with key blocks as owners."""
    found = [_Block(given[n], _own(walk, given[n].shape), True) for n in ("k", "v")]
    for n in ("q", "do", "stats", "delta"):
        found += [_Block(given[n], spec, False) for spec in _visited(walk, given[n].shape)]
    if plan.packed:
        q_doc, k_doc = given["q_doc"], given["k_doc"]
        found.append(_Block(k_doc, _without_head(_own(walk, (0, 0, 0, 1, plan.keys))), True))
        specs = _visited(walk, (0, 0, 0, 1, plan.queries))
        found += [_Block(q_doc, _without_head(spec, plan), False) for spec in specs]
    if plan.fine:
        shape = given["bits"].shape
        specs = [_where_it_differs(spec, shape) for spec in _visited(walk, shape)]
        found += [_Block(given["bits"], spec, False) for spec in specs]
    return found


def _without_head(spec: pl.BlockSpec, plan: Plan | None = None) -> pl.BlockSpec:
    """The block of an array without key heads; of a row's query block where a plan is given."""

    def index(*at):
        b, _, n, *rest = spec.index_map(*at)
        return b, (n % plan.count if plan else n), *rest

    return pl.BlockSpec(spec.block_shape[1:], index)


def _where_it_differs(spec: pl.BlockSpec, shape: tuple[int, ...]) -> pl.BlockSpec:
    """The block of an array whose rows or key heads may all be the same one."""

    def index(*at):
        b, g, *rest = spec.index_map(*at)
        return (b if shape[0] > 1 else 0), (g if shape[1] > 1 else 0), *rest

    return pl.BlockSpec(spec.block_shape, index)
