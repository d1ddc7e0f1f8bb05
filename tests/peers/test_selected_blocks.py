"""Attention to chosen blocks against flash-linear-attention, and the indexer of `transformers`.

Their layers mix other parts in, so projections and positions are written here; the choice and the
attention to what it names are theirs.
"""

import itertools

import pytest
import torch
from fla.layers import moba as fla_moba
from fla.ops.dsa.naive import naive_dsa
from fla.ops.moba import parallel as fla_parallel_moba
from fla.ops.nsa.naive import naive_nsa_compression, naive_nsa_selection, naive_nsa_topk
from torch.nn import functional
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as deepseek_v32

from models.sparse_attention import dsa, moba, nsa
from tests.peers import plain, sides

pytestmark = pytest.mark.peers


def turned(*parts):
    """All of them at their places in the row."""
    return [plain.turned(x, torch.arange(x.shape[1])) for x in parts]


class Attention:
    """Plain torch for their autograd function, which is two calls of FlashAttention."""

    @staticmethod
    def apply(q, k, v, bounds, more_q, more_kv, more_bounds_q, more_bounds_k, _length, block, at):
        scale, heads = q.shape[-1] ** -0.5, q.shape[1]
        values, total = torch.zeros_like(q).flatten(0, 1), torch.zeros_like(q[..., 0]).flatten()
        every = torch.arange(len(total)).reshape(q.shape[:2])
        own = [
            (q[a:b, h], k[a:b, h], v[a:b, h], every[a:b, h], True)
            for a, b in itertools.pairwise(bounds.tolist())
            for h in range(heads)
        ]
        pieces = zip(
            itertools.pairwise(more_bounds_q.tolist()),
            itertools.pairwise(more_bounds_k.tolist()),
            strict=True,
        )
        more = [
            (more_q[a:b, 0], more_kv[c:d, 0, 0], more_kv[c:d, 1, 0], at[a:b], False)
            for (a, b), (c, d) in pieces
        ]
        for q_, k_, v_, at_, causal in own + more:
            e = (q_ @ k_.T * scale).exp()
            e = e.tril() if causal else e
            values = values.index_add(0, at_, e @ v_)
            total = total.index_add(0, at_, e.sum(-1))
        return (values / total[:, None]).reshape(q.shape)


def test_moba(monkeypatch):
    """Their layer but for the norm of its output."""
    monkeypatch.setattr(fla_parallel_moba, "flash_attn_varlen_func", True)
    monkeypatch.setattr(fla_parallel_moba, "ParallelMoBAFunction", Attention)
    monkeypatch.setattr(fla_moba, "RotaryEmbedding", lambda **_: lambda q, k, **_: turned(q, k))
    monkeypatch.setattr(fla_moba, "RMSNorm", lambda *_, **__: torch.nn.Identity())
    layer = fla_moba.MoBA(hidden_size=32, num_heads=4, moba_chunk_size=16, moba_topk=3)

    def theirs(w):
        weights = {
            "q_proj.weight": sides.linear(w["q"]),
            "k_proj.weight": sides.linear(w["kv"][:, 0]),
            "v_proj.weight": sides.linear(w["kv"][:, 1]),
            "o_proj.weight": sides.linear(w["o"], 2),
        }
        return lambda x: sides.module(layer, weights, x)[0]

    sides.same(moba.Config(), theirs, dtype="float32")


def test_nsa():
    """Compressed blocks are those that are chosen, the only ones that theirs knows."""
    block, window, top = 8, 20, 5

    def compressed(x, w):
        """The paper's MLP over a block's tokens with their places, its first layer in full."""
        kv = plain.mapped(x, w["kv_far"])
        kv = functional.pad(kv, (0, 0) * 3 + (0, -kv.shape[1] % block))
        kv = kv.unflatten(1, (-1, block)) + w["place"].swapaxes(0, 1)[:, :, None]
        mlp = torch.nn.Sequential(
            torch.nn.Linear(block * 8, 8, bias=False),
            torch.nn.SiLU(),
            torch.nn.Linear(8, 8, bias=False),
        )
        made = []
        for part in range(2):
            first = torch.stack([torch.diag(tap) @ w["mlp_in"][part] for tap in w["taps"][part]])
            weights = {
                "0.weight": sides.linear(first, 2),
                "2.weight": sides.linear(w["mlp_out"][part]),
            }
            tokens = kv[:, :, :, part].permute(0, 1, 3, 2, 4)  # (B, N, G, block, K)
            made.append(sides.module(mlp, weights, tokens.flatten(-2)))
        return made

    def theirs(w):
        def run(x):
            q, (k, v) = plain.mapped(x, w["q"]), plain.mapped(x, w["kv"]).unbind(2)
            k_near, v_near = plain.mapped(x, w["kv_near"]).unbind(2)
            gates = plain.mapped(x, w["gates"]).sigmoid()[..., None]
            k_far, v_far = compressed(x, w)
            scale = q.shape[-1] ** -0.5
            far, _ = naive_nsa_compression(q, k_far, v_far, block, scale)
            lists = naive_nsa_topk(q, k_far, top, block, scale)
            q, k, k_near = turned(q, k, k_near)
            chosen = naive_nsa_selection(q, k, v, lists, block)
            parts = torch.stack([far, chosen, plain.attention(q, k_near, v_near, window)], 2)
            return torch.tensordot((gates * parts).sum(2), w["o"], 2)

        return run

    config = nsa.Config(block=block, compress=block, stride=block, window=window, top=top)
    sides.same(config, theirs, dtype="float32")


def test_dsa():
    """One token is a block, as in the paper; here a query always reads its own, in theirs not.

    So the indexer, DeepSeek-V3.2's in `transformers`, is asked about the tokens before each. It
    gives no gradient, and our loss for it is no part of what is compared. Many of its heads: a sum
    of ReLUs is a tie where all are 0. Its queries come from x, theirs from latent ones.
    """
    top, heads = 9, 16
    config = deepseek_v32.DeepseekV32Config(
        hidden_size=32,
        q_lora_rank=32,
        index_n_heads=heads,
        index_head_dim=16,
        index_topk=top - 1,
        qk_rope_head_dim=16,
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )
    indexer = deepseek_v32.DeepseekV32Indexer(config, 0)
    rotary = deepseek_v32.DeepseekV32RotaryEmbedding(config)

    def theirs(w):
        weights = {
            "wq_b.weight": sides.linear(w["index_q"]),
            "wk.weight": sides.linear(w["index_k"]),
            "k_norm.weight": w["norm"],
            "k_norm.bias": w["norm_bias"],
            "weights_proj.weight": sides.linear(w["index_w"]),
        }

        def run(x):
            time = torch.arange(x.shape[1])
            earlier = (time < time[:, None]).expand(len(x), -1, -1)
            turns = rotary(x, time[None])
            before = sides.module(indexer, weights, x, x, turns, earlier, time[None]).long()
            before = before.masked_fill(before >= time[:, None], -1)  # fewer than `top` there are
            own = time[None, :, None].expand(len(x), -1, 1)
            q, (k, v) = plain.mapped(x, w["q"]), plain.mapped(x, w["kv"]).unbind(2)
            q, k = turned(q, k)
            o = naive_dsa(q, k, v, None, None, indices=torch.cat([before, own], 2))
            return torch.tensordot(o, w["o"], 2) + 0 * sum(part.sum() for part in weights.values())

        return run

    ours = dsa.Config(block=1, top=top, index_heads=heads, kv_heads=2)
    sides.same(ours, theirs, dtype="float32")
