"""The memory of Titans: a network that learns by gradient steps with momentum and forgetting.

Titans: Learning to Memorize at Test Time (arXiv 2501.00663, sections 3.1 and 3.2). Gradients are
taken at the weights with which a chunk of the document begins. An error longer than `clip` counts
as one of that length (Huber's loss), where the paper has none: without it a deep memory diverges on
large activations. The paper gives no gates to start from; ours forget little and learn slowly.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from models import checks, mixer, weights
from models.parts import inner_loop
from models.parts.inner_loop import Gradients, Masks, Network, Positions, Term, mix

BIASES = (-5.0, 2.0, -2.0)  # forgetting 0.007, momentum 0.88, theta 0.12 of its largest


class Held(NamedTuple):
    """A row's memory, each network less what a document begins with."""

    taken: Network  # the weights at which this mini-batch's gradients are taken
    weights: Network
    momentum: Network


class Memory(nnx.Module):
    """S_t = eta_t S_{t-1} - theta_t grad |M(k_t) - v_t|^2 / 2,  M_t = (1 - alpha_t) M_{t-1} + S_t.

    (eqs. 12 to 14.) alpha, eta and theta are a number a head; theta is at most `rate`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        rngs: nnx.Rngs,
        *,
        depth: int,
        expand: int,
        rate: float,
        clip: float,
    ):
        for name, given in (("depth", depth), ("expand", expand)):
            if given < 1:
                raise ValueError(f"{name}={given} must be at least 1.")
        for name, given, usual in (("rate", rate, 0.1), ("clip", clip, 10.0)):
            if given <= 0:
                raise ValueError(f"{name}={given} must be > 0; usual: {usual}.")
        dim = checks.split_heads(width, heads)
        self.gates = weights.inward(rngs, width, (3, heads), ("parts", "heads"))
        first = lambda key, shape: jnp.broadcast_to(jnp.array(BIASES)[:, None], shape)
        self.gate_bias = weights.weight(rngs, first, (3, heads), ("parts", "heads"))
        sizes = (dim, *(depth - 1) * (expand * dim,), dim)
        self.w = nnx.List(
            weights.weight(rngs, weights.fan_in(a), (heads, a, b), ("heads", "key", "value"))
            for a, b in zip(sizes, sizes[1:], strict=False)
        )
        self.rate, self.clip = rate, clip

    def learned(self) -> Network:
        """The weights before the first token."""
        return tuple({"w": w[...]} for w in self.w)

    def fresh(self, batch: int, dtype: DTypeLike) -> Held:
        """What a row holds before its first token."""
        return Held(*3 * (inner_loop.zeros(batch, self.learned(), mixer.wide(dtype)),))

    def gated(self, x: Float[Array, "B T D"]) -> tuple[Array, Array, Array]:
        """log(1 - alpha), log eta and theta (B, T, H)."""
        x = x.astype(mixer.wide(x.dtype))  # the gates compound over a document
        gates_BTPH = weights.project("btd,dph->btph", x, self.gates) + self.gate_bias[...]
        keep_BTH = jax.nn.log_sigmoid(-gates_BTPH[:, :, 0])
        momentum_BTH = jax.nn.log_sigmoid(gates_BTPH[:, :, 1])
        return keep_BTH, momentum_BTH, self.rate * jax.nn.sigmoid(gates_BTPH[:, :, 2])

    def read(
        self, q_BCHK: Array, terms: list[Term], past: tuple[Gradients, Array] | None = None
    ) -> Array:
        """M(q) of the tokens' networks; `past` as in `inner_loop.apply`."""
        return inner_loop.apply(q_BCHK, terms, jax.nn.silu, past=past)[0]

    def slopes(self, k_BCHK: Array, v_BCHK: Array, terms: list[Term]) -> Gradients:
        """The gradients of |M(k) - v|^2 / 2, or of `clip` |M(k) - v| where the error is longer."""

        def loss(z_BCHK):
            square_BCH = jnp.sum(jnp.square(z_BCHK - v_BCHK), axis=-1)
            far = square_BCH > self.clip**2
            length_BCH = jnp.sqrt(jnp.where(far, square_BCH, self.clip**2))
            return jnp.where(far, self.clip * (length_BCH - self.clip / 2), square_BCH / 2)

        return inner_loop.gradients(k_BCHK, terms, jax.nn.silu, loss)


def taken(
    begin: tuple[Network, Network], held: Held, masks: Masks, after: Network | None = None
) -> list[Term]:
    """The networks at which gradients are taken; `after` those of the next mini-batch."""
    same_BC1, next_BC1 = _of_old(masks, held.taken[0]["w"].dtype)
    terms: list[Term] = [(1.0, begin[0]), (same_BC1, held.taken)]
    return terms if after is None else [*terms, (next_BC1, after)]


class Steps:
    """What a chunk's steps make of the memory that enters it.

    M_t = kept_t M + moved_t S - sum over s of pair_ts grad_s, where M and S are the weights and the
    momentum at the chunk's start, or at the document's if that is later.
    """

    def __init__(
        self,
        begin: tuple[Network, Network],
        held: Held,
        gates: tuple[Array, Array, Array],
        at: Positions,
        masks: Masks,
    ):
        self.begin, self.held, self.masks, self.at = begin, held, masks, at
        self._keep_BCH, momentum_BCH, self._theta_BCH = gates
        order = jnp.tril(at.document[:, :, None] == at.document[:, None, :])
        sees_BCS = order & at.real[:, None]
        self._log_kept_BCH = _sums(sees_BCS, self._keep_BCH)
        self._log_going_BCH = _sums(sees_BCS, momentum_BCH)
        self._passed_BHCS = _ratios(sees_BCS, self._log_going_BCH, self._log_going_BCH)
        self._kept_BCH, self._moved_BCH, self.pair_BHCS = self._rows(sees_BCS)
        self._same_BC1, self._next_BC1 = _of_old(masks, self._keep_BCH.dtype)
        self._old_BC1 = self._same_BC1 + self._next_BC1

    def current(self) -> list[Term]:
        """The networks after each token, but for the chunk's own gradients (`pair_BHCS`)."""
        return [
            (self._kept_BCH, self.begin[0]),
            (self._moved_BCH, self.begin[1]),
            (self._kept_BCH * self._old_BC1, self.held.weights),
            (self._moved_BCH * self._old_BC1, self.held.momentum),
        ]

    def finished(self, slopes: Gradients) -> Network:
        """The weights after the mini-batch in which the chunk begins."""
        rows = self._rows((self.masks.same & self.at.real)[:, None])
        return self._weights(rows, 0, slopes, 1.0)

    def leaving(self, slopes: Gradients, after: Network) -> Held:
        """The memory after the chunk."""
        old_B1 = self._old_BC1[:, -1]
        weights = self._weights(
            (self._kept_BCH, self._moved_BCH, self.pair_BHCS), -1, slopes, old_B1
        )
        going_BH = jnp.exp(self._log_going_BCH[:, -1])
        went_BSH = jnp.swapaxes(self._passed_BHCS[:, :, -1], 1, 2) * self._theta_BCH
        begin_momentum = self.begin[1]
        momentum = mix(
            (going_BH - 1, begin_momentum),
            (going_BH * old_B1, self.held.momentum),
            (-1.0, inner_loop.total(slopes, went_BSH, begin_momentum)),
        )
        same_B, next_B = self._same_BC1[:, -1, 0], self._next_BC1[:, -1, 0]
        return Held(mix((same_B, self.held.taken), (next_B, after)), weights, momentum)

    def _weights(self, rows, row, slopes, old):
        kept_BRH, moved_BRH, pair_BHRS = rows
        kept_BH, moved_BH = kept_BRH[:, row], moved_BRH[:, row]
        begin, begin_momentum = self.begin
        return mix(
            (kept_BH - 1, begin),
            (moved_BH, begin_momentum),
            (kept_BH * old, self.held.weights),
            (moved_BH * old, self.held.momentum),
            (-1.0, inner_loop.total(slopes, jnp.swapaxes(pair_BHRS[:, :, row], 1, 2), begin)),
        )

    def _rows(self, sees_BRS):
        """kept, moved (B, R, H) and pair (B, H, R, S) after the tokens that each row sees."""
        log_kept_BRH = _sums(sees_BRS, self._keep_BCH)
        kept_BHRS = _ratios(sees_BRS, log_kept_BRH, self._log_kept_BCH)
        going_BSH = jnp.exp(self._log_going_BCH)
        moved_BRH = inner_loop.einsum("bhrs,bsh->brh", kept_BHRS, going_BSH)
        pair_BHRS = inner_loop.einsum("bhrs,bhsj->bhrj", kept_BHRS, self._passed_BHCS)
        theta_BH1S = jnp.swapaxes(self._theta_BCH, 1, 2)[:, :, None]
        return jnp.exp(log_kept_BRH), moved_BRH, pair_BHRS * theta_BH1S


def _of_old(masks, dtype):
    """1 for the tokens of the mini-batch in which the chunk begins, and of its document's next."""
    return masks.same.astype(dtype)[..., None], masks.next.astype(dtype)[..., None]


def _sums(sees_BRS: Bool[Array, "B R S"], x_BSH: Float[Array, "B S H"]) -> Array:
    """The sum of x over the tokens that each row sees."""
    return inner_loop.einsum("brs,bsh->brh", sees_BRS.astype(x_BSH.dtype), x_BSH)


def _ratios(sees_BRS: Array, above_BRH: Array, below_BSH: Array) -> Array:
    """exp(above_r - below_s) (B, H, R, S) where the row sees the token, else 0."""
    gap_BHRS = jnp.moveaxis(above_BRH[:, :, None] - below_BSH[:, None], 3, 1)
    seen = sees_BRS[:, None]
    return jnp.where(seen, jnp.exp(jnp.where(seen, gap_BHRS, 0)), 0)
