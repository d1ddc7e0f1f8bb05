"""The contract fails where what it names is broken: faults planted into small mixers.

Most faults are chosen by an array, so that they share their programs; those that change what a
program is made of are chosen as it is traced.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels import segments as boundaries
from models import mixer, weights
from tests import contract

CHANNELS = 8
# What is wrong, and the check that must say so.
CHOSEN = {
    "a later token is read": "causality",
    "a later token is read where a state came in": "causality",
    "the sign of a later token is read": "shape_and_dtype",
    "a token does not read itself": "causality",
    "the recurrence goes on into the next document": "packing",
    "the convolution reads the document before": "packing",
    "a number that comes back is the old document": "packing",
    "a gradient crosses a boundary, the value does not": "packing",
    "padding moves the state": "packing",
    "padding moves the gradients": "packing",
    "the state that came in reaches every document": "packing",
    "the tail that came in reaches every document": "packing",
    "a row with segments is read otherwise": "token_by_token",
    "a weight has no gradient without segments": "without_segments",
    "the state is that before the last token": "split",
    "the convolution forgets between two pieces": "split",
    "no gradient goes into the state that came in": "split",
    "no gradient comes back from the last state": "split",
    "the state is rounded to bfloat16": "split",
    "the state counts each call as a token": "token_by_token",
    "a call with one token differs": "token_by_token",
    "float32 is off by 1e-4": "reference",
    "a call without a state begins elsewhere": "states",
    "large activations overflow": "extremes",
}
TRACED = {
    "a weight has an unknown dimension": "names",
    "a skip is applied in bfloat16": "bfloat16",
    "a gain is applied in bfloat16": "bfloat16",
    "a bias is added in bfloat16": "bfloat16",
    "the sum over tokens is bfloat16": "bfloat16",
    "the output has another dtype": "bfloat16",
    "a fresh state is not zero": "states",
    "the state changes its dtype": "states",
    "a call draws its own noise": "extremes",
    "each device sums its own channels": "sharded",
    "each device sums its own channels of a state": "sharded",
}
ENCODERS = {
    "an encoder reads padding": "packing",
    "an encoder reads the other documents": "packing",
    "an encoder reads nothing ahead": "causality",
    "an encoder takes a state": "states",
}

SAYS = {
    "shape_and_dtype": "^first ",
    "causality": "output depends on|does not depend on its own",
    "packing": "^(packed|padded|continued)",
    "without_segments": "^without segments",
    "split": "^in (other )?pieces",
    "token_by_token": "token by token",
    "bfloat16": "bfloat16|float32",
    "reference": "^float64 reference",
    "names": "unknown weight dimension",
    "sharded": "sharded: ",
    "states": "fresh state|unexpected JAX type|DID NOT RAISE",
    "extremes": "not finite|not equal",
}


@dataclasses.dataclass
class Config:
    """Empty, or one of the faults above."""

    fault: str = ""

    def build(self, width, rngs):
        kind = Encoder if "encoder" in self.fault else Mixer
        return kind(self.fault, width, rngs)


class Mixer(mixer.Mixer):
    """u = x W, h_t = a h_{t-1} + u_t + m u_{t-1}, y = g (h + s u) O + b."""

    def __init__(self, fault, width, rngs):
        vector = lambda value, name="channels": weights.filled(rngs, value, (CHANNELS,), (name,))
        self.w = weights.inward(rngs, width, (CHANNELS,), ("channels",))
        self.o = weights.outward(rngs, (CHANNELS,), width, ("channels",))
        self.m, self.s, self.a, self.b = vector(0.7), vector(1.3), vector(0.8), vector(0.2)
        unknown = fault == "a weight has an unknown dimension"
        self.g = vector(1.1, "canals" if unknown else "channels")
        flags = np.array([name == fault for name in CHOSEN], np.float32)
        init = lambda key, shape: jnp.asarray(flags)
        self.flags = weights.weight(rngs, init, flags.shape, ("groups",))
        self.fault = "" if fault in CHOSEN else fault

    def on(self, fault):
        """1 where `fault` is planted, else 0."""
        if fault in CHOSEN:
            return jax.lax.stop_gradient(self.flags[list(CHOSEN).index(fault)])
        return fault == self.fault

    def __call__(self, x, *, segments=None, state=None):
        on, given = self.on, state
        old = self.init_state(len(x), 0, x.dtype) if state is None else state
        h, tail = old["h"], old["tail"]
        if given is None:
            h += on("a call without a state begins elsewhere")
        h -= on("no gradient goes into the state that came in") * _slope(h)
        ids = jnp.ones(x.shape[:2], jnp.int32) if segments is None else segments
        u = weights.project("btd,dc->btc", x, self.w).astype(mixer.wide(x.dtype))
        if segments is not None:
            u *= 1 + 0.1 * on("a row with segments is read otherwise")
        h, state = self._recur(u, ids, h, tail)
        state["length"] = old["length"] + (ids != 0).sum(1)
        state["length"] += jnp.int32(on("the state counts each call as a token"))
        y = self._out(x, u, h, segments, given)
        if on("the state changes its dtype"):
            state["tail"] = state["tail"].astype(jnp.bfloat16)
        return y, state

    def _recur(self, u, ids, h, tail):
        """States of all tokens (B, T, C), or those without u_t, and the last ones."""
        on, came, tail_came = self.on, h, tail
        earlier = jnp.tril(ids[:, :, None] == ids[:, None], -1).any(-1)
        starts = boundaries.starts(ids)
        starts &= ~(earlier & (on("a number that comes back is the old document") > 0))
        real = ids != 0

        def step(carry, now):
            h, tail, _ = carry
            u, real, start = now
            again = on("the recurrence goes on into the next document") * h
            again += on("a gradient crosses a boundary, the value does not") * _slope(h)
            again += on("the state that came in reaches every document") * came
            before = jnp.where(start, again, h)
            again = on("the convolution reads the document before") * tail
            again += on("the tail that came in reaches every document") * tail_came
            past = self.a[...] * before + self.m[...] * jnp.where(start, again, tail)
            new = past + u
            pad = h + on("padding moves the state") * new
            pad += on("padding moves the gradients") * _slope(new)
            after = jnp.where(real, new, pad)
            seen = jnp.where(on("a token does not read itself") > 0, past, after)
            return (after, jnp.where(real, u, tail), h), seen

        now = tuple(a.swapaxes(0, 1) for a in (u, real[..., None], starts[..., None]))
        (h, tail, last), all_h = jax.lax.scan(step, (h, tail, h), now)
        h += on("the state is that before the last token") * (last - h)
        h -= on("no gradient comes back from the last state") * _slope(h)
        h += on("the state is rounded to bfloat16") * (h.astype(jnp.bfloat16).astype(h.dtype) - h)
        tail *= 1 - on("the convolution forgets between two pieces")
        return all_h.swapaxes(0, 1), {"h": h, "tail": tail}

    def _out(self, x, u, h, segments, state):
        on, (s, g, b) = self.on, (self.s[...], self.g[...], self.b[...])
        if on("the sum over tokens is bfloat16") and x.dtype == jnp.bfloat16:
            h = jnp.cumsum(h.astype(x.dtype), axis=1).astype(h.dtype) / 8
        if segments is None:
            s -= on("a weight has no gradient without segments") * _slope(s)
        narrow = lambda fault, *both: [a.astype(x.dtype if on(fault) else a.dtype) for a in both]
        s_u = jnp.multiply(*narrow("a skip is applied in bfloat16", s, u))
        y = jnp.where(on("a token does not read itself") > 0, h, h + s_u)
        y = jnp.multiply(*narrow("a gain is applied in bfloat16", g, y))
        y = jnp.add(*narrow("a bias is added in bfloat16", b, y))
        ahead = on("a later token is read")
        if state is not None:
            ahead += on("a later token is read where a state came in")
            if on("each device sums its own channels of a state"):
                y = _own_sum(y)
        if on("each device sums its own channels"):
            y = _own_sum(y)
        y += ahead * jnp.roll(y, -1, axis=1)
        y *= 1 + on("the sign of a later token is read") * jnp.sign(jnp.roll(y, -1, axis=1))
        if x.shape[1] == 1:
            y *= 1 + 0.1 * on("a call with one token differs")
        if x.dtype == jnp.float32:
            y *= 1 + 1e-4 * on("float32 is off by 1e-4")
        y *= jnp.where(on("large activations overflow") > 0, 3e38, 1)
        if on("a call draws its own noise"):
            noise = lambda: np.float32(1e-5 * np.random.default_rng().normal())
            y += jax.pure_callback(noise, jax.ShapeDtypeStruct((), jnp.float32))
        y = weights.project("btc,cd->btd", y.astype(x.dtype), self.o)
        return y.astype(jnp.float32) if on("the output has another dtype") else y

    def init_state(self, batch, capacity, dtype=jnp.float32):
        zeros = jnp.zeros((batch, CHANNELS), mixer.wide(dtype))
        first = zeros + self.on("a fresh state is not zero")
        return {"h": first, "tail": zeros, "length": jnp.zeros(batch, jnp.int32)}


def _slope(x):
    """Zero with the gradient of x."""
    return x - jax.lax.stop_gradient(x)


def _own_sum(y):
    """y and the sum of its channels, which on a mesh is that of a device's own channels."""
    plus = lambda y: y + y.sum(-1, keepdims=True)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return plus(y)
    spec = P(("data", "fsdp"), None, "tensor")
    return jax.shard_map(plus, mesh=mesh, in_specs=spec, out_specs=spec)(y)


class Encoder(mixer.Mixer):
    """y = (x + mean of x over the document) W."""

    causal = False

    def __init__(self, fault, width, rngs):
        self.w = weights.inward(rngs, width, (width,), ("channels",))
        self.fault = fault

    def __call__(self, x, *, segments=None, state=None):
        if state is not None and self.fault != "an encoder takes a state":
            raise ValueError("this encoder is bidirectional.")
        ids = jnp.ones(x.shape[:2], jnp.int32) if segments is None else segments
        document = boundaries.ordinals(ids)
        same = document[:, :, None] == document[:, None]
        if self.fault == "an encoder reads the other documents":
            same = jnp.ones_like(same)
        if self.fault != "an encoder reads padding":
            same &= (ids != 0)[:, None]
        if self.fault == "an encoder reads nothing ahead":
            same = jnp.tril(same)
        mean = same / jnp.maximum(same.sum(-1, keepdims=True), 1)
        mean = jnp.einsum("bts,bsd->btd", mean.astype(x.dtype), x)
        return weights.project("btd,dc->btc", x + mean, self.w), ()

    def init_state(self, batch, capacity, dtype=jnp.float32):
        raise ValueError("this encoder is bidirectional.")


@pytest.mark.xdist_group("contract_finds")
@pytest.mark.parametrize("config", [Config(), Config("encoder")], ids=["mixer", "encoder"])
def test_the_contract_passes_what_is_right(config):
    for check in contract.CHECKS:
        check(config)


@pytest.mark.xdist_group("contract_finds")
@pytest.mark.parametrize(("fault", "check"), list((CHOSEN | TRACED | ENCODERS).items()))
def test_the_contract_finds(fault, check):
    kinds = (AssertionError, ValueError, pytest.fail.Exception)
    with pytest.raises(kinds, match=SAYS[check]):
        getattr(contract, check)(Config(fault))
