"""Inputs for tests and benchmarks of attention: four query heads on two key heads."""

import jax
import jax.numpy as jnp
import numpy as np

HEADS, GROUPS, KEY, VALUE = 4, 2, 16, 24
LEVEL, SOFTCAP = 90.0, 30.0


def draw(rng: np.random.Generator, *, batch, length, dtype, extreme=False) -> dict:
    """Keyword arguments; the length modulo 4 says what joins the scores.

    3: nothing; else sinks and gates, with 0 a soft cap besides, with 2 a window. `extreme` adds 90
    to the scores of every other head, -90 to the rest, and mixes gates that forget at once with
    gates that never do. So exp(score) overflows or vanishes while the softmax, and with it every
    gradient, keeps its size. Scores spread over +-90 would saturate the softmax, and the gradients
    of a saturated softmax are differences smaller than float32 resolves.
    """
    q, k, v = (
        rng.normal(size=(batch, length, heads, dim))
        for heads, dim in ((HEADS, KEY), (GROUPS, KEY), (GROUPS, VALUE))
    )
    level = LEVEL * np.where(np.arange(HEADS) % 2, -1, 1)
    capped = length % 4 == 0
    if extreme:
        q[..., 0] = level * KEY**0.5
        k[..., 0] = 1
    elif capped:
        q *= SOFTCAP / 4
    arrays = {"q": q, "k": k, "v": v}
    settings = {"softcap": SOFTCAP} if capped else {"window": 50} if length % 4 == 2 else {}
    if length % 4 != 3:
        arrays["sinks"] = rng.normal(size=HEADS)
        arrays["log_forget"] = -np.logaddexp(0, -rng.normal(2, 2, (batch, length, HEADS)))
        if extreme:  # two of the sinks as high as the scores
            level = SOFTCAP * np.tanh(level / SOFTCAP) if capped else level
            arrays["sinks"] += np.where(np.arange(HEADS) < HEADS // 2, level, 0)
            arrays["log_forget"] = rng.choice([-1e-4, -30.0], size=(batch, length, HEADS))
    return {name: array.astype(dtype) for name, array in arrays.items()} | settings


def sizes() -> dict[str, dict]:
    """Calls of model size by label: bfloat16 tokens, float32 sinks and gates, 32768 tokens."""

    def size(
        length, dim, *, heads=16, groups=16, sinks=False, forget=False, segments=False, **rest
    ):
        batch = 32768 // length
        like = jax.ShapeDtypeStruct
        arguments = {
            "q": like((batch, length, heads, dim), jnp.bfloat16),
            "k": like((batch, length, groups, dim), jnp.bfloat16),
            "v": like((batch, length, groups, dim), jnp.bfloat16),
        }
        if sinks:
            arguments["sinks"] = like((heads,), jnp.float32)
        if forget:
            arguments["log_forget"] = like((batch, length, heads), jnp.float32)
        if segments:
            arguments["segments"] = like((batch, length), jnp.int32)
        return arguments | rest

    return {
        "T4096 K64": size(4096, 64),
        "T4096 K128": size(4096, 128),
        "T4096 K128 segments": size(4096, 128, segments=True),
        "T4096 K256": size(4096, 256, heads=8, groups=8),
        "T32768 K64": size(32768, 64),
        "T32768 K128": size(32768, 128),
        "T32768 K256": size(32768, 256, heads=8, groups=8),
        "T4096 K128, four heads a group": size(4096, 128, heads=32, groups=8),
        "T4096 K64, one group": size(4096, 64, heads=32, groups=1),
        "T4096 K128 not causal": size(4096, 128, causal=False),
        "T32768 K128 window 1024": size(32768, 128, window=1024),
        "T4096 K64 sinks, window 128": size(4096, 64, heads=32, groups=8, sinks=True, window=128),
        "T4096 K256 softcap": size(4096, 256, heads=8, groups=4, softcap=50.0),
        "T4096 K64 forget": size(4096, 64, forget=True),
        "T32768 K64 forget, sinks, softcap, segments": size(
            32768, 64, forget=True, sinks=True, segments=True, softcap=50.0
        ),
    }
