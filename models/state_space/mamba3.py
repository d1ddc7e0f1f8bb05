"""Mamba-3: Mamba-2 with a trapezoidal step, a rotating state, and several inputs and outputs.

Mamba-3: Improved Sequence Modeling using State Space Principles (arXiv 2603.15569, section 3; step
and initialisation as in the released code). Notable: a token writes what it and the one before it
bring, weighed by lambda_t, so no convolution is needed; the state's complex phases become rotary
positions of B and C whose angles depend on the data; B and C are normalised and get a bias; with
`rank` > 1 (MIMO) a token writes and reads that many rank-one products of one state.
Rotated pairs are (i, i + half) as elsewhere here, a fixed order of the paper's channels.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels.gated_linear import gated_linear
from kernels.linear_scan import linear_scan
from models import checks, layers, mixer, weights

LEAST_RATE = 1e-4  # of the decay, as in the released code


@dataclasses.dataclass
class Config:
    """Inner width expand * D in heads of head_dim; a state of `state` numbers a channel."""

    expand: int = 2
    head_dim: int = 64
    state: int = 128
    rank: int = 1  # R, products that a token writes and reads: 1 is SISO, more MIMO
    rotated: float = 0.5  # share of the state's numbers that rotate

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where head_dim, rank or rotated do not fit."""
        return Mixer(self, width, rngs)


CASES = {"mamba3": Config(), "mamba3_mimo": Config(rank=4)}


class Mixer(mixer.Mixer):
    """S_t = a_t S_{t-1} + (1 - lambda_t) dt_t a_t B_{t-1} x_{t-1}^T + lambda_t dt_t B_t x_t^T.

    y_t = (C_t S_t + D x_t) * silu(z_t). What follows reads it as
    P_t = a_t P_{t-1} + ((1 - lambda_t) dt_t + gamma_{t-1}) a_t B_{t-1} x_{t-1}^T,
    C_t S_t = C_t P_t + gamma_t (C_t B_t) x_t with gamma_t = lambda_t dt_t: one write a token, of
    the token before, which is carried beside P.
    """

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        inner, dim, state, rank = (
            config.expand * width,
            config.head_dim,
            config.state,
            config.rank,
        )
        heads = checks.split_heads(inner, dim, "head_dim", "expand * width =")
        if rank < 1:
            raise ValueError(f"rank={rank} must be at least 1 (SISO); the paper's MIMO uses 4.")
        pairs = int(state * config.rotated) // 2
        if not 0 < config.rotated <= 1 or pairs < 1:
            raise ValueError(
                f"rotated={config.rotated} of state={state} leaves no pair within it; "
                f"rotated must be in (0, 1] and the paper uses 0.5."
            )
        head_dims = ("heads", "value")
        self.zx = weights.inward(rngs, width, (2, heads, dim), ("parts", *head_dims))
        self.bc = weights.inward(rngs, width, (2, rank, state), ("parts", "groups", "state"))
        self.gates = weights.inward(rngs, width, (3, heads), ("parts", "heads"))
        self.angles = weights.inward(rngs, width, (pairs,), ("rank",))
        self.bc_norm = weights.filled(rngs, 1.0, (2, 1, state), ("parts", "groups", "state"))
        bias_dims = ("parts", "groups", "heads", "state")
        self.bc_bias = weights.filled(rngs, 1.0, (2, rank, heads, state), bias_dims)
        steps = weights.inverse_softplus(1e-3, 0.1)
        self.dt_bias = weights.weight(rngs, steps, (heads,), ("heads",))
        self.skip = weights.filled(rngs, 1.0, (heads,), ("heads",))
        # x, z and the output of each rank; one rank takes them as they are.
        shape, dims = (3, rank, heads, dim), ("parts", "groups", *head_dims)
        self.ranks = None if rank == 1 else weights.weight(rngs, _mean_of_ranks, shape, dims)
        self.o = weights.outward(rngs, (heads, dim), width, head_dims)

    def __call__(self, x, *, segments=None, state=None):
        state = state or self.init_state(x.shape[0], x.shape[1], x.dtype)
        dtype = mixer.wide(x.dtype)
        zx_BTPHV = weights.project("btd,dphv->btphv", x, self.zx)
        rate_BTH, dt_BTH, share_BTH = self._gates(x)
        b_BTRHN, c_BTRHN, angle = self._in_and_out(x, dt_BTH, segments, state["angle"])
        x_BTHV, gamma_BTH = zx_BTPHV[:, :, 1], share_BTH * dt_BTH
        last_b, b_tail = _before(b_BTRHN, segments, state["b"])
        last_x, x_tail = _before(x_BTHV, segments, state["x"])
        last_gamma, gamma_tail = _before(gamma_BTH, segments, state["gamma"][:, None])
        decay_BTH = jnp.exp(-rate_BTH * dt_BTH)
        weight_BTH = ((1 - share_BTH) * dt_BTH + last_gamma) * decay_BTH
        past_BTRHV, s_BHNV = _write_and_read(
            c_BTRHN,
            last_b,
            self._ranked(last_x, 0) * weight_BTH[:, :, None, :, None].astype(x.dtype),
            -rate_BTH * dt_BTH,
            segments,
            state["s"],
        )
        x_BTRHV = self._ranked(x_BTHV, 0)
        now = gamma_BTH[:, :, None, None].astype(dtype) * _scores(c_BTRHN, b_BTRHN)
        y_BTRHV = past_BTRHV + jnp.einsum("btrsh,btshv->btrhv", now.astype(x.dtype), x_BTRHV)
        # In float32: the gradient of a skip is a sum over tokens that nearly cancels.
        y_BTRHV = (y_BTRHV + self.skip[...][:, None] * x_BTRHV).astype(x.dtype)
        y_BTRHV = y_BTRHV * jax.nn.silu(self._ranked(zx_BTPHV[:, :, 0], 1))
        y = weights.project("bthv,hvd->btd", self._joined(y_BTRHV), self.o)
        tails = {"b": b_tail, "x": x_tail, "gamma": gamma_tail[:, 0]}
        return y, tails | {"angle": angle, "s": s_BHNV}

    def _gates(self, x):
        """Decay rate -A_t, step dt_t and the share lambda_t of the token's own input, (B, T, H)."""
        gates_BTPH = weights.project("btd,dph->btph", x, self.gates).astype(mixer.wide(x.dtype))
        rate_BTH = jnp.maximum(jax.nn.softplus(gates_BTPH[:, :, 0]), LEAST_RATE)
        dt_BTH = jax.nn.softplus(gates_BTPH[:, :, 1] + self.dt_bias[...])
        return rate_BTH, dt_BTH, jax.nn.sigmoid(gates_BTPH[:, :, 2])

    def _in_and_out(self, x, dt_BTH, segments, angle_BHS):
        """B_t and C_t, normalised, biased and turned by the angles so far; and the last angle."""
        bc_BTPRN = weights.project("btd,dprn->btprn", x, self.bc)
        bc_BTPRN = layers.rms_norm(bc_BTPRN, self.bc_norm[...], eps=1e-5)
        bc_BTPRHN = bc_BTPRN[..., None, :] + self.bc_bias[...]
        speed_BTS = jnp.tanh(weights.project("btd,ds->bts", x, self.angles).astype(dt_BTH.dtype))
        turn_BTHS = math.pi * dt_BTH[..., None] * speed_BTS[:, :, None]
        flat = turn_BTHS.reshape(*dt_BTH.shape[:2], -1)
        angle_BTM, last = linear_scan(
            flat,
            jnp.zeros_like(flat),
            segments=segments,
            initial_state=angle_BHS.reshape(x.shape[0], -1),
        )
        bc_BTPRHN = _rotate(bc_BTPRHN, angle_BTM.reshape(turn_BTHS.shape)[:, :, None, None])
        bc_BTPRHN = bc_BTPRHN.astype(x.dtype)
        # Whole turns are dropped, so that a long document's angle keeps its digits.
        last = (last - 2 * math.pi * jnp.round(last / (2 * math.pi))).reshape(angle_BHS.shape)
        return bc_BTPRHN[:, :, 0], bc_BTPRHN[:, :, 1], last

    def _ranked(self, x_BTHV, part):
        """x_t of each rank (B, T, R, H, V): its channels weighed rank by rank."""
        if self.ranks is None:
            return x_BTHV[:, :, None]
        return (x_BTHV[:, :, None] * self.ranks[part]).astype(x_BTHV.dtype)

    def _joined(self, y_BTRHV):
        """The output of all ranks (B, T, H, V)."""
        if self.ranks is None:
            return y_BTRHV[:, :, 0]
        return jnp.sum(y_BTRHV * self.ranks[2], axis=2).astype(y_BTRHV.dtype)

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """The last angle, the state P and the last token's B, x and gamma, all zero."""
        (_, rank, heads, state), dim = self.bc_bias.shape, self.zx.shape[-1]
        wide = mixer.wide(dtype)
        return {
            "angle": jnp.zeros((batch, heads, self.angles.shape[1]), wide),
            "s": jnp.zeros((batch, heads, state, dim), wide),
            "b": jnp.zeros((batch, 1, rank * heads * state), dtype),
            "x": jnp.zeros((batch, 1, heads * dim), dtype),
            "gamma": jnp.zeros((batch, heads), wide),
        }


def _mean_of_ranks(key, shape):
    """Weights of x, z and the output: 1 / R, 1 and 1 / R."""
    start = jnp.ones(shape)
    return start.at[1].mul(shape[1]) / shape[1]


def _before(x, segments, last):
    """x_{t-1} of the same document, zero at its start, in x's shape; and the last x (B, 1, .)."""
    shifted, tail = layers.token_shift(x.reshape(*x.shape[:2], -1), segments, last)
    return shifted.reshape(x.shape), tail


def _rotate(x, angle):
    """Turn the pairs (i, i + S) of the first 2 S numbers by `angle` (..., S)."""
    half = angle.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos, rest], axis=-1)


def _scores(c_BTRHN, b_BTSHN):
    """C_tr . B_ts of ranks r and s, (B, T, R, S, H), in float32."""
    dtype = mixer.wide(c_BTRHN.dtype)
    return jnp.einsum("btrhn,btshn->btrsh", c_BTRHN, b_BTSHN, preferred_element_type=dtype)


def _write_and_read(c_BTRHN, b_BTRHN, x_BTRHV, log_decay_BTH, segments, s_BHNV):
    """C_tr P_t (B, T, R, H, V) with P_t = exp(log_decay_t) P_{t-1} + sum_r B_tr x_tr^T; and P_T.

    The ranks of a token are read as so many tokens, of which the first decays; what the later ones
    write is added to what the earlier ones read.
    """
    batch, length, ranks, heads, _ = c_BTRHN.shape
    flat = lambda rows: rows.reshape(batch, length * ranks, *rows.shape[3:])
    decay_BTRH = jnp.pad(log_decay_BTH[:, :, None], ((0, 0), (0, 0), (0, ranks - 1), (0, 0)))
    y_BMHV, s_BHNV = gated_linear(
        flat(c_BTRHN),
        flat(b_BTRHN),
        flat(x_BTRHV),
        flat(decay_BTRH),
        segments=None if segments is None else jnp.repeat(segments, ranks, axis=1),
        initial_state=s_BHNV,
        scale=1.0,
    )
    y_BTRHV = y_BMHV.reshape(x_BTRHV.shape)
    if ranks == 1:
        return y_BTRHV, s_BHNV
    later = jnp.triu(jnp.ones((ranks, ranks)), 1)[..., None]
    scores = (_scores(c_BTRHN, b_BTRHN) * later).astype(x_BTRHV.dtype)
    return y_BTRHV + jnp.einsum("btrsh,btshv->btrhv", scores, x_BTRHV), s_BHNV
