"""Attention-free transformer: a weighted mean of values under weights exp(key + bias), no queries.

An Attention Free Transformer (arXiv 2105.14103, eqs. 2 to 5), read causally. Notable: every channel
has its own weights, and the query only gates the mean. Simple has no biases; local has one learned
bias a distance within a window; conv has one a distance a head, made of a normed vector, a gain and
an offset that start at 0. Beyond the window all forms see everything before. Biases here depend on
the distance alone, where the paper's AFT-full and AFT-local learn one for each pair of absolute
positions: those fix a length, and a decoder that goes on has none. For the same reason the state is
small: sums over what has left the window, relative to the largest key so far, and the window.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from kernels import segments as boundaries
from kernels.linear_scan import linear_scan
from models import checks, mixer, weights


@dataclasses.dataclass
class Config:
    """Which biases join the keys."""

    form: Literal["simple", "local", "conv"] = "simple"
    window: int = 32  # distances 0 .. window - 1 with biases of their own
    heads: int = 4  # conv: groups of channels that share biases

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where form, window or heads do not fit."""
        return Mixer(self, width, rngs)


CASES = {
    "aft_simple": Config(),
    "aft_local": Config("local", window=12),
    "aft_conv": Config("conv", window=5),
}


class Row(NamedTuple):
    """The window's tokens and the row after them, each token beside its document."""

    k_BSC: Array
    v_BSC: Array
    document_BS: Array  # by order; -1: no token
    window: int

    def back(self, distance):
        """Keys, values and whether they exist, `distance` tokens before each token of the row."""
        length = self.k_BSC.shape[1] - self.window
        cut = lambda x, first: jax.lax.dynamic_slice_in_dim(x, first, length, axis=1)
        first = self.window - distance
        document = cut(self.document_BS, self.window)
        there = (cut(self.document_BS, first) == document) & (document >= 0)
        return cut(self.k_BSC, first), cut(self.v_BSC, first), there[..., None]


class Mixer(mixer.Mixer):
    """y_t = sigmoid(q_t) * sum_s exp(k_s + w_{t-s}) v_s / sum_s exp(k_s + w_{t-s}), times W_o."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        _check(config, width)
        self.qkv = weights.inward(rngs, width, (3, width), ("parts", "channels"))
        self.o = weights.outward(rngs, (width,), width, ("channels",))
        self.form, self.width = config.form, width
        self.window = 0 if config.form == "simple" else config.window
        small = weights.normal(0.01)
        if config.form == "local":
            self.bias = weights.weight(rngs, small, (config.window,), ("width",))
        if config.form == "conv":
            shape, dims = (config.heads, config.window), ("heads", "width")
            self.bias = weights.weight(rngs, small, shape, dims)
            self.gain = weights.filled(rngs, 0.0, shape[:1], dims[:1])
            self.offset = weights.filled(rngs, 0.0, shape[:1], dims[:1])

    def __call__(self, x, *, segments=None, state=None):
        old = state or self.init_state(x.shape[0], x.shape[1], x.dtype)
        dtype = mixer.wide(x.dtype)
        qkv_BTPC = weights.project("btd,dpc->btpc", x, self.qkv)
        k_BTC, v_BTC = qkv_BTPC[:, :, 1], qkv_BTPC[:, :, 2]
        row, kept = _row(k_BTC, v_BTC, segments, old, self.window)
        sums, far = _running(*row.back(self.window), segments, old, dtype)
        _, total_BTC, weight_BTC = sums
        if self.window:
            total_BTC, weight_BTC = _near(row, self._biases().astype(dtype), *sums)
        mean_BTC = total_BTC / jnp.where(weight_BTC > 0, weight_BTC, 1)
        y_BTC = jax.nn.sigmoid(qkv_BTPC[:, :, 0]) * mean_BTC.astype(x.dtype)
        return weights.project("btc,cd->btd", y_BTC, self.o), far | kept

    def _biases(self):
        """(window, C), or (window, 1) where the channels share them."""
        if self.form == "local":
            return self.bias[...][:, None]
        centred = self.bias[...] - jnp.mean(self.bias[...], axis=1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=1, keepdims=True) + 1e-12)
        bias_HW = self.gain[...][:, None] * normed + self.offset[...][:, None]
        return jnp.repeat(bias_HW.T, self.width // bias_HW.shape[0], axis=1)

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """The sums over tokens before the window, the window's keys and values, and how many."""
        sums = jnp.zeros((batch, self.width), mixer.wide(dtype))
        far = {"top": sums, "total": sums, "weight": sums}
        if not self.window:
            return far
        window = jnp.zeros((batch, self.window, self.width), dtype)
        return far | {"k": window, "v": window, "count": jnp.zeros(batch, jnp.int32)}


def _row(k_BTC, v_BTC, segments, old, window: int):
    """The window and the row as one, and the window after the row.

    The window stands right before the first real token, in place of padding where there is some.
    """
    batch, length = k_BTC.shape[:2]
    document_BT = jnp.zeros((batch, length), jnp.int32)
    before_B, end_B = jnp.zeros(batch, jnp.int32), jnp.full(batch, length)
    if segments is not None:
        real = boundaries.is_real(segments)
        document_BT = jnp.where(real, boundaries.ordinals(segments), -1)
        before_B = jnp.where(real.any(1), real.argmax(1), length)
        end_B = jnp.where(real.any(1), length - real[:, ::-1].argmax(1), length)
    if not window:
        return Row(k_BTC, v_BTC, document_BT, 0), {}
    filled = jnp.arange(window) >= window - old["count"][:, None]
    document_BS = jnp.concatenate([jnp.where(filled, 0, -1), document_BT], axis=1)
    k_BSC = jnp.concatenate([old["k"].astype(k_BTC.dtype), k_BTC], axis=1)
    v_BSC = jnp.concatenate([old["v"].astype(v_BTC.dtype), v_BTC], axis=1)
    if segments is not None:
        slot = jnp.arange(window + length)
        shifted = jnp.where(slot < before_B[:, None] + window, slot - before_B[:, None], slot)
        k_BSC, v_BSC = (_take(x, jnp.maximum(shifted, 0)) for x in (k_BSC, v_BSC))
        document_BS = jnp.take_along_axis(document_BS, jnp.maximum(shifted, 0), axis=1)
        document_BS = jnp.where(shifted < 0, -1, document_BS)
    last = end_B[:, None] + jnp.arange(window)
    own = jnp.take_along_axis(document_BS, last, axis=1)
    newest = jnp.max(document_BT, axis=1, initial=0, keepdims=True)
    there = (own == newest)[..., None]
    kept = {
        "k": jnp.where(there, _take(k_BSC, last), 0).astype(old["k"].dtype),
        "v": jnp.where(there, _take(v_BSC, last), 0).astype(old["v"].dtype),
        "count": jnp.sum(there[..., 0], axis=1, dtype=jnp.int32),
    }
    return Row(k_BSC, v_BSC, document_BS, window), kept


def _take(x_BSC, index_BN):
    return jnp.take_along_axis(x_BSC, index_BN[..., None], axis=1)


def _running(k_BTC, v_BTC, there_BT1, segments, old, dtype):
    """Sums over all tokens so far as (top, sum exp(k - top) v, sum exp(k - top)), and the last.

    `top` is the largest key so far; it changes no mean, so no gradient needs to pass it.
    """
    k_BTC, v_BTC = k_BTC.astype(dtype), v_BTC.astype(dtype)
    before_B1C = jnp.where(old["weight"] > 0, old["top"], -jnp.inf)[:, None]
    top_BTC, earlier_BTC = _largest(jnp.where(there_BT1, k_BTC, -jnp.inf), before_B1C, segments)
    safe_BTC = jnp.where(jnp.isfinite(top_BTC), top_BTC, 0)
    fall_BTC = jnp.where(jnp.isfinite(earlier_BTC), earlier_BTC - safe_BTC, 0)
    rise_BTC = jnp.where(there_BT1, k_BTC - safe_BTC, 0)
    entry_BTC = jnp.where(there_BT1, jnp.exp(rise_BTC), 0)
    total_BTC, total = linear_scan(
        entry_BTC * v_BTC, fall_BTC, segments=segments, initial_state=old["total"]
    )
    weight_BTC, weight = linear_scan(
        entry_BTC, fall_BTC, segments=segments, initial_state=old["weight"]
    )
    last = {"top": safe_BTC[:, -1], "total": total, "weight": weight}
    return (top_BTC, total_BTC, weight_BTC), last


def _largest(k_BTC, before_B1C, segments):
    """The largest key of the document up to each token, and up to the token before it."""
    k_BTC = jax.lax.stop_gradient(jnp.concatenate([before_B1C, k_BTC], axis=1))
    first = jnp.zeros((*k_BTC.shape[:2], 1), bool)
    if segments is not None:
        first = first.at[:, 1:, 0].set(boundaries.starts(segments))

    def join(a, b):
        return a[0] | b[0], jnp.where(b[0], b[1], jnp.maximum(a[1], b[1]))

    _, top_BSC = jax.lax.associative_scan(join, (first, k_BTC), axis=1)
    earlier_BTC = jnp.where(first[:, 1:], -jnp.inf, top_BSC[:, :-1])
    return top_BSC[:, 1:], earlier_BTC


def _near(row: Row, bias_WC, top_BTC, total_BTC, weight_BTC):
    """Add the window's tokens to the sums, one distance at a time."""
    distances = jnp.arange(row.window)
    dtype = top_BTC.dtype

    def score(distance):
        k_BTC, v_BTC, there_BT1 = row.back(distance)
        s_BTC = k_BTC.astype(dtype) + bias_WC[distance]
        return s_BTC, v_BTC.astype(dtype), there_BT1

    def higher(top, distance):
        s_BTC, _, there_BT1 = score(distance)
        return jnp.where(there_BT1, jnp.maximum(top, jax.lax.stop_gradient(s_BTC)), top), None

    new_top_BTC = jax.lax.stop_gradient(jax.lax.scan(higher, top_BTC, distances)[0])
    safe_BTC = jnp.where(jnp.isfinite(new_top_BTC), new_top_BTC, 0)

    @jax.checkpoint
    def share(distance):
        s_BTC, v_BTC, there_BT1 = score(distance)
        p_BTC = jnp.where(there_BT1, jnp.exp(jnp.where(there_BT1, s_BTC - safe_BTC, 0)), 0)
        return p_BTC * v_BTC, p_BTC

    def add(sums, distance):
        return jax.tree.map(jnp.add, sums, share(distance)), None

    fall_BTC = jnp.exp(jnp.where(jnp.isfinite(top_BTC), top_BTC - safe_BTC, 0))
    start = total_BTC * fall_BTC, weight_BTC * fall_BTC
    return jax.lax.scan(add, start, distances)[0]


def _check(config: Config, width: int) -> None:
    """ValueError, one line, for settings that do not fit."""
    if config.form not in ("simple", "local", "conv"):
        raise ValueError(f"form={config.form!r} is unknown. Use one of simple, local, conv.")
    if config.window < 1:
        raise ValueError(f"window={config.window} must be at least 1; 32 is usual.")
    if config.form == "conv":
        checks.split_heads(width, config.heads)
