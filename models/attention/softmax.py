"""Softmax attention with grouped heads, a choice of positions and an optional sliding window.

Attention Is All You Need (arXiv 1706.03762, eq. 1), grouped queries (2305.13245), rotary positions
(2104.09864; `models/parts/rotary.py` has the scaled ones), ALiBi (2108.12409), sinks (gpt-oss,
2508.10925), soft-capping (Gemma 2, 2408.00118), QK-norm (2302.05442; as RMS norm in Qwen3), gated
output (2505.06708). Notable: the state is a ring of keys and values, so a window bounds it. A sink
starts at logit 0: one key of score 0 whose value is nothing.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from kernels.attention import attention, cached_attention
from models import cache, checks, layers, mixer, weights
from models.parts import rotary


@dataclasses.dataclass
class Config:
    """Multi-head (kv_heads = heads), grouped-query, or multi-query (kv_heads = 1) attention."""

    heads: int = 4
    kv_heads: int = 0  # 0: as many as heads
    head_dim: int = 0  # 0: width / heads
    window: int = 0  # tokens that a query sees, itself included; 0: all
    rope_base: float = 10_000.0  # 0: no positions
    positions: Literal["rope", "alibi", "none"] = "rope"
    rope_fraction: float = 1.0  # of a head's numbers that are turned
    rope_scaling: Literal["linear", "ntk", "yarn"] = "linear"
    rope_factor: float = 1.0  # context wanted / context trained
    rope_context: int = 2048  # trained context, for YaRN
    softcap: float = 0.0  # scores stay within +- softcap; 0: off
    sinks: bool = False  # one learned logit a head joins the softmax
    qk_norm: bool = False  # RMS norm of every head's q and k
    gated: bool = False  # sigmoid gate, from x, of every number of the heads' outputs

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where heads, kv_heads, positions and width do not fit."""
        return Mixer(self, width, rngs)


CASES = {
    "softmax": Config(),
    "gqa": Config(kv_heads=2),
    "mqa": Config(kv_heads=1),
    "window": Config(window=16),
    "sinks": Config(sinks=True, window=16),
    "softcap": Config(softcap=20.0),
    "qk_norm": Config(kv_heads=2, qk_norm=True),
    "alibi": Config(positions="alibi"),
    "yarn": Config(rope_scaling="yarn", rope_factor=4.0, rope_context=128, rope_fraction=0.5),
    "gated": Config(gated=True),
}


class Mixer(mixer.Mixer):
    """o_t = softmax_s(q_t k_s / sqrt(K)) v_s over the visible s, then the output projection."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        heads, groups = config.heads, config.kv_heads or config.heads
        dim = config.head_dim or checks.split_heads(width, heads)
        _check(config, dim)
        self.rotary = _rotary(config, dim)
        self.slopes = alibi_slopes(heads) if config.positions == "alibi" else None
        self.q = weights.inward(rngs, width, (heads, dim), ("heads", "key"))
        shared = "heads" if groups > 1 else "groups"  # a single head is whole on every device
        self.kv = weights.inward(rngs, width, (2, groups, dim), ("parts", shared, "key"))
        self.o = weights.outward(rngs, (heads, dim), width, ("heads", "key"))
        self.sinks = weights.filled(rngs, 0.0, (heads,), ("heads",)) if config.sinks else None
        self.norms = (
            weights.filled(rngs, 1.0, (2, dim), ("parts", "key")) if config.qk_norm else None
        )
        self.gate = (
            weights.inward(rngs, width, (heads, dim), ("heads", "key")) if config.gated else None
        )
        self.window, self.softcap = config.window, config.softcap
        self.cache_shape = (groups, dim)

    def __call__(self, x, *, segments=None, state=None):
        old = state or self.init_state(x.shape[0], x.shape[1], x.dtype)
        positions_BT = cache.positions(old["length"], segments, x.shape[1])
        q_BTHK, k_BTGK, v_BTGK = self._tokens(x, positions_BT)
        sinks = None if self.sinks is None else self.sinks[...]
        settings = {"window": self.window, "softcap": self.softcap, "sinks": sinks}

        def beside(seen, **where):
            biases = self._biases(x.dtype, where["positions"], where["kv_positions"])
            return cached_attention(q_BTHK, seen["k"], seen["v"], **biases, **settings, **where)

        o_BTHK, new = cache.attend(
            {"k": k_BTGK, "v": v_BTGK},
            old,
            positions_BT,
            segments,
            training=state is None,
            alone=lambda: attention(
                q_BTHK,
                k_BTGK,
                v_BTGK,
                segments=segments,
                log_forget=self._log_forget(q_BTHK),
                **settings,
            ),
            beside=beside,
        )
        if self.gate is not None:
            o_BTHK *= jax.nn.sigmoid(weights.project("btd,dhk->bthk", x, self.gate))
        return weights.project("bthk,hkd->btd", o_BTHK, self.o), new

    def _tokens(self, x, positions_BT):
        """q, k and v with norms and rotary positions."""
        q_BTHK = weights.project("btd,dhk->bthk", x, self.q)
        kv_BTPGK = weights.project("btd,dpgk->btpgk", x, self.kv)
        k_BTGK, v_BTGK = kv_BTPGK[:, :, 0], kv_BTPGK[:, :, 1]
        if self.norms is not None:
            q_BTHK = layers.rms_norm(q_BTHK, self.norms[0])
            k_BTGK = layers.rms_norm(k_BTGK, self.norms[1])
        if self.rotary is not None:
            q_BTHK = self.rotary(q_BTHK, positions_BT)
            k_BTGK = self.rotary(k_BTGK, positions_BT)
        return q_BTHK, k_BTGK, v_BTGK

    def _log_forget(self, q_BTHK):
        """ALiBi is forgetting at a constant rate: -slope (t - s) is the sum of -slope over s..t."""
        if self.slopes is None:
            return None
        slopes = jnp.asarray(self.slopes, mixer.wide(q_BTHK.dtype))
        return jnp.broadcast_to(-slopes, q_BTHK.shape[:3])

    def _biases(self, dtype, positions_BT, kv_positions_BS):
        """The same for a cache; positions count from the newest token, so that digits last."""
        if self.slopes is None:
            return {}
        slopes = jnp.asarray(self.slopes, mixer.wide(dtype))
        newest_B1 = positions_BT[:, -1:]
        bias = lambda at: (at - newest_B1)[..., None] * slopes
        return {"bias_q": -bias(positions_BT), "bias_k": bias(kv_positions_BS)}

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """An empty ring of `capacity` (at most `window`) slots."""
        slots = min(capacity, self.window or capacity)
        return cache.empty(batch, slots, dtype, k=self.cache_shape, v=self.cache_shape)


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """2^(-8 i / heads) for i = 1.. and a power of two of heads (section 3).

    Otherwise, as in the authors' code, the slopes of the power below, then every other slope of
    the power above.
    """
    power = 2 ** int(math.log2(heads))
    slopes = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-4 * np.arange(1, 2 * power, 2) / power)
    return tuple(float(slope) for slope in [*slopes, *between][:heads])


def _rotary(config: Config, dim: int) -> rotary.Rotary | None:
    """The turning of the positions, checked; None where there is none."""
    if config.positions != "rope" or not config.rope_base:
        return None
    turn = rotary.Rotary(
        config.rope_base,
        config.rope_fraction,
        config.rope_scaling,
        config.rope_factor,
        config.rope_context,
    )
    turn.check(dim)
    return turn


def _check(config: Config, dim: int) -> None:
    """ValueError, one line, for settings that do not fit."""
    heads, groups = config.heads, config.kv_heads or config.heads
    if heads < 1 or dim < 1:
        raise ValueError(f"heads={heads} of head_dim={dim}: both must be at least 1.")
    checks.groups(heads, groups)
    checks.window(config.window)
    if config.softcap < 0:
        raise ValueError(f"softcap={config.softcap} is negative. Use 0.0 (off) or 50.0.")
    if config.positions not in ("rope", "alibi", "none"):
        raise ValueError(
            f"positions={config.positions!r} is unknown. Use one of rope, alibi, none."
        )
