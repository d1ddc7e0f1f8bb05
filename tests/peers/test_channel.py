"""Channel mixers against `transformers`."""

import pytest
import torch
from torch.nn import functional
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek_v3
from transformers.models.gemma import modeling_gemma as gemma
from transformers.models.gpt2 import modeling_gpt2 as gpt2
from transformers.models.granitemoe import modeling_granitemoe as granitemoe
from transformers.models.llama import modeling_llama as llama
from transformers.models.nemotron import modeling_nemotron as nemotron
from transformers.models.nllb_moe import modeling_nllb_moe as nllb_moe
from transformers.models.olmoe import modeling_olmoe as olmoe
from transformers.models.switch_transformers import modeling_switch_transformers as switch_
from transformers.models.t5 import modeling_t5 as t5

from models.channel import (
    deepseek_moe,
    dropless,
    glu,
    gshard,
    mlp,
    noisy_topk,
    switch,
)
from tests.peers import names, sides

pytestmark = pytest.mark.peers

SIZES = {"hidden_size": 32, "intermediate_size": 96}


def peer(layer, mapping):
    """The function of our weights that `sides.same` asks for, of a layer of `transformers`."""
    return lambda w: lambda x: sides.module(layer, mapping(w), x)


def gated_experts(w):
    """Our gated experts as one tensor of gate and up, (E, 2 F, D), and one of down, (E, D, F)."""
    return {
        "experts.gate_up_proj": torch.cat([w["gate"], w["up"]], dim=2).mT,
        "experts.down_proj": w["down"].mT,
    }


def relu_experts(w):
    """Our experts as Switch's list of them."""
    weights = {}
    for e, (up, down) in enumerate(zip(w["up"], w["down"], strict=True)):
        weights[f"expert_{e}.wi.weight"] = sides.linear(up)
        weights[f"expert_{e}.wo.weight"] = sides.linear(down)
    return weights


def switch_settings(capacity):
    return switch_.SwitchTransformersConfig(
        d_model=32, d_ff=128, num_experts=8, expert_capacity=capacity
    )


def by_switch(w, rows, expert, weight):
    """Rows (B T, D) through Switch's experts: their numbers and weights are (B T, 2)."""
    experts = switch_.SwitchTransformersExperts(switch_settings(0))
    return sides.module(experts, relu_experts(w), rows, functional.one_hot(expert, 8), weight)


def test_swiglu_as_llama():
    layer = llama.LlamaMLP(llama.LlamaConfig(**SIZES))
    sides.same(glu.Config(hidden=96), peer(layer, lambda w: names.gated(w)))


def test_geglu_as_gemma():
    layer = gemma.GemmaMLP(gemma.GemmaConfig(**SIZES, hidden_act="gelu_pytorch_tanh"))
    config = glu.Config(hidden=96, activation="gelu")
    sides.same(config, peer(layer, lambda w: names.gated(w)))


def test_gelu_as_gpt2_without_biases():
    layer = gpt2.GPT2MLP(128, gpt2.GPT2Config(n_embd=32))
    mapping = lambda w: {
        "c_fc.weight": w["up"],
        "c_fc.bias": torch.zeros(128).double(),
        "c_proj.weight": w["down"],
        "c_proj.bias": torch.zeros(32).double(),
    }
    sides.same(mlp.Config(), peer(layer, mapping))


def test_relu_as_t5():
    layer = t5.T5DenseActDense(t5.T5Config(d_model=32, d_ff=96, feed_forward_proj="relu"))
    mapping = lambda w: {
        "wi.weight": sides.linear(w["up"]),
        "wo.weight": sides.linear(w["down"]),
    }
    sides.same(mlp.Config(hidden=96, activation="relu"), peer(layer, mapping))


def test_squared_relu_as_nemotron():
    layer = nemotron.NemotronMLP(nemotron.NemotronConfig(**SIZES))
    mapping = lambda w: {
        "up_proj.weight": sides.linear(w["up"]),
        "down_proj.weight": sides.linear(w["down"]),
    }
    sides.same(mlp.Config(hidden=96, activation="relu2"), peer(layer, mapping))


def test_dropless_as_olmoe():
    config = olmoe.OlmoeConfig(
        **SIZES, num_experts=8, num_experts_per_tok=2, experts_implementation="eager"
    )
    mapping = lambda w: {"gate.weight": sides.linear(w["router"]), **gated_experts(w["experts"])}
    layer = olmoe.OlmoeSparseMoeBlock(config)
    sides.same(dropless.Config(hidden=96), peer(layer, mapping), dtype="float32")


@pytest.mark.parametrize("shared", (1, 2))
def test_deepseek_v3(shared):
    """The bias gets no gradient from theirs: it is what a step by its sign moves as the paper does.

    That is down where the load is above its mean, by next to nothing in the norm of all gradients.
    """
    ours = deepseek_moe.Config(hidden=48, shared=shared)
    config = deepseek_v3.DeepseekV3Config(
        hidden_size=32,
        moe_intermediate_size=48,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        n_shared_experts=shared,
        routed_scaling_factor=1.0,
        experts_implementation="eager",
    )
    layer = deepseek_v3.DeepseekV3MoE(config)

    def theirs(w):
        layer.double().gate.e_score_correction_bias.copy_(w["bias"].detach())
        weights = {
            "gate.weight": sides.linear(w["router"]),
            **gated_experts(w["experts"]),
            **names.gated(w["shared"], "shared_experts."),
        }

        def run(x):
            gate = {"weight": weights["gate.weight"]}
            load = sides.module(layer.gate, gate, x)[2].flatten().bincount(minlength=16).double()
            w["bias"].grad = 2.0**-30 * (load - load.mean())
            return sides.module(layer, weights, x)

        return run

    sides.same(ours, theirs, dtype="float32")


def test_deepseek_v1_as_v2_with_one_group():
    config = deepseek_v2.DeepseekV2Config(
        hidden_size=32,
        moe_intermediate_size=48,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_shared_experts=1,
        routed_scaling_factor=1.0,
        topk_method="greedy",
        experts_implementation="eager",
    )
    mapping = lambda w: {
        "gate.weight": sides.linear(w["router"]),
        **gated_experts(w["experts"]),
        **names.gated(w["shared"], "shared_experts."),
    }
    ours = deepseek_moe.Config(hidden=48, score="softmax", groups=1, top_groups=1)
    sides.same(ours, peer(deepseek_v2.DeepseekV2Moe(config), mapping), dtype="float32")


@pytest.mark.parametrize("capacity", (5, 75))
def test_switch(capacity):
    """A row is a document here; at 5 many tokens are dropped, at 75 none."""
    layer = switch_.SwitchTransformersSparseMLP(switch_settings(capacity))
    layer.router.dtype = torch.float64

    def mapping(w):
        experts = {f"experts.{name}": value for name, value in relu_experts(w["experts"]).items()}
        return {"router.classifier.weight": sides.linear(w["router"]), **experts}

    ours = switch.Config(capacity_factor=1 / 64, least=capacity)
    sides.same(ours, peer(layer, mapping))


def test_gshard_as_nllb_moe():
    """NLLB's router and Switch's experts: NLLB's own loop takes its mask for expert numbers."""
    config = nllb_moe.NllbMoeConfig(
        d_model=32,
        num_experts=8,
        second_expert_policy="all",
        normalize_router_prob_before_dropping=True,
        moe_eval_capacity_token_fraction=1.0,
    )
    router = nllb_moe.NllbMoeTop2Router(config)
    router.dtype = torch.float64

    def theirs(w):
        def run(x):
            rows, classifier = x.flatten(0, 1), {"classifier.weight": sides.linear(w["router"])}
            weight, expert = sides.module(router, classifier, rows)[1].topk(2)
            return by_switch(w["experts"], rows, expert, weight).view_as(x)

        return run

    sides.same(gshard.Config(least=75), theirs)


def test_noisy_topk_as_granite():
    """Granite's router before Switch's experts; the noise is the loss's alone."""
    config = granitemoe.GraniteMoeConfig(hidden_size=32, num_local_experts=8, num_experts_per_tok=2)
    router = granitemoe.GraniteMoeTopKRouter(config)

    def theirs(w):
        w["noise"].grad = torch.zeros_like(w["noise"])

        def run(x):
            rows, gate = x.flatten(0, 1), {"weight": sides.linear(w["router"])}
            _, weight, expert = sides.module(router, gate, rows)
            return by_switch(w["experts"], rows, expert, weight).view_as(x)

        return run

    sides.same(noisy_topk.Config(), theirs, dtype="float32")
