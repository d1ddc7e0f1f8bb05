"""Recurrent layers and ternary maps against torch, `transformers`, sru, flash-linear-attention."""

import importlib
from unittest import mock

import numpy as np
import pytest
import torch
from fla.layers import hgrn as fla_hgrn
from fla.modules import fused_bitlinear
from fla.ops.hgrn.naive import naive_recurrent_hgrn
from flax import nnx
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import (
    RecurrentGemmaConfig,
    RecurrentGemmaRecurrentBlock,
)

from models.channel import bit_linear
from models.recurrent import gru, hgrn, lstm, mlgru, rg_lru, sru
from tests.peers import plain, sides

pytestmark = pytest.mark.peers


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.float64)


def test_gru():
    layer = torch.nn.GRU(32, 48, batch_first=True)

    def theirs(w):
        weights = {
            "weight_ih_l0": sides.linear(w["w"]),
            "weight_hh_l0": sides.linear(w["recurrent"]),
            "bias_ih_l0": w["bias"].flatten(),
            "bias_hh_l0": torch.cat([zeros(2 * 48), w["reset_bias"]]),
        }
        return lambda x: sides.module(layer, weights, x)[0] @ w["o"]

    sides.same(gru.Config(channels=48), theirs)


def test_lstm():
    layer = torch.nn.LSTM(32, 48, batch_first=True)
    order = [0, 1, 3, 2]  # they have the candidate before the output gate

    def theirs(w):
        weights = {
            "weight_ih_l0": sides.linear(w["w"][:, order]),
            "weight_hh_l0": sides.linear(w["recurrent"][:, order]),
            "bias_ih_l0": w["bias"][order].flatten(),
            "bias_hh_l0": zeros(4 * 48),
        }
        return lambda x: sides.module(layer, weights, x)[0] @ w["o"]

    sides.same(lstm.Config(channels=48), theirs)


def test_rg_lru_as_recurrent_gemma():
    config = RecurrentGemmaConfig(hidden_size=32, lru_width=48, num_attention_heads=4)
    layer = RecurrentGemmaRecurrentBlock(config, 0)

    def theirs(w):
        weights = {
            "linear_x.weight": sides.linear(w["xy"][:, 0]),
            "linear_x.bias": zeros(48),
            "linear_y.weight": sides.linear(w["xy"][:, 1]),
            "linear_y.bias": zeros(48),
            "linear_out.weight": sides.linear(w["o"]),
            "linear_out.bias": zeros(32),
            "conv_1d.weight": sides.filters(w["conv"]["taps"]),
            "conv_1d.bias": w["conv"]["bias"],
            "rg_lru.recurrent_gate_weight": w["gates"][0],
            "rg_lru.recurrent_gate_bias": w["gate_bias"][0],
            "rg_lru.input_gate_weight": w["gates"][1],
            "rg_lru.input_gate_bias": w["gate_bias"][1],
            "rg_lru.recurrent_param": w["rate"],
        }

        def run(x):
            places = torch.arange(x.shape[1])[None]
            return sides.module(layer, weights, x, places, None, use_cache=False)[0]

        return run

    sides.same(rg_lru.Config(channels=48), theirs, dtype="float32")


def sru_cell(width, bias):
    """Their cell in plain torch: their import would compile what runs it in C++."""
    with mock.patch("torch.utils.cpp_extension.load"), mock.patch("torch.jit.script", lambda f: f):
        return importlib.import_module("sru.modules").SRUCell(width, width, highway_bias=bias)


@pytest.mark.parametrize("bias", [0.0, -1.5])
def test_sru(bias):
    layer = sru_cell(32, bias)

    def theirs(w):
        weights = {
            "weight": w["w"].mT.flatten(1),  # theirs: of a channel all three
            "weight_c": w["v"].flatten(),
            "bias": w["bias"].flatten(),
        }
        return lambda x: sides.module(layer, weights, x.swapaxes(0, 1))[0].swapaxes(0, 1)

    sides.same(sru.Config(highway_bias=bias), theirs, dtype="float32")


def test_sru_starts_as_theirs():
    """Mean squares and largest values of every part, drawn for 1024 channels."""
    torch.manual_seed(0)
    width = 1024
    cell, ours = sru_cell(width, -1.0), sru.Config(highway_bias=-1.0).build(width, nnx.Rngs(0))
    theirs = {
        "w": cell.weight.view(width, width, 3).mT,
        "v": cell.weight_c.view(1, 2, width),
        "bias": cell.bias.view(1, 2, width),
    }
    for name, other in theirs.items():
        mine = np.asarray(getattr(ours, name)[...]).reshape(other.shape)
        for of in (lambda x: (x**2).mean((0, 2)), lambda x: abs(x).max(axis=2).max(axis=0)):
            np.testing.assert_allclose(of(mine), of(other.detach().numpy()), rtol=0.15)


class GatedLayerNorm(torch.nn.LayerNorm):
    """As ours, in the place of their gated RMS norm."""

    def forward(self, x, g):
        return super().forward(x) * functional.silu(g)


def plain_hgrn(monkeypatch, **settings):
    """Their HGRN by their naive scan, its lower bound in use."""
    run = lambda x, g, **_: naive_recurrent_hgrn(x, g)
    product = lambda x, y: functional.silu(x) * y
    plain.install(monkeypatch, fla_hgrn, chunk_hgrn=run, swiglu=product)
    return fla_hgrn.HGRNAttention(hidden_size=32, layer_idx=1, **settings)


def test_hgrn_real(monkeypatch):
    layer = plain_hgrn(monkeypatch, expand_ratio=1.5)
    for name in "ifg":  # ours have biases
        setattr(layer, f"{name}_proj", torch.nn.Linear(32, 48))
    layer.g_norm = GatedLayerNorm(48)

    def theirs(w):
        weights = {
            "i_proj.weight": sides.linear(w["c"]),
            "i_proj.bias": w["c_bias"][0],
            "f_proj.weight": sides.linear(w["forget"]),
            "f_proj.bias": w["forget_bias"],
            "g_proj.weight": sides.linear(w["gate"]),
            "g_proj.bias": w["gate_bias"][0],
            "g_norm.weight": w["norm"],
            "g_norm.bias": w["norm_bias"],
            "o_proj.weight": sides.linear(w["o"], 2),
        }
        bound = torch.tensor(0.25)
        return lambda x: sides.module(layer, weights, x, lower_bound=bound)[0]

    config = hgrn.Config(channels=48, lower_bound=0.25, complex=False)
    sides.same(config, theirs, dtype="float32")


class BiasedBitLinear(fused_bitlinear.BitLinear):
    """Adds the bias that theirs has and leaves out."""

    def forward(self, x):
        return super().forward(x) + self.bias


class Gate(torch.nn.Module):
    """The gate of the paper, without the norm that theirs joins to it."""

    def forward(self, x, g):
        return x * torch.sigmoid(g)


def ternary_weights(w, name):
    """Of their BitLinear, whose step is max(mean |w|, eps): the paper's is mean |w| + eps."""
    weight = sides.linear(w)
    more = weight.detach() * (1e-5 / weight.detach().abs().mean())
    ones = torch.ones(weight.shape[1], dtype=weight.dtype)
    return {f"{name}.weight": weight + more, f"{name}.norm.weight": ones}


def test_mlgru(monkeypatch):
    layer = plain_hgrn(monkeypatch)
    monkeypatch.setattr(fused_bitlinear, "RMSNorm", plain.RMSNorm)
    for name in "ifgo":
        cls = BiasedBitLinear if name in "if" else fused_bitlinear.BitLinear
        setattr(layer, f"{name}_proj", cls(32, 32, bias=name in "if", norm_eps=1e-5))
    layer.g_norm = Gate()

    def theirs(w):
        names = {"i": "candidate", "f": "forget", "g": "gate", "o": "o"}
        weights = {"f_proj.bias": w["bias"][0], "i_proj.bias": w["bias"][1]}
        for name, ours in names.items():
            weights |= ternary_weights(w[ours], f"{name}_proj")
        bound = torch.tensor(0.25)
        return lambda x: sides.module(layer, weights, x, lower_bound=bound)[0]

    sides.same(mlgru.Config(lower_bound=0.25), theirs, dtype="float32")


def test_bit_linear(monkeypatch):
    monkeypatch.setattr(fused_bitlinear, "RMSNorm", plain.RMSNorm)
    layer = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=64))
    maps = {"gate": (32, 64), "up": (32, 64), "down": (64, 32)}
    for name, shape in maps.items():
        bits = fused_bitlinear.BitLinear(*shape, norm_eps=1e-5)
        setattr(layer, f"{name}_proj", bits)

    def theirs(w):
        weights = {}
        for name in maps:
            weights |= ternary_weights(w[name], f"{name}_proj")
        return lambda x: sides.module(layer, weights, x)

    sides.same(bit_linear.Config(hidden=64), theirs)
