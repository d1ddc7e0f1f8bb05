"""One chunk of the delta rule on a TPU core: all heads of a program at once, as (R, C, ...) arrays.

Plain functions of values for use inside a Pallas kernel. They keep to what Mosaic compiles: sums
over positions are masked reductions, every product has one batch axis and sums one axis. R counts
a program's heads, G the groups of heads that share q and k.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels.products import HIGHEST, sum_type

# As in gated_linear/scalar_gate.py: coarse parts have exact sums, and below -1000 a decay is 0.
GRAIN, FLOOR = 64.0, -1000.0
BASE = 16  # positions of a triangular block that is inverted row by row
FIRST = 4  # positions of a block in which decays between two of them are formed pair by pair
TILE = 8  # rows of a tile of float32
NN, NT, TN = (2, 1), (2, 2), (1, 1)  # the axes that a product of (heads, rows, columns) sums


class Marks(NamedTuple):
    """A chunk's documents as masks of 0 and 1; None where all is one document."""

    pair_1CS: Array  # of booleans, and with the causal order
    read_1C1: Array | None = None  # the position reads the entering state
    write_1C1: Array | None = None  # the position writes the leaving state
    keep_111: Array | None = None  # the entering state survives
    real_1C1: Array | None = None
    real_11C: Array | None = None


class Decayed(NamedTuple):
    """What the gates make of a chunk's q and k.

    A row's factor and its vector stand apart, so that inputs of 16 bits enter products as they are.
    K of `keep` is 1 where a head has one gate.
    """

    q_score_RCS: Array
    k_score_RCS: Array  # strictly lower
    q_read_RCK: Array  # what reads the entering state
    k_read_RCK: Array
    write_RCK: Array  # what writes the leaving state
    keep_RK1: Array  # the entering state's own decay
    q_factor_RC1: Array
    k_factor_RC1: Array
    write_factor_RC1: Array
    rest: Any  # for the backward pass


class Slopes(NamedTuple):
    """Gradients of `Decayed`; the vectors' hold their factors."""

    q_score_RCS: Array
    k_score_RCS: Array
    q_read_RCK: Array
    k_read_RCK: Array
    write_RCK: Array
    kept_RK1: Array  # keep times its gradient


class Chunk(NamedTuple):
    """A chunk's inputs; the gate is None, (R, 1, C) or (R, C, K)."""

    q_GCK: Array
    k_GCK: Array
    v_RCV: Array
    beta_R1C: Array
    gate: Array | None = None

    @property
    def heads(self) -> int:
        """Of a group."""
        return self.v_RCV.shape[0] // self.q_GCK.shape[0]

    @property
    def vector(self) -> bool:
        """Whether a head has a gate a key dimension."""
        return self.gate is not None and self.gate.shape[1] > 1


def product(x, y, axes, narrow: bool):
    """Sum one axis of each, heads in front, to float32 precision.

    `narrow` is for bfloat16 inputs: float32 operands go as two bfloat16 parts each, of which the
    product of the two small ones is left out.
    """
    dot = functools.partial(
        jax.lax.dot_general, dimension_numbers=(((axes[0],), (axes[1],)), ((0,), (0,)))
    )
    if not narrow:
        wide = sum_type(x, y)
        highest = HIGHEST
        return dot(x.astype(wide), y.astype(wide), precision=highest, preferred_element_type=wide)
    xs, ys = _parts(x), _parts(y)
    pairs = [(a, b) for i, a in enumerate(xs) for j, b in enumerate(ys) if i + j < 2]
    return sum(dot(a, b, preferred_element_type=jnp.float32) for a, b in reversed(pairs))


def _parts(x) -> list:
    if x.dtype == jnp.bfloat16:
        return [x]
    large = x.astype(jnp.bfloat16)
    return [large, (x - large.astype(x.dtype)).astype(jnp.bfloat16)]


def positions(rows: int, columns: int) -> tuple[Array, Array]:
    """Row and column numbers, (1, rows, columns)."""
    shape = (1, rows, columns)
    row, column = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (1, 2))
    return row, column


def as_column(x_R1C):
    """(R, 1, C) to (R, C, 1)."""
    row, column = positions(x_R1C.shape[2], x_R1C.shape[2])
    return jnp.sum(jnp.where(row == column, x_R1C, 0), axis=2, keepdims=True)


def as_row(x_RC1):
    """(R, C, 1) to (R, 1, C)."""
    row, column = positions(x_RC1.shape[1], x_RC1.shape[1])
    return jnp.sum(jnp.where(row == column, x_RC1, 0), axis=1, keepdims=True)


def only(mask, x):
    """`x` where the mask is not 0, `x` itself without a mask."""
    return x if mask is None else jnp.where(jnp.broadcast_to(mask, x.shape) > 0, x, 0)


def make_marks(chunk: int, codes_41C: Array | None) -> Marks:
    """`codes` name documents: as readers, as writers, of the entering and of the leaving state."""
    row, column = positions(chunk, chunk)
    if codes_41C is None:
        return Marks(row >= column)
    codes_4C1 = as_column(codes_41C)
    reader_1C1, writer_1C1, entering_1C1, leaving_1C1 = (codes_4C1[i : i + 1] for i in range(4))

    def number(mask):
        return jnp.where(mask, 1.0, 0.0)

    return Marks(
        pair_1CS=(row >= column) & (reader_1C1 == codes_41C[1:2]),
        read_1C1=number(reader_1C1 == entering_1C1),
        write_1C1=number(writer_1C1 == leaving_1C1),
        keep_111=number(entering_1C1[:, :1] == leaving_1C1[:, :1]),
        real_1C1=number(reader_1C1 >= 0),
        real_11C=number(codes_41C[:1] >= 0),
    )


def spread(x_Gxx, heads: int):
    """Repeat what a group shares for each of its heads."""
    if heads == 1:
        return x_Gxx
    return jnp.concatenate([x_Gxx[n : n + 1] for n in range(x_Gxx.shape[0]) for _ in range(heads)])


def gather(x_Rxx, heads: int):
    """Sum over the heads of each group."""
    if heads == 1:
        return x_Rxx
    firsts = range(0, x_Rxx.shape[0], heads)
    parts = ([x_Rxx[n + i : n + i + 1] for i in range(heads)] for n in firsts)
    return jnp.concatenate([sum(part[1:], part[0]) for part in parts])


def unit_lower_inverse(narrow, below_RCS):
    """(I + L)^-1: blocks of 16 by forward substitution, larger ones by halves.

    A block's row is itself minus L's row times the rows above it, which the elementwise units do
    for all blocks at once; [[A, 0], [X, B]]^-1 = [[A^-1, 0], [-B^-1 X A^-1, B^-1]] joins them.
    """
    heads, chunk, _ = below_RCS.shape
    base = min(BASE, chunk)
    blocks = [below_RCS[:, n : n + base, n : n + base] for n in range(0, chunk, base)]
    rows = jnp.concatenate(blocks, axis=0)
    row, column = positions(base, base)
    inverse = jnp.where(row == column, 1.0, 0.0).astype(below_RCS.dtype)
    inverse = jnp.broadcast_to(inverse, rows.shape)
    for n in range(base - 1):
        inverse = inverse - rows[:, :, n : n + 1] * inverse[:, n : n + 1]
    blocks = [inverse[n : n + heads] for n in range(0, inverse.shape[0], heads)]
    while len(blocks) > 1:
        size = blocks[0].shape[1]
        joined = []
        for n in range(0, len(blocks), 2):
            first, second, at = blocks[n], blocks[n + 1], n * size
            corner = below_RCS[:, at + size : at + 2 * size, at : at + size]
            corner = -product(second, product(corner, first, NN, narrow), NN, narrow)
            above = jnp.concatenate([first, jnp.zeros_like(corner)], axis=2)
            joined.append(
                jnp.concatenate([above, jnp.concatenate([corner, second], axis=2)], axis=1)
            )
        blocks = joined
    return blocks[0]


def scalar_decays(g_R1C, marks: Marks):
    """Decays from position S to C, from the entering state, to the leaving state, and of it."""
    chunk = g_R1C.shape[2]
    row, column = positions(chunk, chunk)
    g_R1C = only(marks.real_11C, jnp.maximum(g_R1C, FLOOR))
    coarse_R1C = jnp.floor(g_R1C * GRAIN + 0.5) / GRAIN

    def prefix(x_R1C):
        x_RC1 = jnp.sum(jnp.where(row >= column, x_R1C, 0), axis=2, keepdims=True)
        return x_RC1, as_row(x_RC1), x_RC1[:, chunk - 1 :]

    coarse_RC1, coarse_R1C, coarse_end = prefix(coarse_R1C)
    fine_RC1, fine_R1C, fine_end = prefix(g_R1C - jnp.floor(g_R1C * GRAIN + 0.5) / GRAIN)
    between_RCS = (coarse_RC1 - coarse_R1C) + (fine_RC1 - fine_R1C)
    after_RC1 = (coarse_end - coarse_RC1) + (fine_end - fine_RC1)
    exponents = (between_RCS, coarse_RC1 + fine_RC1, after_RC1, coarse_end + fine_end)
    return tuple(jnp.exp(jnp.minimum(x, 0)) for x in exponents)


def scalar_gate(scale, narrow, given: Chunk, marks: Marks) -> Decayed:
    """`Decayed` of heads with one gate a token, or with none."""
    q_GCK, k_GCK, _, _, g_R1C = given
    (groups, chunk, _), heads = q_GCK.shape, given.heads
    row, column = positions(chunk, chunk)
    if g_R1C is None:
        decay = read = write = keep = jnp.ones((groups * heads, 1, 1), sum_type(q_GCK))
    else:
        decay, read, write, keep = scalar_decays(g_R1C, marks)
    decay_RCS = jnp.where(marks.pair_1CS, decay, 0)
    strict_RCS = jnp.where(row > column, decay_RCS, 0)
    read, write = (jnp.broadcast_to(x, (groups * heads, chunk, 1)) for x in (read, write))
    read_RC1, write_RC1 = only(marks.read_1C1, read), only(marks.write_1C1, write)
    both_GxS = product(jnp.concatenate([q_GCK, k_GCK], axis=1), k_GCK, NT, narrow)
    k_RCK = spread(k_GCK, heads)
    return Decayed(
        q_score_RCS=scale * spread(both_GxS[:, :chunk], heads) * decay_RCS,
        k_score_RCS=spread(both_GxS[:, chunk:], heads) * strict_RCS,
        q_read_RCK=spread(q_GCK, heads),
        k_read_RCK=k_RCK,
        write_RCK=k_RCK,
        keep_RK1=only(marks.keep_111, keep),
        q_factor_RC1=scale * read_RC1,
        k_factor_RC1=read_RC1,
        write_factor_RC1=write_RC1,
        rest=(decay_RCS, strict_RCS),
    )


def scalar_gate_backward(scale, narrow, given: Chunk, marks: Marks, p: Decayed, d: Slopes):
    """(dq, dk, dg); dg is (R, 1, C): pairs across the gate, reads after it, writes before it."""
    (q_GCK, k_GCK), heads, (decay_RCS, strict_RCS) = given[:2], given.heads, p.rest
    row, column = positions(q_GCK.shape[1], q_GCK.shape[1])
    dqk_GCS = scale * gather(d.q_score_RCS * decay_RCS, heads)
    dkk_GCS = gather(d.k_score_RCS * strict_RCS, heads)
    dq_GCK = gather(d.q_read_RCK, heads) + product(dqk_GCS, k_GCK, NN, narrow)
    dk_GCK = gather(d.k_read_RCK + d.write_RCK, heads) + product(dqk_GCS, q_GCK, TN, narrow)
    dk_GCK += product(dkk_GCS, k_GCK, NN, narrow) + product(dkk_GCS, k_GCK, TN, narrow)

    pairs_RCS = jnp.where(row > column, d.q_score_RCS * p.q_score_RCS, 0)
    pairs_RCS += d.k_score_RCS * p.k_score_RCS
    reads_RCK = p.q_read_RCK * d.q_read_RCK + p.k_read_RCK * d.k_read_RCK
    ends_RC1 = jnp.sum(pairs_RCS, axis=2, keepdims=True)
    ends_RC1 += jnp.sum(reads_RCK, axis=2, keepdims=True)
    ends_RC1 -= as_column(jnp.sum(pairs_RCS, axis=1, keepdims=True))
    writes_RC1 = jnp.sum(p.write_RCK * d.write_RCK, axis=2, keepdims=True)
    dg_R1C = jnp.sum(jnp.where(row >= column, ends_RC1, 0), axis=1, keepdims=True)
    dg_R1C += jnp.sum(jnp.where(row < column, writes_RC1, 0), axis=1, keepdims=True)
    dg_R1C += jnp.sum(d.kept_RK1, axis=1, keepdims=True)
    return dq_GCK, dk_GCK, only(marks.real_11C, dg_R1C)


class Base(NamedTuple):
    """What `first_blocks` keeps for its backward pass; one entry a distance 1, 2, 3."""

    here_1CS: list  # booleans: C stands at that distance from S in the same block
    shifted: list  # [distance][writer] (R, C, K), decayed up to the reader
    e_RCK: Array
    readers: list
    since_RCK: Array  # decays from the block's start
    until_RCK: Array  # decays to its end


class Level(NamedTuple):
    """One joining of blocks in pairs, as it was before it."""

    block: int
    readers: list  # (R, C, K) each, decayed from their block's start
    writers: list  # decayed to their block's end
    other_RCK: Array  # the whole decay of the pair's other block


def first_blocks(readers: list, writers: list, e_RCK):
    """Scores within blocks of four positions, pair by pair on the elementwise units.

    Returns them, the readers and writers at their block's edges, the block's decay, and a `Base`.
    """
    chunk = e_RCK.shape[1]
    row, column = positions(chunk, chunk)
    place_1C1 = row[:, :, :1] & (FIRST - 1)
    scores = [[0.0 for _ in writers] for _ in readers]
    here_1CS, shifted = [], []
    now, since_RCK, until_RCK = writers, 1.0, 1.0
    for distance in range(1, FIRST):
        now = [jnp.roll(y if distance == 1 else y * e_RCK, 1, axis=1) for y in now]
        here = (row - column == distance) & (row & (FIRST - 1) >= distance)
        for i, x in enumerate(readers):
            for j, y in enumerate(now):
                pair_RC1 = jnp.sum(x * y, axis=2, keepdims=True)
                scores[i][j] = jnp.where(here, pair_RC1, scores[i][j])
        here_1CS.append(here)
        shifted.append(now)
        since_RCK *= _if(place_1C1 >= distance, jnp.roll(e_RCK, distance, axis=1))
        until_RCK *= _if(place_1C1 < FIRST - distance, jnp.roll(e_RCK, -distance, axis=1))
    base = Base(here_1CS, shifted, e_RCK, readers, since_RCK, until_RCK)
    readers, writers = [x * since_RCK for x in readers], [y * until_RCK for y in writers]
    return scores, readers, writers, e_RCK * since_RCK * until_RCK, base


def _if(mask_1C1, x_RCK):
    """`x`, or 1 where the mask does not hold."""
    mask_1C1 = jnp.where(mask_1C1, 1.0, 0.0)
    return jnp.where(jnp.broadcast_to(mask_1C1, x_RCK.shape) > 0, x_RCK, 1)


def first_blocks_backward(dscores: list, dreaders: list, dwriters: list, base: Base):
    """Gradients of the readers and writers, given those of `first_blocks`' first three results."""
    dreaders = [d * base.since_RCK for d in dreaders]
    dwriters = [d * base.until_RCK for d in dwriters]
    passed = [0.0 for _ in dwriters]
    for here, shifted in zip(reversed(base.here_1CS), reversed(base.shifted), strict=True):
        for j, y in enumerate(shifted):
            for i, x in enumerate(base.readers):
                slope_RC1 = jnp.sum(jnp.where(here, dscores[i][j], 0), axis=2, keepdims=True)
                dreaders[i] += slope_RC1 * y
                passed[j] += slope_RC1 * x
        passed = [jnp.roll(d, -1, axis=1) for d in passed]
        if shifted is not base.shifted[0]:
            passed = [d * base.e_RCK for d in passed]
    return dreaders, [d + more for d, more in zip(dwriters, passed, strict=True)]


def halving(narrow, readers: list, writers: list, e_RCK):
    """Scores sum_K x_C y_S prod(gates between), C > S, of every reader x and writer y.

    Blocks of 4, 8, 16 ... positions are joined in pairs. Readers hold the decays since their block
    began (with their own gate, or without it), writers those until their block ends: products of
    gates, never quotients. One masked product a level serves all pairs of blocks.
    Returns the scores [x][y], readers decayed from the chunk's start, writers decayed to its end,
    the chunk's decay as (R, C, K) with equal rows, and what the backward pass needs.
    """
    chunk, count = e_RCK.shape[1], len(readers)
    scores, readers, writers, keep_RCK, base = first_blocks(readers, writers, e_RCK)
    block, levels = FIRST, []
    while block < chunk:
        late = _late(keep_RCK, block)
        other_RCK = jnp.where(
            late, jnp.roll(keep_RCK, block, axis=1), jnp.roll(keep_RCK, -block, axis=1)
        )
        levels.append(Level(block, readers, writers, other_RCK))
        stacked = jnp.concatenate([later_rows(x, block) for x in readers], axis=1)
        for j, y in enumerate(writers):
            found = product(stacked, earlier(y, block, 1), NT, narrow)
            for i, cross in enumerate(jnp.split(found, count, axis=1)):
                cross = put_earlier(jnp.where(_partners(cross, block), cross, 0), block, 2)
                scores[i][j] += put_later_rows(cross, block)
        readers = [jnp.where(late, x * other_RCK, x) for x in readers]
        writers = [jnp.where(late, y, y * other_RCK) for y in writers]
        keep_RCK = keep_RCK * other_RCK
        block *= 2
    return scores, readers, writers, keep_RCK, (base, levels)


def halving_backward(narrow, dscores: list, dreaders: list, dwriters: list, rest: tuple):
    """Gradients of the readers and writers, given those of `halving`'s first three results."""
    base, levels = rest
    for block, readers, writers, other_RCK in reversed(levels):
        late = _late(other_RCK, block)
        dreaders = [jnp.where(late, d * other_RCK, d) for d in dreaders]
        dwriters = [jnp.where(late, d, d * other_RCK) for d in dwriters]
        stacked = jnp.concatenate([later_rows(x, block) for x in readers], axis=1)
        for j, writer in enumerate(writers):
            here = [earlier(later_rows(d[j], block), block, 2) for d in dscores]
            here = [jnp.where(_partners(d, block), d, 0) for d in here]
            here = jnp.concatenate(here, axis=1)
            moved = product(here, earlier(writer, block, 1), NN, narrow)
            moved = jnp.split(moved, len(readers), axis=1)
            dreaders = [d + put_later_rows(m, block) for d, m in zip(dreaders, moved, strict=True)]
            dwriters[j] += put_earlier(product(here, stacked, TN, narrow), block, 1)
    return first_blocks_backward(dscores, dreaders, dwriters, base)


def _late(like_RCK, block: int):
    """Booleans: the position lies in the later block of its pair."""
    row = jax.lax.broadcasted_iota(jnp.int32, like_RCK.shape, 1)
    return row & block != 0


def _partners(cross_RCS, block: int):
    """Booleans: a row of `later_rows` and a column of `earlier` belong to the same pair."""
    row, column = positions(*cross_RCS.shape[1:])
    if block < TILE:
        return (row // block == column // (2 * block)) & (column & block == 0)
    return row // block == column // block


def later_rows(x_RCx, block: int):
    """The rows of all later blocks; half tiles are moved together in pairs."""
    chunk = x_RCx.shape[1]
    if block >= TILE:
        starts = range(block, chunk, 2 * block)
        return jnp.concatenate([x_RCx[:, n : n + block] for n in starts], axis=1)
    up_RCx = jnp.roll(x_RCx, -block, axis=1)
    second = _late(x_RCx[:, :TILE], block)
    pairs = (
        jnp.where(second, x_RCx[:, n + TILE : n + 2 * TILE], up_RCx[:, n : n + TILE])
        for n in range(0, chunk, 2 * TILE)
    )
    return jnp.concatenate(list(pairs), axis=1)


def put_later_rows(x_RCx, block: int):
    """The inverse of `later_rows`, with zeros in the earlier blocks."""
    length = x_RCx.shape[1]
    if block >= TILE:
        parts = [x_RCx[:, n : n + block] for n in range(0, length, block)]
        nothing = jnp.zeros_like(parts[0])
        return jnp.concatenate([x for part in parts for x in (nothing, part)], axis=1)
    down_RCx = jnp.roll(x_RCx, block, axis=1)
    second = _late(x_RCx[:, :TILE], block)
    tiles = [x[:, n : n + TILE] for n in range(0, length, TILE) for x in (down_RCx, x_RCx)]
    return jnp.concatenate([jnp.where(second, tile, 0) for tile in tiles], axis=1)


def earlier(x_Rxx, block: int, axis: int):
    """The earlier blocks along an axis; the whole axis where a block is no whole tile."""
    if block < TILE:
        return x_Rxx
    starts = range(0, x_Rxx.shape[axis], 2 * block)
    parts = [jax.lax.slice_in_dim(x_Rxx, n, n + block, axis=axis) for n in starts]
    return jnp.concatenate(parts, axis=axis)


def put_earlier(x_Rxx, block: int, axis: int):
    """The inverse of `earlier`, with zeros in the later blocks."""
    if block < TILE:
        return x_Rxx
    starts = range(0, x_Rxx.shape[axis], block)
    parts = [jax.lax.slice_in_dim(x_Rxx, n, n + block, axis=axis) for n in starts]
    nothing = jnp.zeros_like(parts[0])
    return jnp.concatenate([x for part in parts for x in (part, nothing)], axis=axis)


def suffix_sums(x_RCK):
    """At each position the sum over it and all later ones of the chunk."""
    step = 1
    while step < x_RCK.shape[1]:
        later = jnp.concatenate([x_RCK[:, step:], jnp.zeros_like(x_RCK[:, :step])], axis=1)
        x_RCK = x_RCK + later
        step *= 2
    return x_RCK


def vector_gate(scale, narrow, given: Chunk, marks: Marks) -> Decayed:
    """`Decayed` of heads with a gate a key dimension."""
    q_GCK, k_GCK, _, _, g_RCK = given
    wide, chunk, heads = sum_type(q_GCK), q_GCK.shape[1], given.heads
    row, column = positions(chunk, chunk)
    e_RCK = jnp.exp(only(marks.real_1C1, g_RCK.astype(wide)))
    q_RCK, k_RCK = scale * spread(q_GCK.astype(wide), heads), spread(k_GCK.astype(wide), heads)
    scores, (q_read_RCK, k_read_RCK), (write_RCK,), keep_RCK, rest = halving(
        narrow, [q_RCK * e_RCK, k_RCK * e_RCK], [k_RCK], e_RCK
    )
    own_RC1 = jnp.sum(q_RCK * k_RCK, axis=2, keepdims=True)
    q_score_RCS = jnp.where(row == column, own_RC1, scores[0][0])
    one_1C1 = jnp.ones((1, chunk, 1), wide)
    read_1C1, write_1C1 = only(marks.read_1C1, one_1C1), only(marks.write_1C1, one_1C1)
    return Decayed(
        q_score_RCS=jnp.where(marks.pair_1CS, q_score_RCS, 0),
        k_score_RCS=jnp.where(marks.pair_1CS, scores[1][0], 0),
        q_read_RCK=q_read_RCK,
        k_read_RCK=k_read_RCK,
        write_RCK=write_RCK,
        keep_RK1=only(marks.keep_111, as_column(keep_RCK[:, :1])),
        q_factor_RC1=read_1C1,
        k_factor_RC1=read_1C1,
        write_factor_RC1=write_1C1,
        rest=(q_RCK, k_RCK, e_RCK, rest),
    )


def vector_gate_backward(scale, narrow, given: Chunk, marks: Marks, p: Decayed, d: Slopes):
    """(dq, dk, dg); dg is (R, C, K). The diagonal has no gate in it."""
    q_RCK, k_RCK, e_RCK, rest = p.rest
    row, column = positions(q_RCK.shape[1], q_RCK.shape[1])
    dscores = [[d.q_score_RCS], [d.k_score_RCS]]
    (dq_RCK, dk_RCK), (dw_RCK,) = halving_backward(
        narrow, dscores, [d.q_read_RCK, d.k_read_RCK], [d.write_RCK], rest
    )
    dq_RCK, dk_RCK = dq_RCK * e_RCK, dk_RCK * e_RCK
    own_RC1 = jnp.sum(jnp.where(row == column, d.q_score_RCS, 0), axis=2, keepdims=True)
    leaving_R1K = jnp.sum(p.write_RCK * d.write_RCK, axis=1, keepdims=True) + as_row(d.kept_RK1)
    dg_RCK = suffix_sums(q_RCK * dq_RCK + k_RCK * (dk_RCK - dw_RCK)) + leaving_R1K
    return (
        gather(scale * (dq_RCK + own_RC1 * k_RCK), given.heads),
        gather(dk_RCK + dw_RCK + own_RC1 * q_RCK, given.heads),
        only(marks.real_1C1, dg_RCK),
    )


def corrected(scale, narrow, s_RKV, given: Chunk, marks: Marks, beta_RC1):
    """The decayed chunk and what it writes: errors, the triangular inverse, and the rows u."""
    gate = vector_gate if given.vector else scalar_gate
    p = gate(scale, narrow, given, marks)
    error_RCV = given.v_RCV - p.k_factor_RC1 * product(p.k_read_RCK, s_RKV, NN, narrow)
    inverse_RCS = unit_lower_inverse(narrow, beta_RC1 * p.k_score_RCS)
    return p, error_RCV, inverse_RCS, product(inverse_RCS, beta_RC1 * error_RCV, NN, narrow)


def forward(scale, narrow, s_RKV, inputs: list, marks: Marks):
    """(state after the chunk, output); the inputs are those of `Chunk`, heads in front."""
    given = Chunk(*inputs)
    p, _, _, u_RCV = corrected(scale, narrow, s_RKV, given, marks, as_column(given.beta_R1C))
    o_RCV = p.q_factor_RC1 * product(p.q_read_RCK, s_RKV, NN, narrow)
    o_RCV += product(p.q_score_RCS, u_RCV, NN, narrow)
    written_RKV = product(p.write_RCK, p.write_factor_RC1 * u_RCV, TN, narrow)
    return p.keep_RK1 * s_RKV + written_RKV, o_RCV


def backward(scale, narrow, s_RKV, inputs: list, marks: Marks, ds_RKV, do_RCV):
    """(gradient of the entering state, those of the inputs).

    With r = beta error, u = (I + beta m)^-1 r: dr is the transposed solve, d(beta m) is -dr u^T.
    """
    given = Chunk(*inputs)
    beta_RC1 = as_column(given.beta_R1C)
    p, error_RCV, inverse_RCS, u_RCV = corrected(scale, narrow, s_RKV, given, marks, beta_RC1)
    row, column = positions(u_RCV.shape[1], u_RCV.shape[1])
    pair_1CS = marks.pair_1CS

    du_RCV = p.write_factor_RC1 * product(p.write_RCK, ds_RKV, NN, narrow)
    du_RCV += product(p.q_score_RCS, do_RCV, TN, narrow)
    dr_RCV = product(inverse_RCS, du_RCV, TN, narrow)
    dv_RCV = beta_RC1 * dr_RCV
    dlower_RCS = -product(dr_RCV, u_RCV, NT, narrow)
    dbeta_RC1 = jnp.sum(dr_RCV * error_RCV, axis=2, keepdims=True)
    dbeta_RC1 += jnp.sum(dlower_RCS * p.k_score_RCS, axis=2, keepdims=True)
    slopes = Slopes(
        q_score_RCS=jnp.where(pair_1CS, product(do_RCV, u_RCV, NT, narrow), 0),
        k_score_RCS=jnp.where(pair_1CS & (row > column), beta_RC1 * dlower_RCS, 0),
        q_read_RCK=p.q_factor_RC1 * product(do_RCV, s_RKV, NT, narrow),
        k_read_RCK=-p.k_factor_RC1 * product(dv_RCV, s_RKV, NT, narrow),
        write_RCK=p.write_factor_RC1 * product(u_RCV, ds_RKV, NT, narrow),
        kept_RK1=jnp.sum(p.keep_RK1 * s_RKV * ds_RKV, axis=2, keepdims=True),
    )
    before_RKV = p.keep_RK1 * ds_RKV
    before_RKV += product(p.q_read_RCK, p.q_factor_RC1 * do_RCV, TN, narrow)
    before_RKV -= product(p.k_read_RCK, p.k_factor_RC1 * dv_RCV, TN, narrow)
    gate_backward = vector_gate_backward if given.vector else scalar_gate_backward
    dq_GCK, dk_GCK, dgate = gate_backward(scale, narrow, given, marks, p, slopes)
    slopes = (dq_GCK, dk_GCK, dv_RCV, as_row(dbeta_RC1), dgate)
    return before_RKV, slopes[: len(inputs)]
