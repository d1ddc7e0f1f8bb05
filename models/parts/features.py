"""Linear attention by feature maps: the normalised read, running maxima, quadratic features."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kernels import segments as boundaries
from kernels.gated_linear import gated_linear
from models import checks, mixer, weights
from models.mixer import wide

LEAST = 1e-6  # a sum of weights below this reads as this


def head_dims(width: int, heads: int, key_dim: int, value_dim: int) -> tuple[int, int]:
    """Key and value dimension of a head, where 0 stands for width / heads."""
    for name, size in (("key_dim", key_dim), ("value_dim", value_dim)):
        if size < 0:
            raise ValueError(f"{name}={size} is negative. Use 0 (width / heads) or at least 1.")
    if heads < 1:
        raise ValueError(f"heads={heads} must be at least 1. Use 1.")
    share = 0 if key_dim and value_dim else checks.split_heads(width, heads)
    return key_dim or share, value_dim or share


def normalised(
    q: Float[Array, "B T H F"],
    k: Float[Array, "B T H F"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H"] | Float[Array, " H"],
    *,
    segments: Int[Array, "B T"] | None,
    state: Float[Array, "B H F W"] | None,
    least: float | Float[Array, "B T H 1"] = LEAST,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H F W"]]:
    """o_t = sum_s w_ts v_s / max(sum_s w_ts, least), w_ts = q_t k_s times the decays after s.

    The sum of weights is one more value, of ones: the state has W = V + 1. Features in float32 are
    summed and divided in float32; o has v's dtype.
    """
    ones_BTH1 = jnp.ones((*v.shape[:-1], 1), k.dtype)
    v_BTHW = jnp.concatenate([v.astype(k.dtype), ones_BTH1], axis=-1)
    o_BTHW, s_BHFW = gated_linear(
        q, k, v_BTHW, log_decay, segments=segments, initial_state=state, scale=1.0
    )
    o_BTHW = o_BTHW.astype(wide(v.dtype))
    return (o_BTHW[..., :-1] / jnp.maximum(o_BTHW[..., -1:], least)).astype(v.dtype), s_BHFW


@dataclasses.dataclass
class Settings:
    """Heads and their dimensions."""

    heads: int = 4
    key_dim: int = 0  # per head; 0: width / heads
    value_dim: int = 0  # per head; 0: width / heads


class FeatureMixer(mixer.Mixer):
    """Base: o_t = sum_s w_ts v_s / sum_s w_ts with w_ts = f(q_t) f(k_s), s <= t.

    The subclass makes the features of `queries_keys`; `read` does the rest. `rows` gives the
    number of features of a key dimension.
    """

    def __init__(
        self, config: Settings, width: int, rngs: nnx.Rngs, rows: Callable[[int], int] = int
    ):
        heads = config.heads
        key, value = head_dims(width, heads, config.key_dim, config.value_dim)
        self.qk = weights.inward(rngs, width, (2, heads, key), ("parts", "heads", "key"))
        self.v = weights.inward(rngs, width, (heads, value), ("heads", "value"))
        self.o = weights.outward(rngs, (heads, value), width, ("heads", "value"))
        self.state_shape = (heads, rows(key), value + 1)

    def queries_keys(self, x: Float[Array, "B T D"]) -> Float[Array, "B T 2 H K"]:
        """q beside k."""
        return weights.project("btd,dphk->btphk", x, self.qk)

    def read(
        self,
        x: Float[Array, "B T D"],
        q: Float[Array, "B T H F"],
        k: Float[Array, "B T H F"],
        log_decay: Float[Array, "B T H"] | None = None,
        *,
        segments: Int[Array, "B T"] | None,
        state: Float[Array, "B H F W"] | None,
        least: float | Float[Array, "B T H 1"] = LEAST,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B H F W"]]:
        """The values that features q find among k, mapped by `o`; log_decay None: nothing fades."""
        if log_decay is None:
            log_decay = jnp.zeros(self.state_shape[0], wide(x.dtype))
        v_BTHV = weights.project("btd,dhv->bthv", x, self.v)
        o_BTHV, s_BHFW = normalised(
            q, k, v_BTHV, log_decay, segments=segments, state=state, least=least
        )
        return weights.project("bthv,hvd->btd", o_BTHV, self.o), s_BHFW

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Zeros (B, H, F, V + 1): S, and the sum of keys z as its last column."""
        return jnp.zeros((batch, *self.state_shape), wide(dtype))


def no_max(batch: int, shape: tuple[int, ...], dtype: DTypeLike) -> dict[str, Array]:
    """The state of `running_max` before the first token."""
    return {"top": jnp.zeros((batch, *shape), wide(dtype)), "begun": jnp.zeros(batch, bool)}


def running_max(
    x: Float[Array, "B T *shape"],
    segments: Int[Array, "B T"] | None,
    state: dict[str, Array] | None = None,
) -> tuple[Float[Array, "B T *shape"], Float[Array, "B T *shape"], dict[str, Array]]:
    """m_t = max of x_s over s <= t of t's document, the decay m_{t-1} - m_t <= 0, and the state.

    Sums of exp(x_s) kept as multiples of exp(m_t) shrink by that log decay, which is 0 where
    nothing came before. At padding m_t is x_t, so that exp(x_t - m_t) is finite there too. Neither
    has a gradient: a ratio of two such sums does not depend on the scale.
    """
    x = jax.lax.stop_gradient(x)
    old = state or no_max(x.shape[0], x.shape[2:], x.dtype)
    past = jax.lax.stop_gradient(old["top"])[:, None]
    past = jnp.where(_like(x, old["begun"][:, None]), past, -jnp.inf)
    real, start = jnp.ones(x.shape[:2], bool), jnp.zeros(x.shape[:2], bool)
    if segments is not None:
        real, start = boundaries.is_real(segments), boundaries.starts(segments)
    begun = old["begun"] | real.any(1)
    real, start = _like(x, real), jnp.broadcast_to(_like(x, start), x.shape)
    own = jnp.where(real, x, -jnp.inf)
    first = jnp.maximum(past, own[:, :1])  # a row's first token starts no document
    own = jnp.concatenate([first, own[:, 1:]], axis=1)
    _, top = jax.lax.associative_scan(_join, (start, own), axis=1)
    previous = jnp.concatenate([past, top[:, :-1]], axis=1)
    decay = jnp.where(start | jnp.isneginf(previous), 0, previous - top)
    last = jnp.where(_like(x[:, 0], begun), top[:, -1], 0)
    return jnp.where(real, top, x), decay, {"top": last, "begun": begun}


def _like(x, flags):
    """Flags with as many dimensions as x."""
    return flags.reshape(*flags.shape, *(1,) * (x.ndim - flags.ndim))


def _join(left, right):
    """Maxima of two stretches of a row; what comes before a document's start is forgotten."""
    (start_left, top_left), (start, top) = left, right
    return start_left | start, jnp.where(start, top, jnp.maximum(top_left, top))


def quadratic(x: Float[Array, "*shape K"]) -> Float[Array, "*shape P"]:
    """f(x) with f(x) f(y) = (x y)^2: squares and sqrt(2) x_i x_j, P = K (K + 1) / 2 numbers.

    Each pair i < j once: half the state of a full outer product.
    """
    rest = x.shape[-1]
    rows = []
    for i in range(rest):
        twice = jnp.asarray([1.0] + [2**0.5] * (rest - i - 1), x.dtype)
        rows.append(x[..., i:] * x[..., i : i + 1] * twice)
    return jnp.concatenate(rows, axis=-1)
