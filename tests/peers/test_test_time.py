"""Learning while reading: whole layers where flash-linear-attention has them, else its functions.

It has no layer of TTT or Titans. Its TTT has one rate for all tokens of a mini-batch and adds what
the inner network gives to its norm, where the paper adds the query (arXiv 2407.04620, section 2.7);
its Titans learns through a layer norm, the gradient of which lacks brackets, where the paper has
the error itself. So only a token's step is theirs in TTT, and in Titans only what is left of steps.
"""

import pytest
import torch
from fla.layers import mesa_net as fla_mesa_net
from fla.ops.mesa_net.naive import naive_mesa_net_exact
from fla.ops.titans.naive import combine_params
from fla.ops.ttt.naive import chunk_ttt_linear_ref
from torch.nn import functional

from models.test_time import mesanet, titans, ttt_linear
from tests.peers import plain, sides

pytestmark = pytest.mark.peers


def convolved(x, w):
    """x (B, T, ...) with {"taps": (width, ...), "bias": (...)}."""
    weight = sides.filters(w["taps"])
    past = functional.pad(x.flatten(2).mT, (len(w["taps"]) - 1, 0))
    y = functional.conv1d(past, weight, w["bias"].flatten(), groups=len(weight))
    return y.mT.reshape(x.shape)


def test_mesanet(monkeypatch):
    """Theirs solves the systems outright."""
    run = lambda q, k, v, g, beta, lamb, **_: (
        naive_mesa_net_exact(plain.unit(q), plain.unit(k), v, g, lamb, beta)[0].double(),
        None,
        None,
    )
    plain.install(monkeypatch, fla_mesa_net, chunk_mesa_net=run)
    layer = fla_mesa_net.MesaNet(hidden_size=32, num_heads=4, head_dim=8)

    def theirs(w):
        weights = {
            "q_proj.weight": sides.linear(w["qk"][:, 0]),
            "k_proj.weight": sides.linear(w["qk"][:, 1]),
            "v_proj.weight": sides.linear(w["v"]),
            "q_conv1d.weight": sides.filters(w["qk_conv"]["taps"][:, 0]),
            "k_conv1d.weight": sides.filters(w["qk_conv"]["taps"][:, 1]),
            "a_proj.weight": sides.linear(w["gates"][:, 0]),
            "b_proj.weight": sides.linear(w["gates"][:, 1]),
            "a_proj.bias": w["gate_bias"][0],
            "b_proj.bias": w["gate_bias"][1],
            "lambda_params": w["ridge"].flatten(),
            "o_norm.weight": w["norm"],
            "o_proj.weight": sides.linear(w["o"], 2),
        }
        return lambda x: sides.module(layer, weights, x)[0]

    sides.same(mesanet.Config(), theirs, dtype="float32")


def test_ttt_linear():
    """Their function takes each token's step from the weights before its mini-batch."""
    heads, dim, size = 4, 8, 16

    def stepped(k, v, rate, gain, shift, start):
        """The weights (B, T, H, K, K) and biases after a step of one token each."""
        rows, count = k.shape[:2]
        apart = lambda x: x.flatten(0, 1)[:, None].float()
        start = (
            each[:, None].expand(-1, count, -1, -1, -1).flatten(0, 1).float() for each in start
        )
        _, *after = chunk_ttt_linear_ref(
            apart(torch.zeros_like(k)),
            apart(k),
            apart(v),
            gain,
            shift,
            apart(rate[..., None]),
            1.0,
            1e-6,
            1,
            *start,
            output_final_state=True,
        )
        return (each.double().unflatten(0, (rows, count)) for each in after)

    def normed(x, gain, shift):
        x = x - x.mean(-1, keepdim=True)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * gain + shift

    def theirs(w):
        def run(x):
            places = torch.arange(x.shape[1]) % size
            qk = plain.mapped(x, w["qk"])
            q, k = (plain.turned(convolved(qk, w[name]), places) for name in ("q_conv", "k_conv"))
            v, z = plain.mapped(x, w["vz"]).unbind(2)
            rate = (plain.mapped(x, w["rate"]) + w["rate_bias"]).sigmoid() / dim
            share = (1 / torch.arange(1, size + 1) + w["share"]).relu()
            weights = [each[0].expand(len(x), -1, -1, -1) for each in (w["w"], w["b"])]
            read, parts = [], (each.split(size, 1) for each in (q, k, v, rate))
            for q_, k_, v_, rate_ in zip(*parts, strict=True):
                after = stepped(k_, v_, rate_, w["gain"], w["shift"], weights)
                part = share[: q_.shape[1], None, None, None]
                seen = [
                    before[:, None] + part * (one - before[:, None]).cumsum(1)
                    for before, one in zip(weights, after, strict=True)
                ]
                weights = [each[:, -1] for each in seen]
                inner = (q_[..., None, :] @ seen[0] + seen[1])[..., 0, :]
                read.append(q_ + normed(inner, w["gain"], w["shift"]))
            o = torch.cat(read, 1).flatten(2)
            o = normed(o, w["norm"].flatten(), w["norm_bias"].flatten())
            o = o.unflatten(2, (heads, dim)) * functional.gelu(z, approximate="tanh")
            return torch.tensordot(o, w["o"], 2)

        return run

    sides.same(ttt_linear.Config(), theirs, dtype="float32")


def perceptron(weights, x):
    """x (..., 1, K) or (..., K) through the maps of a Titans memory, SiLU between them."""
    for n, each in enumerate(weights):
        x = (functional.silu(x) if n else x) @ each
    return x


@pytest.mark.parametrize(("depth", "window"), [(2, 64), (1, 0)])
def test_titans(depth, window):
    """Their numbers say how much of each earlier step is left in the weights after a token."""
    config = titans.Config(depth=depth, window=window, clip=1e3)  # no error is so long
    batch, rate = 16, 0.1  # tokens of a mini-batch, the largest step

    def error(weights, k, v):
        return (perceptron(weights, k) - v).square().sum() / 2

    by_token = torch.vmap(torch.func.grad(error), (None, 0, 0))
    slopes = torch.vmap(torch.vmap(by_token, (0, 1, 1), 1))  # weights (B, H, ..), k (B, C, H, K)

    def memory(w, x, weights, momentum):
        """What queries read, and the weights and the momentum after x."""
        q, k, v = functional.silu(convolved(plain.mapped(x, w["qkv"]), w["conv"])).unbind(2)
        gates = plain.mapped(x, w["memory"]["gates"]) + w["memory"]["gate_bias"]
        read = []
        parts = (each.split(batch, 1) for each in (plain.unit(q), plain.unit(k), v, gates))
        for q_, k_, v_, gates_ in zip(*parts, strict=True):
            alpha, eta, theta = gates_.sigmoid().permute(2, 0, 3, 1)  # (B, H, C)
            given = (each[..., None] for each in (rate * theta, alpha, eta))
            kept, _, moved, _, _, pair, going, went = combine_params(*given, q_.shape[1])
            found = slopes(weights, k_, v_)  # (B, C, H, ..)
            now = lambda x: x.mT[..., None, None]
            seen = [
                now(kept) * before[:, None]
                + now(moved) * push[:, None]
                - torch.einsum("bhcs,bshij->bchij", pair, slope)
                for before, push, slope in zip(weights, momentum, found, strict=True)
            ]
            momentum = [
                going[..., None, None] * push - torch.einsum("bhs,bshij->bhij", went, slope)
                for push, slope in zip(momentum, found, strict=True)
            ]
            weights = [each[:, -1] for each in seen]
            read.append(perceptron(seen, q_[..., None, :])[..., 0, :])
        return torch.cat(read, 1), weights, momentum

    def attention(w, y):
        q, k, v = plain.mapped(y, w["read"]).unbind(2)
        q, k = (plain.turned(x, torch.arange(y.shape[1])) for x in (q, k))
        return torch.tensordot(plain.attention(q, k, v, window), w["out"], 2)

    def theirs(w):
        def run(x):
            first = [each[None] for each in w["memory"]["w"].values()]
            still = [torch.zeros_like(each) for each in first]
            _, *begin = memory(w, w["persistent"][None], first, still)
            begin = ([each.expand(len(x), -1, -1, -1) for each in part] for part in begin)
            o, _, _ = memory(w, x, *begin)
            o = functional.rms_norm(o, o.shape[-1:], eps=1e-6) * w["norm"]
            y = torch.tensordot(o * functional.silu(plain.mapped(x, w["z"])), w["o"], 2)
            return attention(w, y) if window else y

        return run

    sides.same(config, theirs, dtype="float32")
