"""Titans with the memory as context: attention inside segments, to what the memory recalls too.

Titans: Learning to Memorize at Test Time (arXiv 2501.00663, sections 3 and 4.1, MAC). Notable: a
segment's tokens ask the memory of the segments before, attend to persistent tokens, to what it
recalled and to each other, and what attention gives is memorised. Segments are counted inside the
document, and gradients are taken at the weights with which a segment begins. Differences: a token
sees only what it and earlier tokens recalled, so that no output depends on a later input; nothing
is convolved; y and M(y) are joined by norm(y) * sigmoid(W M(y)), where the paper leaves the gate
open; long errors are clipped (`models/parts/neural_memory.py`).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models import checks, layers, mixer, weights
from models.parts import inner_loop
from models.parts.neural_memory import Memory, Steps, taken


@dataclasses.dataclass
class Config:
    """The memory's network and the attention inside segments."""

    heads: int = 4
    depth: int = 2  # L_M: the memory's linear layers
    expand: int = 1  # width between them over the head's
    segment: int = 16  # tokens that attend to each other and share the weights of gradients
    persistent: int = 4  # learned tokens that every token attends to
    rate: float = 0.1  # largest theta
    clip: float = 10.0  # longest error that counts in full
    rope_base: float = 10_000.0

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where heads or a size do not fit."""
        return Mixer(self, width, rngs)


CASES = {"titans_context": Config()}


class Mixer(mixer.Mixer):
    """y = attention(x; [persistent, M(q(x)), x]) in a segment, o_t = norm(y_t) * sigmoid(M_t(y_t)),
    where the memory M_t learned y up to t and M is its state before the segment."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        heads = config.heads
        dim = checks.split_heads(width, heads)
        if dim % 2:
            near = checks.nearest_divisor(width // 2, heads)
            raise ValueError(
                f"heads={heads} makes heads of {dim} channels, which rotary positions cannot pair. "
                f"Use {near}."
            )
        if config.segment < 1:
            raise ValueError(f"segment={config.segment} tokens must be at least 1; usual: 16.")
        if config.persistent < 0:
            raise ValueError(f"persistent={config.persistent} is negative. Use 0 or more.")
        names = ("heads", "key")
        self.ask = weights.inward(rngs, width, (heads, dim), names)
        self.recall = weights.outward(rngs, (heads, dim), width, names)
        self.q = weights.inward(rngs, width, (heads, dim), names)
        self.kv = weights.inward(rngs, width, (2, heads, dim), ("parts", *names))
        self.persistent = weights.weight(
            rngs, weights.normal(1.0), (config.persistent, width), ("parts", "embed")
        )
        self.out = weights.outward(rngs, (heads, dim), width, names)
        self.learn = weights.inward(rngs, width, (3, heads, dim), ("parts", *names))
        self.memory = Memory(
            width,
            heads,
            rngs,
            depth=config.depth,
            expand=config.expand,
            rate=config.rate,
            clip=config.clip,
        )
        self.gate = weights.outward(rngs, (heads, dim), width, names)
        self.norm = layers.RMSNorm(width, rngs)
        self.segment, self.rope_base = config.segment, config.rope_base

    def __call__(self, x, *, segments=None, state=None):
        old = self.init_state(x.shape[0], x.shape[1], x.dtype) if state is None else state
        at, length_B = inner_loop.positions(old["length"], segments, x.shape[1], self.segment)
        position_BT = at.position[:, : x.shape[1]]
        ask_BTHK = weights.project("btd,dhk->bthk", x, self.ask).astype(mixer.wide(x.dtype))
        q_BTHK = weights.project("btd,dhk->bthk", x, self.q)
        inputs = (
            layers.l2_norm(ask_BTHK),
            layers.rotary(q_BTHK, position_BT, self.rope_base),
            self._keys(x, position_BT),
        )
        body = self._chunk(x.dtype, state is None and segments is None)
        carry = old["memory"], old["seen"]
        (memory, seen), y = inner_loop.scan(body, carry, inputs, at, self.segment)
        return y, {"memory": memory, "seen": seen, "length": length_B}

    def _keys(self, x, position_BT):
        """Keys and values (B, T, 2, H, K) of tokens in the residual stream."""
        kv_BTPHK = weights.project("btd,dphk->btphk", x, self.kv)
        k_BTHK = layers.rotary(kv_BTPHK[:, :, 0], position_BT, self.rope_base)
        return jnp.stack([k_BTHK, kv_BTPHK[:, :, 1]], axis=2)

    def _chunk(self, dtype, alone: bool):
        """The body of the scan; `alone` where segments and chunks begin together."""
        memory = self.memory
        learned = memory.learned()
        begin = learned, jax.tree.map(jnp.zeros_like, learned)
        persistent_1PD = self.persistent[...].astype(dtype)[None]
        always_1PPHK = self._keys(persistent_1PD, jnp.zeros(persistent_1PD.shape[:2], jnp.int32))

        def body(carry, inputs, at, masks):
            held, seen_BSRPHK = carry
            ask_BCHK, q_BCHK, own_BCPHK = inputs
            before_BS = _slots_before(at, masks, seen_BSRPHK.shape[1])

            def attend(terms):
                """y, and the keys and values of what was recalled and of the tokens."""
                recalled_BCHK = memory.read(ask_BCHK, terms).astype(dtype)
                recalled_BCD = weights.project("bthk,hkd->btd", recalled_BCHK, self.recall)
                new_BCRPHK = jnp.stack([self._keys(recalled_BCD, at.position), own_BCPHK], axis=2)
                groups = [(new_BCRPHK, masks.pair)]
                if not alone:
                    groups.append((seen_BSRPHK, masks.same[..., None] & before_BS[:, None]))
                y_BCHK = _attention(q_BCHK, always_1PPHK, groups)
                return weights.project("bthk,hkd->btd", y_BCHK, self.out), new_BCRPHK

            after = held.weights
            if not alone:  # finish the segment in which the chunk begins
                terms = taken(begin, held, masks)
                y, _ = attend(terms)
                _, k_BCHK, v_BCHK = self._learned_from(y)
                steps = Steps(begin, held, memory.gated(y), at, masks)
                after = steps.finished(memory.slopes(k_BCHK, v_BCHK, terms))
            terms = taken(begin, held, masks, after)
            y, new_BCRPHK = attend(terms)
            q_BCHK, k_BCHK, v_BCHK = self._learned_from(y)
            steps = Steps(begin, held, memory.gated(y), at, masks)
            slopes = memory.slopes(k_BCHK, v_BCHK, terms)
            m_BCHK = memory.read(q_BCHK, steps.current(), (slopes, steps.pair_BHCS))
            gate = weights.project("bthk,hkd->btd", m_BCHK.astype(dtype), self.gate)
            y = jnp.where(at.real[..., None], self.norm(y) * jax.nn.sigmoid(gate), 0)
            seen_BSRPHK = _written(seen_BSRPHK, new_BCRPHK, at, masks)
            return (steps.leaving(slopes, after), seen_BSRPHK), y

        return body

    def _learned_from(self, y):
        """The memory's queries, keys and values of what attention gave."""
        qkv_BCPHK = weights.project("btd,dphk->btphk", y, self.learn)
        qkv_BCPHK = qkv_BCPHK.astype(mixer.wide(y.dtype))
        q_BCHK, k_BCHK = (layers.l2_norm(qkv_BCPHK[:, :, n]) for n in (0, 1))
        return q_BCHK, k_BCHK, qkv_BCPHK[:, :, 2]

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """The memory less its learned weights, keys and values of the current segment's recalled
        and own tokens (B, S, 2, 2, H, K), and the tokens read."""
        shape = (batch, self.segment, 2, 2, *self.q.shape[1:])
        return {
            "memory": self.memory.fresh(batch, dtype),
            "seen": jnp.zeros(shape, dtype),
            "length": jnp.zeros(batch, jnp.int32),
        }


def _slots_before(at, masks, slots):
    """The slots that hold earlier tokens of the segment in which the chunk begins (B, S)."""
    first_B = jnp.where(masks.same & at.real, at.position, slots).min(1)
    return jnp.arange(slots) < first_B[:, None]


def _written(seen_BSRPHK, new_BCRPHK, at, masks):
    """The slots of the segment in which the chunk ends."""
    slots = jnp.arange(seen_BSRPHK.shape[1])
    put_BCS = masks.last[..., None] & (at.position[..., None] == slots)
    put_BCS = put_BCS.astype(new_BCRPHK.dtype)
    kept_BS = masks.same[:, -1:] * (1 - put_BCS.sum(1))
    kept_BS1111 = kept_BS.astype(seen_BSRPHK.dtype)[..., None, None, None, None]
    return kept_BS1111 * seen_BSRPHK + inner_loop.einsum("bcs,bcrphk->bsrphk", put_BCS, new_BCRPHK)


def _attention(q_BCHK, always_1PPHK, groups):
    """Softmax attention to the persistent tokens and to groups (B, S, 2, 2, H, K) with a mask."""
    dtype = mixer.wide(q_BCHK.dtype)
    batch, chunk = q_BCHK.shape[:2]
    always = jnp.broadcast_to(always_1PPHK, (batch, *always_1PPHK.shape[1:]))
    sees = [jnp.ones((batch, chunk, always.shape[1]), bool)]
    kv = [always]
    for group_BSRPHK, mask_BCS in groups:
        for n in (0, 1):
            kv.append(group_BSRPHK[:, :, n].astype(always.dtype))
            sees.append(jnp.broadcast_to(mask_BCS, (batch, chunk, mask_BCS.shape[-1])))
    kv_BSPHK, sees_BCS = jnp.concatenate(kv, axis=1), jnp.concatenate(sees, axis=2)
    score_BHCS = jnp.einsum(
        "bchk,bshk->bhcs", q_BCHK, kv_BSPHK[:, :, 0], preferred_element_type=dtype
    )
    score_BHCS = score_BHCS * q_BCHK.shape[-1] ** -0.5
    least = jnp.finfo(dtype).min
    p_BHCS = jax.nn.softmax(jnp.where(sees_BCS[:, None], score_BHCS, least), axis=-1)
    return jnp.einsum("bhcs,bshk->bchk", p_BHCS.astype(q_BCHK.dtype), kv_BSPHK[:, :, 1])
