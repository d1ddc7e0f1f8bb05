"""RWKV-4 to RWKV-7 and their channel mixers, against `transformers` and flash-linear-attention."""

import pytest
import torch
from fla.layers import rwkv6 as fla_rwkv6
from fla.layers import rwkv7 as fla_rwkv7
from fla.models.rwkv6 import modeling_rwkv6
from fla.models.rwkv7 import modeling_rwkv7
from fla.modules.norm import layernorm as fla_norm
from fla.modules.token_shift import token_shift_ref
from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence
from fla.ops.rwkv6.recurrent_naive import naive_recurrent_rwkv6
from fla.ops.rwkv7.fused_addcmul import torch_addcmul_rwkv7
from fla.ops.rwkv7.fused_k_update import k_update_ref
from fla.ops.rwkv7.gate_output_correction import gate_output_correction_ref
from torch.nn import functional
from transformers.models.rwkv.modeling_rwkv import RwkvConfig, RwkvFeedForward, RwkvSelfAttention

from models.channel import rwkv_channel
from models.delta import rwkv7
from models.linear_attention import rwkv5, rwkv6
from models.recurrent import rwkv4
from tests.peers import plain, sides

pytestmark = pytest.mark.peers


def test_rwkv4():
    layer = RwkvSelfAttention(RwkvConfig(hidden_size=32))

    def theirs(w):
        names = ("receptance", "key", "value")
        weights = {
            "time_decay": w["decay"],
            "time_first": w["bonus"],
            "output.weight": sides.linear(w["o"]),
        }
        for name, mix, matrix in zip(names, w["mix"], w["w"], strict=True):
            weights[f"time_mix_{name}"] = mix[None, None]
            weights[f"{name}.weight"] = sides.linear(matrix)
        return lambda x: sides.module(layer, weights, x)[0]

    sides.same(rwkv4.Config(), theirs, dtype="float32")


def finch(monkeypatch, **ranks):
    """Their RWKV-6 of width 32 with keys as wide as values."""

    def run(r, k, v, w, u, scale, **_):
        r, k, v, w = (a.transpose(1, 2) for a in (r, k, v, w))
        return naive_recurrent_rwkv6(r, k, v, w, u, scale)[0].transpose(1, 2), None

    norm = lambda residual_in_fp32, **inputs: fla_norm.group_norm_ref(**inputs)
    plain.install(monkeypatch, fla_norm, group_norm=norm)
    plain.install(monkeypatch, fla_rwkv6, chunk_rwkv6=run, token_shift=token_shift_ref)
    layer = fla_rwkv6.RWKV6Attention(
        hidden_size=32, expand_k=1.0, norm_eps=64e-5, layer_idx=0, **ranks
    )
    layer.gate_fn = functional.silu
    return layer


def finch_weights(w):
    """Those of their RWKV-6 that our RWKV-5 has too."""
    weights = {
        "bonus": w["bonus"],
        "g_norm.weight": w["norm"].flatten(),
        "g_norm.bias": w["norm_bias"].flatten(),
        "o_proj.weight": sides.linear(w["o"], 2),
    }
    for i, name in enumerate("rkvg"):
        weights[f"{name}_proj.linear.weight"] = sides.linear(w["rkvg"][i])
    return weights


def test_rwkv6(monkeypatch):
    layer = finch(monkeypatch, proj_low_rank_dim=3, gate_low_rank_dim=5)

    def theirs(w):
        order = [0, 4, 1, 2, 3]  # r, w, k, v, g of our r, k, v, g, w
        up = w["mix_up"][order].permute(2, 0, 1)  # (embed, parts, rank)
        weights = finch_weights(w) | {
            "x_proj.0.mu": w["first_mix"][0],
            "x_proj.0.linear.weight": sides.linear(w["mix_down"][:, order]),
            "x_proj.2.weight": up.flatten(1),
            "x_bias": w["mix"][order],
            "w_proj.linear.lora.0.weight": sides.linear(w["speed"]["down"]),
            "w_proj.linear.lora.2.weight": sides.linear(w["speed"]["up"]),
            "w_proj.linear.lora.2.bias": w["speed"]["bias"].flatten(),
        }
        return lambda x: sides.module(layer, weights, x)[0]

    sides.same(rwkv6.Config(mix_rank=3, decay_rank=5), theirs, dtype="float32")


def test_rwkv5_as_rwkv6_with_nothing_that_sees_the_token(monkeypatch):
    layer = finch(monkeypatch, proj_low_rank_dim=1, gate_low_rank_dim=1)

    def theirs(w):
        r, k, v, g = w["mix"]
        weights = {name: torch.zeros_like(p).double() for name, p in layer.named_parameters()}
        weights |= finch_weights(w) | {
            "x_bias": torch.stack([r, torch.zeros_like(r), k, v, g]),
            "w_proj.linear.lora.2.bias": w["speed"].flatten(),
        }
        return lambda x: sides.module(layer, weights, x)[0]

    sides.same(rwkv5.Config(), theirs, dtype="float32")


def test_rwkv7(monkeypatch):
    """The first layer's, which takes no values from another."""

    class GroupNorm(torch.nn.GroupNorm):
        def __init__(self, num_groups, hidden_size, elementwise_affine, eps, bias):
            super().__init__(num_groups, hidden_size, eps, elementwise_affine, bias=bias)

        def forward(self, x):
            return super().forward(x.flatten(0, 1)).reshape(x.shape)

    def run(r, w, k, v, a, b, scale, **_):
        r = r * scale * r.shape[-1] ** 0.5  # their function divides by it
        # It leaves the dtype of a and b.
        o, s = dplr_recurrence(*(x.transpose(1, 2).float() for x in (r, k, v, a, b, w)))
        return o.transpose(1, 2).double(), s

    plain.install(
        monkeypatch,
        fla_rwkv7,
        GroupNorm=GroupNorm,
        l2_norm=plain.unit,
        token_shift=lambda x, *_, **__: (token_shift_ref(x), None),
        fused_addcmul_rwkv7=torch_addcmul_rwkv7,
        fused_k_rwkv7=k_update_ref,
        gate_output_correction=gate_output_correction_ref,
        chunk_rwkv7=run,
    )
    layer = fla_rwkv7.RWKV7Attention(
        hidden_size=32,
        head_dim=8,
        layer_idx=0,
        num_hidden_layers=2,
        fuse_norm=True,
        norm_eps=64e-5 / 8,  # theirs is times the size of a head
    )

    def theirs(w):
        weights = {f"x_{name}": w["mix"][n][None, None] for n, name in enumerate("rkvwag")}
        weights |= {f"{name}_proj.weight": sides.linear(w[name]) for name in "rkv"}
        for name, part in (("w", w["speed"]), ("a", w["rate"]), ("g", w["gate"])):
            weights[f"{name}_lora.lora.0.weight"] = sides.linear(part["down"])
            weights[f"{name}_lora.lora.2.weight"] = sides.linear(part["up"])
            if name != "g":
                weights[f"{name}_lora.lora.2.bias"] = part["bias"].flatten()
        weights |= {
            "k_k": w["removal"].flatten(),
            "k_a": w["rate_in_key"].flatten(),
            "r_k": w["bonus"],
            "g_norm.weight": w["norm"].flatten(),
            "g_norm.bias": w["norm_bias"].flatten(),
            "o_proj.weight": sides.linear(w["o"], 2),
        }
        return lambda x: sides.module(layer, weights, x)[0]

    sides.same(rwkv7.Config(), theirs, dtype="float32")


def test_rwkv_channel():
    layer = RwkvFeedForward(RwkvConfig(hidden_size=32))

    def theirs(w):
        weights = {
            "time_mix_key": 1 - w["before"][0][None, None],
            "time_mix_receptance": 1 - w["before"][1][None, None],
            "key.weight": sides.linear(w["up"]),
            "value.weight": sides.linear(w["down"]),
            "receptance.weight": sides.linear(w["gate"]),
        }
        return lambda x: sides.module(layer, weights, x)[0]

    sides.same(rwkv_channel.Config(), theirs)


def test_rwkv_channel_as_rwkv6(monkeypatch):
    monkeypatch.setattr(modeling_rwkv6, "token_shift", token_shift_ref)
    layer = modeling_rwkv6.RWKV6FeedForward(32, intermediate_size=80)

    def theirs(w):
        weights = {
            "key.mu": w["before"][0],
            "key.linear.weight": sides.linear(w["up"]),
            "value.weight": sides.linear(w["down"]),
            "receptance.mu": w["before"][1],
            "receptance.linear.weight": sides.linear(w["gate"]),
        }
        return lambda x: sides.module(layer, weights, x)[0]

    sides.same(rwkv_channel.Config(hidden=80), theirs, dtype="float32")


def test_rwkv7_channel(monkeypatch):
    shifted = lambda x, *_, **__: (token_shift_ref(x), None)
    monkeypatch.setattr(modeling_rwkv7, "token_shift", shifted)
    layer = modeling_rwkv7.RWKV7FeedForward(32, layer_idx=0, num_hidden_layers=1)

    def theirs(w):
        weights = {
            "x_k": w["before"][0],
            "key.weight": sides.linear(w["up"]),
            "value.weight": sides.linear(w["down"]),
        }
        return lambda x: sides.module(layer, weights, x)[0]

    sides.same(rwkv_channel.Config(receptance=False), theirs, dtype="float32")
