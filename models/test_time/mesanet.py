"""MesaNet: each token reads with the best linear model of the tokens before it.

MesaNet: Sequence Modeling by Locally Optimal Test-Time Training (arXiv 2506.05233, eqs. 6 to 8).
Notable: the regularised least-squares problem of every token is solved by a fixed number of
conjugate gradient steps, each of which multiplies all tokens' vectors by their own H_t with one
gated linear attention; the backward pass solves the same systems for the output's gradient. Keys
and queries are L2-normalised after a short convolution, so H is bounded. Weights start as in the
released code (decay and write strength 1/2, Lambda = 1, at least 0.25), but the solver starts at
zero and stops a token once its residual is lost in rounding, where the release starts at
q / (diag H + Lambda) and adds 1e-5 to denominators.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels.gated_linear import gated_linear
from models import checks, layers, mixer, weights


@dataclasses.dataclass
class Config:
    """Heads, and how their linear models are fitted."""

    heads: int = 4
    head_dim: int = 0  # of keys and values; 0: width / heads
    steps: int = 30  # of conjugate gradients
    ridge_floor: float = 0.25  # least Lambda
    conv: int = 4

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where heads, steps, ridge_floor or conv do not fit."""
        return Mixer(self, width, rngs)


CASES = {"mesanet": Config()}


class Mixer(mixer.Mixer):
    """H_t = g_t H_{t-1} + b_t k_t k_t^T, G_t = g_t G_{t-1} + b_t v_t k_t^T,
    o_t = G_t (H_t + Lambda)^{-1} q_t."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        heads, floor = config.heads, config.ridge_floor
        dim = config.head_dim or checks.split_heads(width, heads)
        if dim < 1:
            raise ValueError(f"head_dim={dim} is negative. Use 0 (width / heads) or at least 1.")
        if config.steps < 1:
            raise ValueError(f"steps={config.steps} must be at least 1; the paper uses 30.")
        if not 0 < floor < 1:
            raise ValueError(f"ridge_floor={floor} must be between 0 and 1; the release has 0.25.")
        names = ("parts", "heads", "key")
        self.qk = weights.inward(rngs, width, (2, heads, dim), names)
        conv = functools.partial(layers.ShortConv, width=config.conv, bias=False)
        self.qk_conv = conv((2, heads, dim), names, rngs, activation="silu")
        self.v = weights.inward(rngs, width, (heads, dim), ("heads", "value"))
        self.gates = weights.inward(rngs, width, (2, heads), ("parts", "heads"))
        self.gate_bias = weights.filled(rngs, 0.0, (2, heads), ("parts", "heads"))
        one = math.log(math.expm1(1 - floor))
        self.ridge = weights.filled(rngs, one, (heads, dim), ("heads", "key"))
        self.norm = weights.filled(rngs, 1.0, (dim,), ("value",))
        self.o = weights.outward(rngs, (heads, dim), width, ("heads", "value"))
        self.steps, self.floor = config.steps, floor

    def __call__(self, x, *, segments=None, state=None):
        old = self.init_state(x.shape[0], x.shape[1], x.dtype) if state is None else state
        dtype = mixer.wide(x.dtype)
        qk_BTPHK, tail = self.qk_conv(
            weights.project("btd,dphk->btphk", x, self.qk), segments=segments, state=old["qk"]
        )
        qk_BTPHK = layers.l2_norm(qk_BTPHK).astype(dtype)
        q_BTHK, k_BTHK = qk_BTPHK[:, :, 0], qk_BTPHK[:, :, 1]
        v_BTHV = weights.project("btd,dhv->bthv", x, self.v).astype(dtype)
        gates_BTPH = weights.project("btd,dph->btph", x, self.gates).astype(dtype)
        gates_BTPH = gates_BTPH + self.gate_bias[...]
        log_decay_BTH = jax.nn.log_sigmoid(gates_BTPH[:, :, 0])
        beta_BTH1 = jax.nn.sigmoid(gates_BTPH[:, :, 1])[..., None]
        ridge_HK = self.floor + jax.nn.softplus(self.ridge[...])
        operands = (k_BTHK, beta_BTH1 * k_BTHK, log_decay_BTH, old["h"])
        x_BTHK = solve(self.steps, q_BTHK, operands, ridge_HK, segments)
        after = functools.partial(gated_linear, segments=segments, scale=1.0)
        o_BTHV, g_BHKV = after(
            x_BTHK, k_BTHK, beta_BTH1 * v_BTHV, log_decay_BTH, initial_state=old["g"]
        )
        _, h_BHKK = after(x_BTHK, *operands[:3], initial_state=old["h"])
        o_BTHV = layers.rms_norm(o_BTHV, self.norm[...], eps=1e-5).astype(x.dtype)
        y = weights.project("bthv,hvd->btd", o_BTHV, self.o)
        return y, {"qk": tail, "h": h_BHKK, "g": g_BHKV}

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """The convolution's tail, and H and G (B, H, K, K), all zero."""
        heads, dim = self.ridge.shape
        zeros = jnp.zeros((batch, heads, dim, dim), mixer.wide(dtype))
        return {"qk": self.qk_conv.init_state(batch, dtype), "h": zeros, "g": zeros}


def _solve(steps, q_BTHK, operands, ridge_HK, segments) -> jax.Array:
    """x_t with (H_t + diag(ridge)) x_t = q_t; `operands` are k, b k, log g and H before the row."""
    first = (jnp.zeros_like(q_BTHK), q_BTHK, q_BTHK, _dot(q_BTHK, q_BTHK))
    least_BTH1 = first[-1] * jnp.finfo(q_BTHK.dtype).eps ** 2

    def step(_, carry):
        x_BTHK, r_BTHK, p_BTHK, size_BTH1 = carry
        hp_BTHK = _product(p_BTHK, operands, segments) + ridge_HK * p_BTHK
        more = size_BTH1 > least_BTH1
        a_BTH1 = jnp.where(more, size_BTH1 / jnp.where(more, _dot(p_BTHK, hp_BTHK), 1), 0)
        r_BTHK = r_BTHK - a_BTH1 * hp_BTHK
        after_BTH1 = _dot(r_BTHK, r_BTHK)
        turn_BTH1 = jnp.where(more, after_BTH1 / jnp.where(more, size_BTH1, 1), 0)
        return x_BTHK + a_BTH1 * p_BTHK, r_BTHK, r_BTHK + turn_BTH1 * p_BTHK, after_BTH1

    return jax.lax.fori_loop(0, steps, step, first)[0]


solve = jax.custom_vjp(_solve, nondiff_argnums=(0,))


def _product(x_BTHK, operands, segments):
    """H_t x_t at every token."""
    *inputs, h_BHKK = operands
    return gated_linear(x_BTHK, *inputs, segments=segments, initial_state=h_BHKK, scale=1.0)[0]


def _dot(a_BTHK, b_BTHK):
    return jnp.sum(a_BTHK * b_BTHK, axis=-1, keepdims=True)


def _forward(steps, q_BTHK, operands, ridge_HK, segments):
    x_BTHK = solve(steps, q_BTHK, operands, ridge_HK, segments)
    return x_BTHK, (x_BTHK, operands, ridge_HK, segments)


def _backward(steps, saved, dx_BTHK):
    """With z = (H + Lambda)^{-1} dx: dq = z, and H + Lambda has the gradient -z x^T."""
    x_BTHK, operands, ridge_HK, segments = saved
    z_BTHK = solve(steps, dx_BTHK, operands, ridge_HK, segments)
    _, pull = jax.vjp(lambda operands: _product(x_BTHK, operands, segments), operands)
    return z_BTHK, *pull(-z_BTHK), -jnp.sum(z_BTHK * x_BTHK, axis=(0, 1)), None


solve.defvjp(_forward, _backward)
