"""Channel mixers and mixtures of experts as loops over tokens, written from the papers.

Each loop maps (config, weights, x (T, D)) to y (T, D) in NumPy.
"""

import math

import numpy as np

from models.attention import moa
from models.channel import (
    bit_linear,
    deepseek_moe,
    dropless,
    expert_choice,
    glu,
    gshard,
    hash,
    mlp,
    noisy_topk,
    rwkv_channel,
    soft_moe,
    switch,
    zero_computation,
)

WIDTH, LENGTH = 16, 23
SIZES = dict(experts=4, hidden=8)


def softmax(logits, axis=-1):
    weights = np.exp(logits - logits.max(axis, keepdims=True))
    return weights / weights.sum(axis, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def relu(x):
    return np.maximum(x, 0)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def expert(p, e, x, activation):
    """What expert e of the weights `p` makes of one token."""
    if "gate" in p:
        return (activation(x @ p["gate"][e]) * (x @ p["up"][e])) @ p["down"][e]
    return activation(x @ p["up"][e]) @ p["down"][e]


def best(scores, count):
    """Places of the highest scores, highest first."""
    return np.argsort(-scores, kind="stable")[:count]


def naive_mlp(config, p, x):
    return relu(x @ p["up"]) ** 2 @ p["down"]


def naive_glu(config, p, x):
    return (silu(x @ p["up"][:, 0]) * (x @ p["up"][:, 1])) @ p["down"]


def naive_dropless(config, p, x):
    y = np.zeros_like(x)
    for t, token in enumerate(x):
        probs = softmax(token @ p["router"])
        for e in best(probs, config.top_k):
            y[t] += probs[e] * expert(p["experts"], e, token, silu)
    return y


def naive_capacity(config, p, x, choices):
    """Switch (1 choice) and GShard (2): an expert's limit grows along the document."""
    y, kept = np.zeros_like(x), np.zeros(config.experts)
    for t, token in enumerate(x):
        probs = softmax(token @ p["router"])
        picked = best(probs, choices)
        limit = math.ceil(config.capacity_factor * choices * (t + 1) / config.experts)
        total = probs[picked].sum() if choices > 1 else 1
        for e in picked:
            if kept[e] < max(limit, config.least):
                kept[e] += 1
                y[t] += probs[e] / total * expert(p["experts"], e, token, relu)
    return y


def naive_noisy(config, p, x):
    y = np.zeros_like(x)
    for t, token in enumerate(x):
        logits = token @ p["router"]
        picked = best(logits, config.top_k)
        for weight, e in zip(softmax(logits[picked]), picked, strict=True):
            y[t] += weight * expert(p["experts"], e, token, relu)
    return y


def naive_deepseek(config, p, x):
    size = config.experts // config.groups
    y = (silu(x @ p["shared"]["up"][:, 0]) * (x @ p["shared"]["up"][:, 1])) @ p["shared"]["down"]
    for t, token in enumerate(x):
        scores = sigmoid(token @ p["router"])
        biased = scores + p["bias"]
        in_groups = np.sort(biased.reshape(config.groups, size))[:, -2:].sum(1)
        open_groups = best(in_groups, config.top_groups)
        biased = np.where(np.isin(np.arange(config.experts) // size, open_groups), biased, -np.inf)
        picked = best(biased, config.top_k)
        for e in picked:
            y[t] += scores[e] / scores[picked].sum() * expert(p["experts"], e, token, silu)
    return y


def naive_expert_choice(config, p, x):
    y, probs = np.zeros_like(x), softmax(x @ p["router"])
    for e in range(config.experts):
        for t in best(probs[:, e], int(config.capacity_factor * len(x) // config.experts)):
            y[t] += probs[t, e] * expert(p["experts"], e, x[t], gelu)
    return y


def naive_soft(config, p, x):
    phi = p["router"].reshape(WIDTH, -1)
    length = lambda a, axis: np.sqrt((a**2).sum(axis, keepdims=True) + 1e-6)
    logits = p["scale"] * (x / length(x, 1)) @ (phi / length(phi, 0))
    slots = softmax(logits, axis=0).T @ x
    out = [expert(p["experts"], s // config.slots, slot, gelu) for s, slot in enumerate(slots)]
    return softmax(logits) @ np.stack(out)


def naive_hash(config, p, x):
    unit = p["directions"] / np.linalg.norm(p["directions"], axis=0)
    return np.stack([expert(p["experts"], np.argmax(t @ unit), t, relu) for t in x])


def naive_zero_computation(config, p, x):
    y, n = np.zeros_like(x), config.experts
    for t, token in enumerate(x):
        probs = softmax(token @ p["router"])
        picked = [e for e in best(probs, config.top_k) if e != n]  # n: the zero expert
        for e in picked:
            weight = probs[e] / probs[picked].sum()
            if e < n:
                y[t] += weight * expert(p["experts"], e, token, silu)
            elif e == n + 1:
                y[t] += weight * token
            else:
                a = softmax(token @ p["mix"][:, e - n - 2])
                y[t] += weight * (a[0] * token + a[1] * p["vectors"][e - n - 2])
    return y


def naive_bit(config, p, x):
    def bit_linear(x, w):
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        top, size = np.abs(x).max(-1, keepdims=True), np.abs(w).mean() + 1e-5
        return (np.round(x * 127 / top) * top / 127) @ (np.clip(np.round(w / size), -1, 1) * size)

    return bit_linear(silu(bit_linear(x, p["gate"])) * bit_linear(x, p["up"]), p["down"])


def naive_rwkv(config, p, x):
    before = np.concatenate([np.zeros((1, WIDTH)), x[:-1]])
    k, r = (x + (before - x) * p["before"][i] for i in (0, 1))
    return sigmoid(r @ p["gate"]) * (relu(k @ p["up"]) ** 2 @ p["down"])


def naive_moa(config, p, x):
    y, heads, dim = np.zeros_like(x), *p["kv"].shape[2:]
    k, v = (np.einsum("td,dhk->thk", x, p["kv"][:, i]) for i in (0, 1))
    for t, token in enumerate(x):
        probs = softmax(token @ p["router"])
        picked = best(probs, config.top_k)
        for e in picked:
            q = np.einsum("d,dhk->hk", token, p["q"][e])
            for h in range(heads):
                read = softmax(k[: t + 1, h] @ q[h] / math.sqrt(dim)) @ v[: t + 1, h]
                y[t] += probs[e] / probs[picked].sum() * read @ p["o"][e, h]
    return y


NAIVE = {
    "mlp": (mlp.Config(activation="relu2"), naive_mlp),
    "glu": (glu.Config(), naive_glu),
    "dropless": (dropless.Config(**SIZES), naive_dropless),
    "switch": (
        switch.Config(**SIZES, least=1, capacity_factor=1.0),
        lambda *given: naive_capacity(*given, 1),
    ),
    "gshard": (gshard.Config(**SIZES, least=2), lambda *given: naive_capacity(*given, 2)),
    "noisy_topk": (noisy_topk.Config(**SIZES), naive_noisy),
    "deepseek_moe": (
        deepseek_moe.Config(experts=8, hidden=8, top_k=3, groups=4, top_groups=2),
        naive_deepseek,
    ),
    "expert_choice": (expert_choice.Config(**SIZES, capacity_factor=1.5), naive_expert_choice),
    "soft_moe": (soft_moe.Config(**SIZES, slots=3), naive_soft),
    "hash": (hash.Config(**SIZES), naive_hash),
    "zero_computation": (zero_computation.Config(**SIZES, top_k=3), naive_zero_computation),
    "bit_linear": (bit_linear.Config(hidden=16), naive_bit),
    "rwkv_channel": (rwkv_channel.Config(hidden=8), naive_rwkv),
    "moa": (moa.Config(experts=4, rope_base=0.0), naive_moa),
}
