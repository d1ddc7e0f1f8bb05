"""Sparse attention against loops over tokens in float64, written from the papers' equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import auxiliary
from models.sparse_attention import (
    bigbird,
    block_routing,
    dsa,
    local,
    longformer,
    moba,
    nsa,
    reformer,
    s2,
    strided,
)
from tests.tolerance import assert_close

WIDTH, LENGTH = 32, 75


def draw(config, length=LENGTH):
    """(module, weights in float64, inputs (T, D) in float64, outputs of the module)."""
    module = config.build(WIDTH, nnx.Rngs(0))
    x = np.random.default_rng(1).normal(size=(length, WIDTH)).astype(np.float32)
    y, _ = jax.jit(lambda x: module(x))(x[None])
    weights = jax.tree.map(
        lambda w: np.asarray(w, np.float64), nnx.to_pure_dict(nnx.state(module, nnx.Param))
    )
    return module, weights, x.astype(np.float64), np.asarray(y[0])


def rotate(x, base=10_000.0, at=None):
    """x (T, ..., K) with pairs (i, i + K/2) turned by position x base^(-2i/K)."""
    half = x.shape[-1] // 2
    at = np.arange(len(x)) if at is None else at
    angle = at.reshape(-1, *(1,) * (x.ndim - 1)) * base ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1
    )


def softmax(s):
    p = np.exp(s - s.max())
    return p / p.sum()


def heads(w, x):
    """Rotated queries (T, H, K) and keys, and values, of as many heads."""
    q = np.einsum("td,dhk->thk", x, w["q"])
    kv = np.einsum("td,dpgk->tpgk", x, w["kv"])
    each = q.shape[1] // kv.shape[2]
    k, v = (np.repeat(kv[:, i], each, axis=1) for i in range(2))
    return rotate(q), rotate(k), v


def attend(q, k, v, sees):
    """(T, H, V): the tokens s with sees(h, t, s)."""
    out = np.zeros((*q.shape[:2], v.shape[2]))
    for t in range(len(q)):
        for h in range(q.shape[1]):
            at = [s for s in range(len(k)) if sees(h, t, s)]
            if at:
                p = softmax(k[at, h] @ q[t, h] / np.sqrt(q.shape[2]))
                out[t, h] = p @ v[at, h]
    return out


def close(got, w, o):
    assert_close(got, np.einsum("thk,hkd->td", o, w["o"]), jnp.float32, "against the loop")


def mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
    x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def causal_draw(n, h, i, heads=4, draws=2):
    """BigBird's random blocks, before block n: those between the global block and the window."""
    free = n - 2
    if free < 1:
        return -1
    return 1 + mix((n + mix(h * draws + i)) % 2**32) % free


def encoder_draw(n, h, i, blocks=10, draws=2):
    free = [j for j in range(1, blocks) if abs(n - j) > 1]
    return free[mix((n + mix(h * draws + i)) % 2**32) % len(free)]


PATTERNS = {
    "strided": (
        strided.Config(block=8, stride=3),
        lambda h, n, j: n - j <= 3 or (n - j) % 3 == 0,
    ),
    "fixed": (
        strided.Config(block=8, stride=3, fixed=True),
        lambda h, n, j: n // 3 == j // 3 or j % 3 == 2,
    ),
    "longformer": (
        longformer.Config(block=8),
        lambda h, n, j: n - j <= 2 or j == 0,
    ),
    "longformer_encoder": (
        longformer.Config(block=8, causal=False),
        lambda h, n, j: abs(n - j) <= 2 or j == 0 or n == 0,
    ),
    "bigbird": (
        bigbird.Config(block=8),
        lambda h, n, j: n - j <= 1 or j == 0 or j in [causal_draw(n, h, i) for i in range(2)],
    ),
    "bigbird_encoder": (
        bigbird.Config(block=8, causal=False),
        lambda h, n, j: (
            abs(n - j) <= 1 or 0 in (j, n) or j in [encoder_draw(n, h, i) for i in range(2)]
        ),
    ),
    "local": (local.Config(block=8), lambda h, n, j: n - j <= 1),
    "s2": (s2.Config(block=8), lambda h, n, j: n - j <= 1 or (j + h) % 4 == 0),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_fixed_pattern(name):
    config, rule = PATTERNS[name]
    module, w, x, y = draw(config)
    chosen = {(h, n, j) for h in range(4) for n in range(10) for j in range(10) if rule(h, n, j)}
    sees = lambda h, t, s: (h, t // 8, s // 8) in chosen and (s <= t or not module.causal)
    close(y, w, attend(*heads(w, x), sees))


def test_heads_of_s2_share_a_shard_by_key_head():
    """What the released library gives for 4 heads on 2 key heads, blocks of 1 token, 2 shards."""
    config = s2.Config(heads=4, kv_heads=2, block=1, before=0, shards=2)
    lists = config.build(32, nnx.Rngs(0)).rule(np.array([[7]]), np.array([[8]]), 8)
    seen = [sorted(j for j in lists[0, h, 0].tolist() if j >= 0) for h in range(4)]
    assert seen == [[0, 2, 4, 6, 7], [0, 2, 4, 6, 7], [1, 3, 5, 7], [1, 3, 5, 7]]


def best(score, own, top):
    """The own block and the top - 1 best earlier ones."""
    earlier = sorted(range(own), key=lambda j: -score(j))
    return {own, *earlier[: top - 1]}


def by_choice(q, k, v, block, choice):
    """Attention where choice(h, t) is a set of blocks."""
    chosen = {(h, t): choice(h, t) for h in range(q.shape[1]) for t in range(len(q))}
    return attend(q, k, v, lambda h, t, s: s <= t and s // block in chosen[h, t])


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_moba(kv_heads):
    _, w, x, y = draw(moba.Config(block=8, kv_heads=kv_heads))
    q, k, v = heads(w, x)
    score = lambda h, t: lambda j: q[t, h] @ k[8 * j : 8 * j + 8, h].mean(0)
    close(y, w, by_choice(q, k, v, 8, lambda h, t: best(score(h, t), t // 8, 3)))


@pytest.mark.parametrize("block", [8, 1])
def test_dsa(block):
    config = dsa.Config(block=block, top=4)
    _, w, x, y = draw(config)
    q, k, v = heads(w, x)
    index_q = rotate(np.einsum("td,dje->tje", x, w["index_q"]))
    index_k = x @ w["index_k"]
    index_k -= index_k.mean(1, keepdims=True)
    index_k = rotate(index_k / np.sqrt((index_k**2).mean(1, keepdims=True) + 1e-5))
    gate = x @ w["index_w"] / np.sqrt(config.index_heads * config.index_dim)
    scores = np.einsum(
        "tj,tjs->ts", gate, np.maximum(np.einsum("tje,se->tjs", index_q, index_k), 0)
    )
    score = lambda t: lambda j: scores[t, block * j : block * j + block].max()
    close(y, w, by_choice(q, k, v, block, lambda h, t: best(score(t), t // block, 4)))


def test_block_routing():
    config = block_routing.Config(block=8)
    _, w, x, y = draw(config)
    q, k, v = heads(w, x)
    plain_q = np.einsum("td,dhk->thk", x, w["q"]).reshape(LENGTH, 2, 2, -1)
    plain_k = np.einsum("td,dgk->tgk", x, w["kv"][:, 0])
    gate_q = rotate(np.einsum("tgrk,grke->tge", plain_q, w["gate_q"]))
    pooled = np.stack([plain_k[8 * j : 8 * j + 8].mean(0) for j in range(LENGTH // 8)])
    gate_k = np.einsum("ngk,gke->nge", pooled, w["gate_k"])
    gate_k = rotate(gate_k, at=8.0 * np.arange(len(gate_k)))
    score = lambda h, t: lambda j: gate_q[t, h // 2] @ gate_k[j, h // 2]
    close(y, w, by_choice(q, k, v, 8, lambda h, t: best(score(h, t), t // 8, 4)))


def compressed(config, w, x):
    """(keys, values) of compressed blocks, each (I, G, K): phi of equation 7."""
    kv = np.einsum("td,dpgk->tpgk", x, w["kv_far"])
    found = []
    for start in range(0, len(x) - config.compress + 1, config.stride):
        block = kv[start : start + config.compress].swapaxes(0, 1) + w["place"][:, :, None]
        summed = (block * w["taps"][:, :, None]).sum(1)
        hidden = np.einsum("pgk,pkv->pgv", summed, w["mlp_in"])
        hidden /= 1 + np.exp(-hidden)
        found.append(np.einsum("pgk,pkv->pgv", hidden, w["mlp_out"]))
    return np.stack(found).swapaxes(0, 1)


def test_nsa():
    config = nsa.Config(block=8, window=16)
    _, w, x, y = draw(config)
    q, k, v = heads(w, x)
    plain_q = np.einsum("td,dhk->thk", x, w["q"])
    far_k, far_v = compressed(config, w, x)
    far, chosen = np.zeros_like(q), {}
    for t in range(LENGTH):
        whole = [i for i in range(len(far_k)) if 4 * i + 8 - 1 <= t]
        for g in range(2):
            weights = np.zeros(LENGTH // 4 + 2)  # of strides
            for h in (2 * g, 2 * g + 1):
                if whole:
                    p = softmax(far_k[whole, g] @ plain_q[t, h] / np.sqrt(q.shape[2]))
                    far[t, h] = p @ far_v[whole, g]
                    for i, part in zip(whole, p, strict=True):
                        weights[i : i + 2] += part
            own = t // 8
            always = {own, own - 1, 0} - {-1}
            rest = sorted(set(range(own)) - always, key=lambda j: -weights[2 * j : 2 * j + 2].sum())
            chosen[g, t] = always | set(rest[: 6 - len(always)])
    picked = attend(q, k, v, lambda h, t, s: s <= t and s // 8 in chosen[h // 2, t])
    near_kv = np.repeat(np.einsum("td,dpgk->tpgk", x, w["kv_near"]), 2, axis=2)
    near = attend(q, rotate(near_kv[:, 0]), near_kv[:, 1], lambda h, t, s: 0 <= t - s < 16)
    gates = 1 / (1 + np.exp(-np.einsum("td,dph->tph", x, w["gates"])))
    close(y, w, sum(gates[:, i, :, None] * o for i, o in enumerate((far, picked, near))))


def test_reformer():
    config = reformer.Config(window=6)
    _, w, x, y = draw(config)
    q, v = (np.einsum("td,dhk->thk", x, w[name]) for name in ("qk", "v"))
    k = q / np.sqrt((q**2).sum(-1, keepdims=True) + 1e-6)
    side = np.einsum("thk,rhke->trhe", q, w["planes"])
    bucket = np.concatenate([side, -side], -1).argmax(-1)
    out = np.zeros_like(q)
    for t in range(LENGTH):
        for h in range(4):
            found = []
            for r in range(2):
                same = [s for s in range(t + 1) if bucket[s, r, h] == bucket[t, r, h]]
                found += same[-6:]
            found = [s for s in found if s != t] or [t]
            out[t, h] = softmax(k[found, h] @ q[t, h] / np.sqrt(q.shape[2])) @ v[found, h]
    close(y, w, out)


@pytest.mark.parametrize("config", [moba.Config(), nsa.Config()])
def test_long_rows_are_scored_in_chunks(config):
    """Above 512 queries blocks are compared in pieces: outputs and gradients stay as they were."""
    module = config.build(WIDTH, nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 600, WIDTH)), jnp.float32)
    grad = lambda x: jax.jit(jax.value_and_grad(lambda x: jnp.sum(module(x)[0][:, :500] ** 2)))(x)
    (short, d_short), (long, d_long) = grad(x[:, :500]), grad(x)
    assert_close(long, short, jnp.float32, "outputs")
    assert_close(d_long[:, :500], d_short, jnp.float32, "gradients")


def of_router(graph, params, x, segments=None):
    """The loss of a router."""
    with auxiliary.collecting() as found:
        nnx.merge(graph, params)(x, segments=segments)
    (values,) = found["losses"].values()
    return values[0]


loss = jax.jit(of_router, static_argnums=0)
loss_and_grads = jax.jit(jax.value_and_grad(of_router, argnums=1), static_argnums=0)


@pytest.mark.parametrize(
    ("config", "taught"),
    [
        (dsa.Config(), {"index_q", "index_k", "index_w", "norm", "norm_bias"}),
        (block_routing.Config(), {"gate_q", "gate_k"}),
    ],
)
def test_a_router_learns_by_imitation_alone(config, taught):
    """Its loss reaches its weights and no others, and counts packed documents as single ones."""
    graph, params = nnx.split(config.build(WIDTH, nnx.Rngs(0)))
    x = jnp.asarray(np.random.default_rng(3).normal(size=(1, 128, WIDTH)), jnp.float32)
    value, grads = loss_and_grads(graph, params, x, jnp.ones((1, 128), jnp.int32))
    assert value > 0
    for name, grad in nnx.to_pure_dict(grads).items():
        assert bool(np.any(np.asarray(grad))) == (name in taught), name
    halves = [loss(graph, params, x[:, i : i + 64]) for i in (0, 64)]
    packed, _ = loss_and_grads(graph, params, x, jnp.repeat(jnp.arange(1, 3), 64)[None])
    assert_close(packed, np.mean(halves), jnp.float32, "loss of packed documents")


def test_imitation_is_the_divergence_of_chosen_blocks():
    config = block_routing.Config(block=8, top=3, kv_heads=1)
    module, w, x, _ = draw(config)
    value = loss(*nnx.split(module), jnp.asarray(x[None], jnp.float32))
    q, k, _ = heads(w, x)
    plain = np.einsum("td,dhk->thk", x, w["q"])
    gate_q = rotate(np.einsum("thk,hke->te", plain, w["gate_q"][0]))
    gate_k = np.einsum("td,dk->tk", x, w["kv"][:, 0, 0]) @ w["gate_k"][0]
    gate_k = rotate(gate_k[:72].reshape(9, 8, -1).mean(1), at=8.0 * np.arange(9))
    total = 0.0
    for t in range(LENGTH):
        score = lambda j: gate_q[t] @ gate_k[j] / 4  # noqa: B023
        chosen = sorted(best(score, t // 8, 3) - {t // 8})
        if chosen:
            at = np.concatenate([np.arange(8 * j, 8 * j + 8) for j in chosen])
            p = np.mean([softmax(k[at, 0] @ q[t, h] / np.sqrt(8)) for h in range(4)], axis=0)
            p = p.reshape(len(chosen), 8).sum(1)
            total += np.sum(p * (np.log(p) - np.log(softmax(np.array([score(j) for j in chosen])))))
    assert_close(value, total / LENGTH, jnp.float32, "loss")


@pytest.mark.parametrize("config", [strided.Config(), nsa.Config(), reformer.Config()])
def test_a_state_goes_on_in_a_row_of_documents(config):
    """What a packed row reads after a past, and what follows it, is as of each document alone."""
    module = config.build(WIDTH, nnx.Rngs(0))
    call = jax.jit(lambda x, segments, state: module(x, segments=segments, state=state))
    rng = np.random.default_rng(4)
    first, row, after = (
        jnp.asarray(rng.normal(size=(1, n, WIDTH)), jnp.float32) for n in (21, 100, 21)
    )
    # The first document goes on, the last one does so later; 8 tokens of padding are at the end.
    numbers = np.concatenate([np.repeat([7, 2, 9, 1], (16, 37, 5, 34)), np.zeros(8, int)])
    _, state = call(first, None, module.init_state(1, 64))
    got, state = call(row, jnp.asarray(numbers, jnp.int32)[None], state)
    got_after, _ = call(after, None, state)
    cut = lambda *parts: jnp.concatenate(parts, axis=1)
    # Documents alone, as one batch: what stands after a shorter one does not matter to it.
    each = (
        cut(first, row[:, :34]),
        row[:, 16:71],
        cut(row[:, 53:100], row[:, :8]),
        cut(row[:, 58:92], after),
    )
    went_on, second, short, last = call(jnp.concatenate(each), None, None)[0][:, None]
    want = cut(went_on[:, 21:37], second[:, :37], short[:, :5], last[:, :34])
    assert_close(got[:, :92], want, jnp.float32, "the row")
    assert_close(got_after, last[:, 34:], jnp.float32, "what follows")
