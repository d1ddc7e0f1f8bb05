"""The layer around an inner network of test-time training: what TTT-Linear and TTT-MLP share.

Learning to (Learn at Test Time) (arXiv 2407.04620): queries and keys from one map by two short
convolutions, rotary positions inside the mini-batch, a learned inner step size, an output norm
and a gate (its "Mamba backbone", section 2.7 and appendix A). W_0 has variance 1 / fan-in, where
the released code has 0.02^2 at every width: what enters the inner norm is then of size 1, and its
gradient bounded, in heads of any size.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models import checks, layers, mixer, weights
from models.parts import inner_loop

EPSILON = 1e-6


class Layer(mixer.Mixer):
    """W_t = W_0 - sum of eta_s grad |f(k_s; W) - v_s|^2 / 2,  o_t = f(q_t; W_t).

    f(x; W) = x + norm(net(x; W)) with a layer norm a head; net has linear layers of the widths
    `hidden` between those of a head, and gelu between them.
    """

    def __init__(
        self,
        width: int,
        rngs: nnx.Rngs,
        *,
        heads: int,
        hidden: tuple[int, ...],
        batch: int,
        rate: float,
        conv: int,
        rope_base: float,
    ):
        dim = checks.split_heads(width, heads)
        if dim % 2:
            near = checks.nearest_divisor(width // 2, heads)
            raise ValueError(
                f"heads={heads} makes heads of {dim} channels, which rotary positions cannot pair. "
                f"Use {near}."
            )
        if batch < 1:
            raise ValueError(f"batch={batch} tokens must be at least 1; the paper uses 16.")
        if rate <= 0:
            raise ValueError(f"rate={rate} must be > 0; the paper uses 1.0 (linear), 0.1 (MLP).")
        if rope_base <= 1:
            raise ValueError(f"rope_base={rope_base} must be above 1; usual: 10000.0.")
        names = ("heads", "key")
        self.qk = weights.inward(rngs, width, (heads, dim), names)
        self.q_conv = layers.ShortConv((heads, dim), names, rngs, width=conv)
        self.k_conv = layers.ShortConv((heads, dim), names, rngs, width=conv)
        self.vz = weights.inward(rngs, width, (2, heads, dim), ("parts", *names))
        self.rate = weights.weight(rngs, weights.normal(0.02), (width, heads), ("embed", "heads"))
        self.rate_bias = weights.filled(rngs, 0.0, (heads,), ("heads",))
        self.share = weights.filled(rngs, 0.0, (batch,), ("width",))
        self.gain = weights.filled(rngs, 1.0, (heads, dim), names)
        self.shift = weights.filled(rngs, 0.0, (heads, dim), names)
        sizes = (dim, *hidden, dim)
        shapes = [(heads, a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
        dims = ("heads", "key", "value")
        self.w = nnx.List(weights.weight(rngs, weights.fan_in(s[1]), s, dims) for s in shapes)
        biases = [(heads, 1, shape[2]) for shape in shapes]
        self.b = nnx.List(weights.filled(rngs, 0.0, shape, dims) for shape in biases)
        self.norm = weights.filled(rngs, 1.0, (heads, dim), names)
        self.norm_bias = weights.filled(rngs, 0.0, (heads, dim), names)
        self.o = weights.outward(rngs, (heads, dim), width, names)
        self.step, self.rope_base = rate / dim, rope_base

    def __call__(self, x, *, segments=None, state=None):
        old = self.init_state(x.shape[0], x.shape[1], x.dtype) if state is None else state
        dtype = mixer.wide(x.dtype)
        at, length_B = inner_loop.positions(
            old["length"], segments, x.shape[1], self.share.shape[0]
        )
        position_BT = at.position[:, : x.shape[1]]
        qk_BTHK = weights.project("btd,dhk->bthk", x, self.qk)
        q_BTHK, tail = self.q_conv(qk_BTHK, segments=segments, state=old["qk"])
        k_BTHK, _ = self.k_conv(qk_BTHK, segments=segments, state=old["qk"])
        vz_BTPHK = weights.project("btd,dphk->btphk", x, self.vz)
        rate_BTH = weights.project("btd,dh->bth", x, self.rate).astype(dtype) + self.rate_bias[...]
        inputs = (
            layers.rotary(q_BTHK, position_BT, self.rope_base).astype(dtype),
            layers.rotary(k_BTHK, position_BT, self.rope_base).astype(dtype),
            vz_BTPHK[:, :, 0].astype(dtype),
            self.step * jax.nn.sigmoid(rate_BTH),
        )
        carry = old["start"], old["sums"]
        alone = state is None and segments is None
        (start, sums), o_BTHK = inner_loop.scan(
            self._chunk(alone), carry, inputs, at, self.share.shape[0]
        )
        o_BTHK = self._normed(o_BTHK).astype(x.dtype) * jax.nn.gelu(vz_BTPHK[:, :, 1])
        y = weights.project("bthk,hkd->btd", o_BTHK, self.o)
        return y, {"qk": tail, "start": start, "sums": sums, "length": length_B}

    def _chunk(self, alone: bool):
        """The body of the scan; `alone` where mini-batches and chunks begin together."""
        learned, gelu = self._learned(), jax.nn.gelu
        gain, shift = self.gain[...], self.shift[...]
        size = self.share.shape[0]
        share_C = jax.nn.relu(1 / jnp.arange(1, size + 1) + self.share[...])

        def normed(z_BCHK):
            return layers.layer_norm(z_BCHK, gain, shift, EPSILON)

        def body(carry, inputs, at, masks):
            start, sums = carry
            q_BCHK, k_BCHK, v_BCHK, rate_BCH = inputs
            loss = lambda z_BCHK: jnp.square(normed(z_BCHK) - (v_BCHK - k_BCHK)) / 2
            dtype = rate_BCH.dtype
            same_BC1 = masks.same.astype(dtype)[..., None]
            next_BC1 = masks.next.astype(dtype)[..., None]
            terms = [(1.0, learned), (same_BC1, start)]
            full = sums
            if not alone:  # finish the mini-batch in which the chunk begins
                found = inner_loop.gradients(k_BCHK, terms, gelu, loss)
                weight_BCH = rate_BCH * (masks.same & at.real)[..., None]
                full = inner_loop.mix((1.0, sums), (1.0, inner_loop.total(found, weight_BCH, sums)))
            after = inner_loop.mix((1.0, start), (-share_C[-1], full))
            terms.append((next_BC1, after))
            found = inner_loop.gradients(k_BCHK, terms, gelu, loss)
            share_BC1 = share_C[at.position][..., None]
            pair_BHCS = jnp.swapaxes(rate_BCH, 1, 2)[:, :, None] * share_BC1[:, None]
            terms.append((-share_BC1 * same_BC1, sums))
            past = found, pair_BHCS * masks.pair[:, None]
            z_BCHK, _ = inner_loop.apply(q_BCHK, terms, gelu, past=past)
            o_BCHK = (q_BCHK + normed(z_BCHK)) * at.real[..., None, None]
            same_B, next_B = same_BC1[:, -1, 0], next_BC1[:, -1, 0]
            start = inner_loop.mix((same_B, start), (next_B, after))
            added = inner_loop.total(found, rate_BCH * masks.last[..., None], sums)
            return (start, inner_loop.mix((same_B, sums), (1.0, added))), o_BCHK

        return body

    def _learned(self) -> inner_loop.Network:
        """W_0."""
        pairs = zip(self.w, self.b, strict=True)
        return tuple({"w": w[...], "b": b[...]} for w, b in pairs)

    def _normed(self, o_BTHK):
        """A layer norm over all heads together."""
        flat_BTD = o_BTHK.reshape(*o_BTHK.shape[:2], -1)
        gain, bias = self.norm[...].reshape(-1), self.norm_bias[...].reshape(-1)
        return layers.layer_norm(flat_BTD, gain, bias, EPSILON).reshape(o_BTHK.shape)

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """The convolutions' tail; the weights with which the current mini-batch began, less W_0;
        the sum of its gradients so far; and the tokens read."""
        learned, wide = self._learned(), mixer.wide(dtype)
        return {
            "qk": self.q_conv.init_state(batch, dtype),
            "start": inner_loop.zeros(batch, learned, wide),
            "sums": inner_loop.zeros(batch, learned, wide),
            "length": jnp.zeros(batch, jnp.int32),
        }
