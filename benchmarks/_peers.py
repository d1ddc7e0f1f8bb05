"""One architecture in two libraries: `transformers`' model, our config, a map of the weights."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from _figures import VOCABULARY
from _transformers import torch, transformers

Weights = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one model; `hidden` is the gated linear unit's width (0: there is none)."""

    width: int
    depth: int
    heads: int
    hidden: int = 0


@dataclasses.dataclass(frozen=True)
class Pair:
    """One architecture in both libraries.

    `layer(ours, one)` yields (name, array) of a layer in their naming and layout; `one` is what
    their norms add to the stored gain (1 for weights, 0 when the arrays are gradients).
    """

    title: str
    shapes: dict[str, Shape]
    theirs: Callable[[Shape], torch.nn.Module]
    ours: Callable[[Shape], Any]
    layer: Callable[[dict, float], Iterator[tuple[str, np.ndarray]]]
    trunk: str = "model"
    embed: str = "embed_tokens"
    norm: str = "norm"
    norms_add_one: bool = False
    tuned: dict[str, Any] = dataclasses.field(default_factory=dict)  # their best settings
    cache: Callable[[Any], Any] = lambda config: None  # what `generate` needs; None: makes its own


def their_model(pair: Pair, shape: Shape, params: dict, *, tuned: bool = False) -> torch.nn.Module:
    """Their model with our weights; `load_state_dict` proves that every weight has its partner."""
    model = pair.theirs(shape, **(pair.tuned if tuned else {}))
    weights = to_theirs(pair, params)
    weights["lm_head.weight"] = weights[f"{pair.trunk}.{pair.embed}.weight"]
    # A copy: their optimiser updates in place, and a JAX array's buffer must not change.
    model.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
    return model


def to_theirs(pair: Pair, params: dict, *, gradient: bool = False) -> Weights:
    """Our nested dict of weights (or their gradients) under their names, in their layouts."""
    one = float(pair.norms_add_one and not gradient)
    named = {
        f"{pair.trunk}.{pair.embed}.weight": np.asarray(params["embed"]),
        f"{pair.trunk}.{pair.norm}.weight": np.asarray(params["norm"]["scale"]) - np.float32(one),
    }
    for i, layer in enumerate(layers_of(params)):
        for name, array in pair.layer(layer, np.float32(one)):
            named[f"{pair.trunk}.layers.{i}.{name}"] = np.ascontiguousarray(array)
    return named


def layers_of(params: dict) -> list[dict]:
    """The weights of each layer, whether the model stacks them or keeps them apart."""

    def at(tree, i):
        if isinstance(tree, dict):
            return {key: at(value, i) for key, value in tree.items()}
        return np.asarray(tree) if i is None else np.asarray(tree[i])

    if params.get("stacks"):
        (stack,) = params["stacks"].values()
        depth = len(stack["norms"][0]["scale"])
        return [at(stack, i) for i in range(depth)]
    return [at(params["rest"][i], None) for i in sorted(params["rest"])]


def _linear(weight: np.ndarray, inputs: int = 1) -> np.ndarray:
    """Our (inputs..., outputs...) as torch's (outputs, inputs)."""
    return weight.reshape(int(np.prod(weight.shape[:inputs])), -1).T


def _conv(*taps: np.ndarray) -> np.ndarray:
    """Our (width, *channels), several beside each other, as torch's (channels, 1, width)."""
    flat = np.concatenate([part.reshape(len(part), -1) for part in taps], axis=1)
    return flat.T[:, None]


def _glu(up_down: dict, prefix: str):
    yield f"{prefix}.gate_proj.weight", _linear(up_down["up"][:, 0])
    yield f"{prefix}.up_proj.weight", _linear(up_down["up"][:, 1])
    yield f"{prefix}.down_proj.weight", _linear(up_down["down"])


def _no_bias(module: torch.nn.Module) -> None:
    module.register_parameter("bias", None)


class StateCache(transformers.DynamicCache):
    """Their cache for a model of recurrent layers alone; `generate` asks for its length in vain."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Recurrent states have no length; positions come from `generate`'s own counter."""
        return 0


COMMON = dict(
    vocab_size=VOCABULARY,
    tie_word_embeddings=True,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)


def _llama_theirs(shape: Shape) -> torch.nn.Module:
    config = transformers.LlamaConfig(
        **COMMON,
        hidden_size=shape.width,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        intermediate_size=shape.hidden,
    )
    return transformers.LlamaForCausalLM(config)


def _llama_ours(shape: Shape):
    from models import lm
    from models.attention import softmax
    from models.channel import glu

    mixer = softmax.Config(heads=shape.heads)
    return lm.Config(pattern=(mixer,), channel=glu.Config(hidden=shape.hidden))


def _llama_layer(ours: dict, one: float):
    attend = ours["parts"][0]["mixer"]
    yield "input_layernorm.weight", ours["parts"][0]["norm"]["scale"]
    yield "post_attention_layernorm.weight", ours["parts"][1]["norm"]["scale"]
    yield "self_attn.q_proj.weight", _linear(attend["q"])
    yield "self_attn.k_proj.weight", _linear(attend["kv"][:, 0])
    yield "self_attn.v_proj.weight", _linear(attend["kv"][:, 1])
    yield "self_attn.o_proj.weight", _linear(attend["o"], 2)
    yield from _glu(ours["parts"][1]["mixer"], "mlp")


def _mamba2_theirs(shape: Shape, **tuned) -> torch.nn.Module:
    config = transformers.Mamba2Config(
        **COMMON,
        hidden_size=shape.width,
        num_hidden_layers=shape.depth,
        num_heads=shape.heads,
        head_dim=64,
        n_groups=1,
        **tuned,
    )
    return transformers.Mamba2ForCausalLM(config)


def _mamba2_ours(shape: Shape):
    from models import lm
    from models.state_space import mamba2

    return lm.Config(pattern=(mamba2.Config(head_dim=64),), channel=None, norm_eps=1e-5)


def _mamba2_layer(ours: dict, one: float):
    mix = ours["parts"][0]["mixer"]
    parts = [_linear(mix[name]) for name in ("z", "x", "bc", "dt")]
    bias = [mix["x_conv"]["bias"].reshape(-1), mix["bc_conv"]["bias"].reshape(-1)]
    yield "norm.weight", ours["parts"][0]["norm"]["scale"]
    yield "mixer.in_proj.weight", np.concatenate(parts)
    yield "mixer.conv1d.weight", _conv(mix["x_conv"]["taps"], mix["bc_conv"]["taps"])
    yield "mixer.conv1d.bias", np.concatenate(bias)
    yield "mixer.dt_bias", mix["dt_bias"]
    yield "mixer.A_log", mix["log_a"]
    yield "mixer.D", mix["skip"]
    yield "mixer.norm.weight", mix["norm"].reshape(-1)
    yield "mixer.out_proj.weight", _linear(mix["o"], 2)


def _recurrent_gemma_theirs(shape: Shape) -> torch.nn.Module:
    config = transformers.RecurrentGemmaConfig(
        **COMMON,
        hidden_size=shape.width,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        intermediate_size=2 * shape.hidden,
        block_types=("recurrent",),
    )
    model = transformers.RecurrentGemmaForCausalLM(config)
    for layer in model.model.layers:
        block, mlp = layer.temporal_block, layer.mlp_block
        for linear in (block.linear_x, block.linear_y, block.linear_out):
            _no_bias(linear)
        for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            _no_bias(linear)
    return model


def _recurrent_gemma_ours(shape: Shape):
    from models import lm
    from models.channel import glu
    from models.recurrent import rg_lru

    # Their scale is rounded to bfloat16.
    scale = float(torch.tensor(shape.width**0.5, dtype=torch.bfloat16))
    return lm.Config(
        pattern=(rg_lru.Config(blocks=shape.heads),),
        channel=glu.Config(hidden=shape.hidden, activation="gelu"),
        embed_scale=scale,
        softcap=30.0,
    )


def _recurrent_gemma_layer(ours: dict, one: float):
    mix = ours["parts"][0]["mixer"]
    block = "temporal_block"
    yield "temporal_pre_norm.weight", ours["parts"][0]["norm"]["scale"] - one
    yield "channel_pre_norm.weight", ours["parts"][1]["norm"]["scale"] - one
    yield f"{block}.linear_x.weight", _linear(mix["xy"][:, 0])
    yield f"{block}.linear_y.weight", _linear(mix["xy"][:, 1])
    yield f"{block}.linear_out.weight", _linear(mix["o"])
    yield f"{block}.conv_1d.weight", _conv(mix["conv"]["taps"])
    yield f"{block}.conv_1d.bias", mix["conv"]["bias"]
    for i, gate in enumerate(("recurrent", "input")):
        yield f"{block}.rg_lru.{gate}_gate_weight", mix["gates"][i]
        yield f"{block}.rg_lru.{gate}_gate_bias", mix["gate_bias"][i]
    yield f"{block}.rg_lru.recurrent_param", mix["rate"]
    yield from _glu(ours["parts"][1]["mixer"], "mlp_block")


def _qwen3_next_theirs(shape: Shape) -> torch.nn.Module:
    config = transformers.Qwen3NextConfig(
        **COMMON,
        hidden_size=shape.width,
        num_hidden_layers=shape.depth,
        intermediate_size=shape.hidden,
        linear_num_key_heads=shape.heads,
        linear_num_value_heads=2 * shape.heads,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        layer_types=["linear_attention"] * shape.depth,
        num_experts=0,
    )
    return transformers.Qwen3NextForCausalLM(config)


def _qwen3_next_ours(shape: Shape):
    from models import lm
    from models.channel import glu
    from models.delta import gated_deltanet

    mixer = gated_deltanet.Config(
        heads=shape.heads, value_heads=2 * shape.heads, key_dim=64, value_dim=64
    )
    return lm.Config(pattern=(mixer,), channel=glu.Config(hidden=shape.hidden))


def _qwen3_next_layer(ours: dict, one: float):
    mix = ours["parts"][0]["mixer"]
    qk, v = mix["qk"]["map"], mix["v"]["map"]
    width, _, groups, _ = qk.shape
    # Theirs interleaves by key head: its q, its k, then the v and z (b and a) of its value heads.
    by_group = [qk[:, 0], qk[:, 1], v, mix["z"]]
    qkvz = np.concatenate([part.reshape(width, groups, -1) for part in by_group], axis=2)
    ba = np.stack([mix["beta"], mix["decay"]["map"]], axis=1)
    ba = ba.reshape(width, 2, groups, -1).swapaxes(1, 2)
    yield "input_layernorm.weight", ours["parts"][0]["norm"]["scale"] - one
    yield "post_attention_layernorm.weight", ours["parts"][1]["norm"]["scale"] - one
    yield "linear_attn.in_proj_qkvz.weight", _linear(qkvz)
    yield "linear_attn.in_proj_ba.weight", _linear(ba)
    yield "linear_attn.conv1d.weight", _conv(*(mix[name]["conv"]["taps"] for name in ("qk", "v")))
    yield "linear_attn.dt_bias", mix["decay"]["bias"]
    yield "linear_attn.A_log", mix["decay"]["log_a"]
    yield "linear_attn.norm.weight", mix["norm"]
    yield "linear_attn.out_proj.weight", _linear(mix["o"], 2)
    yield from _glu(ours["parts"][1]["mixer"], "mlp")


PAIRS = {
    "llama": Pair(
        "Llama",
        {"small": Shape(256, 4, 4, 688), "8m": Shape(320, 5, 5, 960), "tiny": Shape(64, 1, 2, 128)},
        _llama_theirs,
        _llama_ours,
        _llama_layer,
    ),
    "mamba2": Pair(
        "Mamba-2",
        {"small": Shape(256, 4, 8), "8m": Shape(384, 6, 12), "tiny": Shape(64, 1, 2)},
        _mamba2_theirs,
        _mamba2_ours,
        _mamba2_layer,
        trunk="backbone",
        embed="embeddings",
        norm="norm_f",
        tuned=dict(chunk_size=64),
    ),
    "recurrent_gemma": Pair(
        "RecurrentGemma, recurrent blocks",
        {"small": Shape(256, 4, 4, 384), "8m": Shape(384, 5, 4, 576), "tiny": Shape(64, 1, 2, 96)},
        _recurrent_gemma_theirs,
        _recurrent_gemma_ours,
        _recurrent_gemma_layer,
        norm="final_norm",
        norms_add_one=True,
        cache=lambda config: transformers.DynamicCache(),  # left empty: its layers hold their state
    ),
    "qwen3_next": Pair(
        "Qwen3-Next, Gated DeltaNet",
        {"small": Shape(256, 4, 4, 704), "8m": Shape(320, 4, 5, 896), "tiny": Shape(64, 1, 1, 128)},
        _qwen3_next_theirs,
        _qwen3_next_ours,
        _qwen3_next_layer,
        norms_add_one=True,
        cache=lambda config: StateCache(config=config),
    ),
}
