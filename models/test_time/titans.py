"""Titans with the memory as a layer: a network that memorises, read by window attention.

Titans: Learning to Memorize at Test Time (arXiv 2501.00663, sections 3 and 4.3). Notable: what
surprises the memory (the gradient of its error) is written, past surprise goes on as momentum, and
a gate forgets. "titans" is memory and then attention in a sliding window (MAL); "titans_memory" is
the memory alone (LMM), of one layer. The memory reads persistent tokens before every document.
Differences: long errors are clipped (`models/parts/neural_memory.py`); the window does not hold the
persistent tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels.attention import attention, cached_attention
from models import cache, checks, layers, mixer, weights
from models.parts import inner_loop
from models.parts.neural_memory import Memory, Steps, taken


@dataclasses.dataclass
class Config:
    """The memory's network, and the attention that reads it."""

    heads: int = 4
    depth: int = 2  # L_M: the memory's linear layers
    expand: int = 2  # width between them over the head's
    batch: int = 16  # tokens whose gradients are taken at the same weights
    persistent: int = 4  # learned tokens that the memory reads before a document
    window: int = 64  # tokens that the attention after the memory sees; 0: no attention
    rate: float = 0.1  # largest theta
    clip: float = 10.0  # longest error that counts in full
    conv: int = 4
    rope_base: float = 10_000.0  # of the attention

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where heads or a size do not fit."""
        return Mixer(self, width, rngs)


CASES = {"titans": Config(), "titans_memory": Config(depth=1, window=0)}


class Mixer(mixer.Mixer):
    """y_t = M_t(q_t) of a `Memory` M, and o = window attention over y where there is a window."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        heads, window = config.heads, config.window
        dim = checks.split_heads(width, heads)
        if config.batch < 1:
            raise ValueError(f"batch={config.batch} tokens must be at least 1; usual: 16.")
        if config.persistent < 0:
            raise ValueError(f"persistent={config.persistent} is negative. Use 0 or more.")
        if window < 0:
            raise ValueError(f"window={window} is negative. Use 0 (no attention) or at least 1.")
        if window and dim % 2:
            near = checks.nearest_divisor(width // 2, heads)
            raise ValueError(
                f"heads={heads} makes heads of {dim} channels, which rotary positions cannot pair. "
                f"Use {near}."
            )
        names = ("heads", "key")
        self.qkv = weights.inward(rngs, width, (3, heads, dim), ("parts", *names))
        self.conv = layers.ShortConv(
            (3, heads, dim), ("parts", *names), rngs, width=config.conv, activation="silu"
        )
        self.memory = Memory(
            width,
            heads,
            rngs,
            depth=config.depth,
            expand=config.expand,
            rate=config.rate,
            clip=config.clip,
        )
        self.persistent = weights.weight(
            rngs, weights.normal(1.0), (config.persistent, width), ("parts", "embed")
        )
        self.z = weights.inward(rngs, width, (heads, dim), names)
        self.norm = weights.filled(rngs, 1.0, (heads, dim), names)
        self.o = weights.outward(rngs, (heads, dim), width, names)
        if window:
            self.read = weights.inward(rngs, width, (3, heads, dim), ("parts", *names))
            self.out = weights.outward(rngs, (heads, dim), width, names)
        self.batch, self.window, self.rope_base = config.batch, window, config.rope_base

    def __call__(self, x, *, segments=None, state=None):
        training = state is None
        old = self.init_state(x.shape[0], x.shape[1], x.dtype) if training else state
        inputs, tail = self._inputs(x, segments, old["qkv"])
        at, length_B = inner_loop.positions(old["length"], segments, x.shape[1], self.batch)
        body = self._chunk(self._beginning(x.dtype), training and segments is None)
        held, o_BTHK = inner_loop.scan(body, old["memory"], inputs, at, self.batch)
        z_BTHK = weights.project("btd,dhk->bthk", x, self.z)
        gate_BTHK = jax.nn.silu(z_BTHK.astype(o_BTHK.dtype))
        o_BTHK = layers.rms_norm(o_BTHK, self.norm[...]) * gate_BTHK
        y = weights.project("bthk,hkd->btd", o_BTHK.astype(x.dtype), self.o)
        new = {"qkv": tail, "memory": held, "length": length_B}
        if self.window:
            y, new["seen"] = self._attend(y, segments, old["seen"], training)
        return y, new

    def _inputs(self, x, segments, tail):
        """q, k, v and the gates, ready for the memory; and the convolution's tail."""
        qkv_BTPHK = weights.project("btd,dphk->btphk", x, self.qkv)
        qkv_BTPHK, tail = self.conv(qkv_BTPHK, segments=segments, state=tail)
        qkv_BTPHK = qkv_BTPHK.astype(mixer.wide(x.dtype))
        q_BTHK, k_BTHK = (layers.l2_norm(qkv_BTPHK[:, :, n]) for n in (0, 1))
        return (q_BTHK, k_BTHK, qkv_BTPHK[:, :, 2], self.memory.gated(x)), tail

    def _beginning(self, dtype):
        """The weights and the momentum with which every document begins: those after the persistent
        tokens."""
        learned = self.memory.learned()
        begin = learned, jax.tree.map(jnp.zeros_like, learned)
        count = self.persistent.shape[0]
        if not count:
            return begin
        inputs, _ = self._inputs(self.persistent[...].astype(dtype)[None], None, None)
        at, _ = inner_loop.positions(jnp.zeros(1, jnp.int32), None, count, self.batch)
        held = self.memory.fresh(1, dtype)
        held, _ = inner_loop.scan(self._chunk(begin, True), held, inputs, at, self.batch)
        weights, momentum = (
            jax.tree.map(lambda leaf: leaf[0], part) for part in (held.weights, held.momentum)
        )
        return inner_loop.mix((1.0, learned), (1.0, weights)), momentum

    def _chunk(self, begin, alone: bool):
        """The body of the scan; `alone` where mini-batches and chunks begin together."""
        memory = self.memory

        def body(held, inputs, at, masks):
            q_BCHK, k_BCHK, v_BCHK, gates = inputs
            steps = Steps(begin, held, gates, at, masks)
            after = held.weights
            if not alone:  # finish the mini-batch in which the chunk begins
                slopes = memory.slopes(k_BCHK, v_BCHK, taken(begin, held, masks))
                after = steps.finished(slopes)
            slopes = memory.slopes(k_BCHK, v_BCHK, taken(begin, held, masks, after))
            o_BCHK = memory.read(q_BCHK, steps.current(), (slopes, steps.pair_BHCS))
            return steps.leaving(slopes, after), o_BCHK * at.real[..., None, None]

        return body

    def _attend(self, y, segments, old, training):
        """Attention of each token to the memory's last outputs."""
        positions_BT = cache.positions(old["length"], segments, y.shape[1])
        qkv_BTPHK = weights.project("btd,dphk->btphk", y, self.read)
        q_BTHK, k_BTHK = (
            layers.rotary(qkv_BTPHK[:, :, n], positions_BT, self.rope_base) for n in (0, 1)
        )
        v_BTHK, window = qkv_BTPHK[:, :, 2], self.window
        o_BTHK, new = cache.attend(
            {"k": k_BTHK, "v": v_BTHK},
            old,
            positions_BT,
            segments,
            training=training,
            alone=lambda: attention(q_BTHK, k_BTHK, v_BTHK, segments=segments, window=window),
            beside=lambda seen, **where: cached_attention(
                q_BTHK, seen["k"], seen["v"], window=window, **where
            ),
        )
        return weights.project("bthk,hkd->btd", o_BTHK, self.out), new

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """The convolution's tail, the memory less what a document begins with and the tokens read;
        with a window, its ring of keys and values."""
        state = {
            "qkv": self.conv.init_state(batch, dtype),
            "memory": self.memory.fresh(batch, dtype),
            "length": jnp.zeros(batch, jnp.int32),
        }
        if self.window:
            shape, slots = self.norm.shape, min(capacity, self.window)
            state["seen"] = cache.empty(batch, slots, dtype, k=shape, v=shape)
        return state
