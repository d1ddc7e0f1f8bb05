"""A small network in a layer's state that learns while the layer reads.

Its weights take gradient steps on the tokens. Gradients of a mini-batch of tokens are all taken at
the weights with which the mini-batch begins, so that a chunk of tokens is worked out at once: the
weights after token t are a few known networks less a weighted sum of the outer products a_s e_s^T
of earlier tokens s, and they are applied without being formed (the dual form of arXiv 2407.04620,
section 2.5). Mini-batches are counted from a document's first token.

A network is a tuple of layers {"w": (B, H, F, G), "b": (B, H, 1, G)}, "b" optional; without B
where all rows share it.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels import chunks
from kernels import segments as boundaries
from models import cache

Network = tuple[dict[str, Array], ...]
Term = tuple[Array | float, Network]  # a network and each token's share of it (B, C, H or 1)
Gradients = tuple[tuple[Array, Array], ...]  # a layer's inputs and errors (B, C, H, F), (.., G)

einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class Positions(NamedTuple):
    """Where tokens stand, all (B, T); padding has the numbers of the real token before it."""

    real: Bool[Array, "B T"]
    position: Int[Array, "B T"]  # inside the mini-batch, from 0
    group: Int[Array, "B T"]  # mini-batches begun in this row
    document: Int[Array, "B T"]  # documents begun in this row after its first


class Masks(NamedTuple):
    """What a chunk's tokens have to do with the mini-batch in which the chunk begins."""

    same: Bool[Array, "B C"]  # of that mini-batch
    next: Bool[Array, "B C"]  # of its document's next mini-batch (a chunk has no third)
    last: Bool[Array, "B C"]  # real, and of the mini-batch in which the chunk ends
    pair: Bool[Array, "B C S"]  # both real, of one mini-batch, S not after C


def apply(
    x_BCHF: Float[Array, "B C H F"],
    terms: Sequence[Term],
    activation: Callable[[Array], Array],
    *,
    past: tuple[Gradients, Float[Array, "B H C S"]] | None = None,
    shifts: Sequence[Array] | None = None,
) -> tuple[Float[Array, "B C H G"], list[Array]]:
    """Each token through its own sum of networks; the result and the inputs of every layer.

    With `past`, gradients and pairs, token C's network is less pair[C, S] times the gradient of
    token S. `shifts` are added to what each layer gives.
    """
    inputs = []
    for n in range(len(terms[0][1])):
        x_BCHF = activation(x_BCHF) if n else x_BCHF
        inputs.append(x_BCHF)
        parts = [_share(share) * _layer(x_BCHF, network[n]) for share, network in terms]
        z_BCHG = functools.reduce(operator.add, parts)
        if past is not None:
            slopes, pair_BHCS = past
            a_BSHF, e_BSHG = slopes[n]
            score_BHCS = einsum("bchf,bshf->bhcs", x_BCHF, a_BSHF)
            score_BHCS = pair_BHCS * (score_BHCS + ("b" in terms[0][1][n]))
            z_BCHG = z_BCHG - einsum("bhcs,bshg->bchg", score_BHCS, e_BSHG)
        x_BCHF = z_BCHG if shifts is None else z_BCHG + shifts[n]
    return x_BCHF, inputs


def _share(share):
    return share[..., None] if isinstance(share, jax.Array) else share


def _layer(x_BCHF, layer):
    rows = "b" if layer["w"].ndim == 4 else ""
    z_BCHG = einsum(f"bchf,{rows}hfg->bchg", x_BCHF, layer["w"])
    return z_BCHG + jnp.swapaxes(layer["b"], -2, -3) if "b" in layer else z_BCHG


def gradients(
    x_BCHF: Float[Array, "B C H F"],
    terms: Sequence[Term],
    activation: Callable[[Array], Array],
    loss: Callable[[Array], Array],
) -> Gradients:
    """Each token's gradient of the sum of `loss` at its own network, as inputs and errors."""

    def lost(shifts):
        z_BCHG, inputs = apply(x_BCHF, terms, activation, shifts=shifts)
        return jnp.sum(loss(z_BCHG)), inputs

    widths = [layer["w"].shape[-1] for layer in terms[0][1]]
    shifts = [jnp.zeros((*x_BCHF.shape[:-1], width), x_BCHF.dtype) for width in widths]
    errors, inputs = jax.grad(lost, has_aux=True)(shifts)
    return tuple(zip(inputs, errors, strict=True))


def total(gradients: Gradients, weight_BCH: Float[Array, "B C H"], like: Network) -> Network:
    """The sum of the tokens' gradients with these weights, a network shaped as `like`."""
    summed = []
    for (a_BCHF, e_BCHG), layer in zip(gradients, like, strict=True):
        e_BCHG = weight_BCH[..., None] * e_BCHG
        summed.append({"w": einsum("bchf,bchg->bhfg", a_BCHF, e_BCHG)})
        if "b" in layer:
            summed[-1]["b"] = e_BCHG.sum(1)[:, :, None]
    return tuple(summed)


def mix(*parts: tuple[Array | float, Network]) -> Network:
    """The sum of networks, each times a number, a row's (B,) or a row's and head's (B, H)."""

    def scaled(scale, x):
        if isinstance(scale, jax.Array):
            scale = scale.reshape(*scale.shape, *(1,) * (4 - scale.ndim))
        return scale * x

    scales, networks = zip(*parts, strict=True)
    add = lambda *leaves: functools.reduce(operator.add, map(scaled, scales, leaves))
    return jax.tree.map(add, *networks)


def zeros(batch: int, like: Network, dtype: Any) -> Network:
    """A network of zeros for each row."""
    return jax.tree.map(lambda leaf: jnp.zeros((batch, *leaf.shape), dtype), like)


def positions(
    before_B: Int[Array, " B"], segments: Int[Array, "B T"] | None, length: int, size: int
) -> tuple[Positions, Int[Array, " B"]]:
    """Positions of a row's tokens in mini-batches of `size`, and the tokens of its last document.

    `before_B` is how many tokens of the first document came before the row. The positions go on
    over the padding with which `scan` fills the row.
    """
    if segments is None:
        segments = jnp.ones((before_B.shape[0], length), jnp.int32)
    _, _, whole = _layout(length, size)
    segments = jnp.pad(segments, ((0, 0), (0, whole - length)))
    position_BT, after_B = cache.document_positions(before_B, segments, whole)
    real_BT = boundaries.is_real(segments)
    within_BT = position_BT % size
    group_BT = jnp.cumsum(real_BT & (within_BT == 0), axis=1, dtype=jnp.int32)
    return Positions(real_BT, within_BT, group_BT, boundaries.ordinals(segments)), after_B


def masks(at: Positions, group_B: Int[Array, " B"], document_B: Int[Array, " B"]) -> Masks:
    """The masks of a chunk that begins in mini-batch `group_B` of `document_B`."""
    same_BC = at.group == group_B[:, None]
    order = jnp.tril(jnp.ones((at.real.shape[1],) * 2, bool))
    pair_BCS = order & (at.group[:, :, None] == at.group[:, None, :])
    return Masks(
        same=same_BC,
        next=~same_BC & (at.document == document_B[:, None]),
        last=at.real & (at.group == at.group[:, -1:]),
        pair=pair_BCS & at.real[:, :, None] & at.real[:, None, :],
    )


def _layout(length: int, size: int) -> tuple[int, int, int]:
    """Tokens of a chunk, chunks of a block, and tokens of the row once filled to whole blocks."""
    chunk = min(size, length)
    count = -(-length // chunk)
    blocks = -(-count // 16)
    block = -(-count // blocks)
    return chunk, block, blocks * block * chunk


def scan(
    body: Callable, carry: Any, inputs: Any, at: Positions, size: int
) -> tuple[Any, Float[Array, "B T ..."]]:
    """`body(carry, inputs, positions, masks) -> (carry, out)` over chunks of at most `size` tokens.

    A chunk is no longer than a mini-batch, so it holds tokens of at most two mini-batches of the
    document in which it begins, and those of a document that begins in it are of its first. For
    the backward pass one carry a block of chunks is kept, and blocks and chunks run once more.
    """
    length = jax.tree.leaves(inputs)[0].shape[1]
    chunk, block, whole = _layout(length, size)

    def cut(x):
        x = x.reshape(x.shape[0], -1, chunk, *x.shape[2:])
        return jnp.moveaxis(x, 0, 1)

    def step(carry, part):
        carry, group_B, document_B = carry
        inputs, at = part
        carry, out = body(carry, inputs, at, masks(at, group_B, document_B))
        return (carry, at.group[:, -1], at.document[:, -1]), out

    run = functools.partial(jax.lax.scan, jax.checkpoint(step, prevent_cse=False))
    first_B = jnp.zeros(at.real.shape[0], jnp.int32)
    start, parts = (carry, first_B, first_B), jax.tree.map(cut, (chunks.pad(inputs, whole), at))
    if block * chunk == whole:
        (carry, _, _), out = run(start, parts)
    else:
        blocks = jax.tree.map(lambda x: x.reshape(-1, block, *x.shape[1:]), parts)
        (carry, _, _), out = jax.lax.scan(jax.checkpoint(run, prevent_cse=False), start, blocks)
        out = out.reshape(-1, *out.shape[2:])
    out = jnp.moveaxis(out, 0, 1)
    return carry, out.reshape(out.shape[0], whole, *out.shape[3:])[:, :length]
