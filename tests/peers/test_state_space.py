"""State spaces against `transformers`, flash-linear-attention and s5-pytorch."""

import pytest
import s5 as s5_pytorch
import torch
from fla.layers import mamba3 as fla_mamba3
from fla.modules.norm import layernorm_gated
from fla.ops.simple_gla.naive import naive_recurrent_simple_gla
from torch.nn import functional
from transformers.models.mamba.modeling_mamba import MambaConfig, MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer

from models.state_space import mamba1, mamba2, mamba3, s5
from tests.peers import sides

pytestmark = pytest.mark.peers


def test_mamba1():
    layer = MambaMixer(MambaConfig(hidden_size=32, state_size=8, time_step_rank=3), 0)

    def theirs(w):
        weights = {
            "in_proj.weight": sides.linear(w["uz"]),
            "conv1d.weight": sides.filters(w["conv"]["taps"]),
            "conv1d.bias": w["conv"]["bias"],
            "x_proj.weight": torch.cat([sides.linear(w["dt_down"]), sides.linear(w["bc"])]),
            "dt_proj.weight": sides.linear(w["dt_up"]),
            "dt_proj.bias": w["dt_bias"],
            "A_log": w["log_a"],
            "D": w["skip"],
            "out_proj.weight": sides.linear(w["o"]),
        }
        return lambda x: sides.module(layer, weights, x)

    sides.same(mamba1.Config(state=8, dt_rank=3), theirs, dtype="float32")


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2(groups):
    settings = Mamba2Config(
        hidden_size=32, num_heads=4, head_dim=16, state_size=8, n_groups=groups, chunk_size=16
    )
    layer = Mamba2Mixer(settings, 0)

    def theirs(w):
        maps = [w["z"], w["x"], w["bc"], w["dt"]]
        convs = [w["x_conv"], w["bc_conv"]]
        weights = {
            "in_proj.weight": torch.cat([sides.linear(m) for m in maps]),
            "conv1d.weight": torch.cat([sides.linear(c["taps"]) for c in convs])[:, None],
            "conv1d.bias": torch.cat([c["bias"].flatten() for c in convs]),
            "dt_bias": w["dt_bias"],
            "A_log": w["log_a"],
            "D": w["skip"],
            "norm.weight": w["norm"].flatten(),
            "out_proj.weight": sides.linear(w["o"], 2),
        }
        return lambda x: sides.module(layer, weights, x)

    sides.same(mamba2.Config(head_dim=16, state=8, groups=groups), theirs, dtype="float32")


def mamba3_op(Q, K, V, ADT, DT, Trap, Q_bias, K_bias, Angles, MIMO_V, MIMO_Z, MIMO_Out, D, Z, **_):
    """Stands in for `mamba_ssm`, which their layer calls: both its products by their naive scan."""
    angle = torch.pi * torch.cumsum(torch.tanh(Angles) * DT.mT[..., None], 1)
    angle = functional.pad(angle, (0, Q.shape[-1] // 2 - angle.shape[-1]))[:, :, None]
    rank_first = lambda w: w.transpose(0, 1)

    def turned(x):
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)

    q, k = turned(Q + rank_first(Q_bias)), turned(K + rank_first(K_bias))
    v, z = (x[:, :, None] * rank_first(w) for x, w in ((V, MIMO_V), (Z, MIMO_Z)))
    dt, log_decay, share = DT.mT, ADT.mT, torch.sigmoid(Trap).mT
    before = lambda x: functional.pad(x, (0, 0, 0, 0, 0, 0, 1, -1))

    def read(q, k, v, weight):
        v = v * weight[:, :, None, :, None]
        writes = zip(k.unbind(2), v.unbind(2), strict=True)
        return sum(naive_recurrent_simple_gla(q, *kv, log_decay, scale=1.0)[0] for kv in writes)

    past = (before(k), before(v), (1 - share) * dt * log_decay.exp())
    y = torch.stack([read(r, k, v, share * dt) + read(r, *past) for r in q.unbind(2)], 2)
    y = (y + D[:, None] * v) * functional.silu(z)
    return (y * rank_first(MIMO_Out)).sum(2)


def mamba3_single(Q, K, Q_bias, K_bias, V, **inputs):
    one = torch.ones(V.shape[2], 1, V.shape[3])
    ranks = dict(MIMO_V=one, MIMO_Z=one, MIMO_Out=one)
    biases = dict(Q_bias=Q_bias[:, None], K_bias=K_bias[:, None])
    return mamba3_op(Q[:, :, None], K[:, :, None], V, **biases, **ranks, **inputs)


@pytest.mark.parametrize("rank", [1, 2])
def test_mamba3(rank, monkeypatch):
    monkeypatch.setattr(layernorm_gated, "rmsnorm_fn", layernorm_gated.rms_norm_ref)
    monkeypatch.setattr(fla_mamba3, "mamba3_siso_combined", mamba3_single)
    monkeypatch.setattr(fla_mamba3, "mamba3_mimo_combined", mamba3_op)
    layer = fla_mamba3.Mamba3(
        hidden_size=32, state_size=16, head_dim=16, is_mimo=rank > 1, mimo_rank=rank
    )
    layer.forward = layer.cuda_kernels_forward  # which their forward refuses on a CPU
    order = [0, 4, 1, 5, 2, 6, 3, 7, *range(8, 16)]  # they turn neighbours, we turn i and i + 4

    def theirs(w):
        rate, dt, share = w["gates"].unbind(1)
        b_c = w["bc"][..., order]
        maps = [*w["zx"].unbind(1), *b_c.unbind(1), dt, rate, share, w["angles"]]
        weights = {
            "in_proj.weight": torch.cat([sides.linear(m) for m in maps]),
            "dt_bias": w["dt_bias"],
            "D": w["skip"],
            "out_proj.weight": sides.linear(w["o"], 2),
        }
        for part, name in enumerate("BC"):
            weights[f"{name}_norm.weight"] = w["bc_norm"][part, 0, order]
            weights[f"{name}_bias"] = w["bc_bias"][part].transpose(0, 1)[..., order]
        if rank > 1:
            for name, ranks in zip("xzo", w["ranks"], strict=True):
                weights[f"mimo_{name}"] = ranks.transpose(0, 1)
        return lambda x: sides.module(layer, weights, x)[0]

    sides.same(mamba3.Config(head_dim=16, state=16, rank=rank), theirs, dtype="float32")


def test_s5():
    """Theirs reads all modes and takes the real part, ours twice that of half of them."""
    layer = s5_pytorch.S5(32, state_width=8, bcInit="dense")

    def theirs(w):
        cut = w["rate"].clamp(min=1e-4)  # `clip_eigs` of the original, which theirs left out
        weights = {
            "seq.Lambda": torch.complex(-cut, w["frequency"]),
            "seq.B": w["b"].permute(2, 0, 1),
            "seq.C": 2 * torch.complex(*w["c"].unbind(1)),
            "seq.D": w["skip"],
            "seq.log_step": w["log_dt"],
        }

        def run(x):
            y = functional.gelu(sides.module(layer, weights, x), approximate="tanh")
            return y * torch.sigmoid(functional.linear(y, sides.linear(w["gate"]), w["gate_bias"]))

        return run

    sides.same(s5.Config(state=16, blocks=2), theirs, dtype="float32")
