"""What tests of both kinds of attention share: inputs, gradients, and the softmax by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.tolerance import assert_close


def draw(batch, length, heads, groups, key, value, *, slots=None, dtype=np.float32, seed=0):
    """Normal q, k and v."""
    rng = np.random.default_rng(seed)
    slots = slots or length
    shapes = ((length, heads, key), (slots, groups, key), (slots, groups, value))
    return tuple(jnp.asarray(rng.normal(size=(batch, *shape)), dtype) for shape in shapes)


def value_and_slopes(function, q, k, v, seed=7):
    """(out, gradients of q, k, v) for a random cotangent, as NumPy arrays."""

    @jax.jit
    def run(q, k, v, cotangent):
        out, pullback = jax.vjp(function, q, k, v)
        return out, *pullback(cotangent)

    shape = (*q.shape[:3], v.shape[3])
    cotangent = jnp.asarray(np.random.default_rng(seed).normal(size=shape), v.dtype)
    return [np.asarray(x) for x in run(q, k, v, cotangent)]


def assert_same(found, expected, dtype="float32"):
    """Two results of `value_and_slopes` agree."""
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        assert_close(a, b, dtype, name)


def by_hand(q, k, v, visible, scale):
    """Loops over batch, heads and queries in float64; visible is (B, T, S) or (B, H, T, S)."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    visible = visible if visible.ndim == 4 else visible[:, None].repeat(q.shape[2], axis=1)
    out = np.zeros((*q.shape[:3], v.shape[3]))
    for b, t, h in np.ndindex(q.shape[:3]):
        seen = np.flatnonzero(visible[b, h, t])
        g = h * k.shape[2] // q.shape[2]
        if len(seen):
            scores = scale * k[b, seen, g] @ q[b, t, h]
            weights = np.exp(scores - scores.max())
            out[b, t, h] = weights @ v[b, seen, g] / weights.sum()
    return out


def random_lists(*shape, blocks, seed=1):
    """Lists with -1 and repeated entries among them."""
    return np.random.default_rng(seed).integers(-1, blocks, shape).astype(np.int32)


def chosen_pairs(indices, batch, heads, length, slots, query_block, block):
    """(B, H, T, S) by a loop over the entries of every list."""
    found = np.zeros((batch, heads, length, slots), bool)
    for b, h, t in np.ndindex(batch, heads, length):
        row = indices[b % indices.shape[0], h * indices.shape[1] // heads, t // query_block]
        for i in row:
            if i >= 0:
                found[b, h, t, i * block : (i + 1) * block] = True
    return found


def causal_mask(length, window=0):
    """(T, S) booleans."""
    distance = np.arange(length)[:, None] - np.arange(length)
    return (distance >= 0) & ((distance < window) if window else True)
