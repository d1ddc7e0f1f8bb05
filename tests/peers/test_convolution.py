"""Convolutions against `transformers` and flash-linear-attention."""

import pytest
import torch
from fla.modules import long_conv
from transformers.models.lfm2.modeling_lfm2 import Lfm2Config, Lfm2ShortConv

from models.convolution import gated_conv, hyena, monarch_mixer
from tests.peers import plain, sides

pytestmark = pytest.mark.peers


def test_gated_conv_as_lfm2():
    layer = Lfm2ShortConv(Lfm2Config(hidden_size=32), 0)

    def theirs(w):
        weights = {
            "in_proj.weight": sides.linear(w["bcu"]),
            "conv.weight": sides.filters(w["conv"]["taps"]),
            "out_proj.weight": sides.linear(w["o"]),
        }
        return lambda x: sides.module(layer, weights, x)

    sides.same(gated_conv.Config(), theirs)


def filters(w, length, count):
    """Theirs at the first `count` lags (F, D, count), and the released network and windows.

    The windows of the released code (safari's ExponentialModulation) fall to 1 % after 1.5 lengths
    in the first channel and 0.3 lengths in the last one: log(100) / 1.5 to log(100) / 0.3.
    """
    bands = len(w["maps"][0]) // 2
    h = features = long_conv.PositionalEmbedding(1 + 2 * bands, length)(count)[0].double()
    for i in range(3):
        maps = torch.nn.Linear(h.shape[1], len(w["frequency"]))
        weights = {"weight": sides.linear(w["maps"][i]), "bias": w["biases"][i]}
        h = torch.sin(w["frequency"] * sides.module(maps, weights, h))
    rates = torch.linspace(3.0701134573, 15.3505672866, w["out"].shape[2]).double()
    windows = torch.exp(-rates * features[:, :1])
    return torch.einsum("lr,rfd->fdl", h, w["out"]) * windows.T


def convolved(z, filter, skip, **ahead):
    """Theirs adds its input, ours the input times a weight."""
    return long_conv.fft_conv(z, filter, None, gelu=False, **ahead) + (skip[:, None] - 1) * z


def short(x, conv, count):
    """The short convolution of (B, T, count * 32), channels before time."""
    module = plain.ShortConvolution(count * 32, 3, bias=True, activation=None)
    weights = {"weight": sides.linear(conv["taps"])[:, None], "bias": conv["bias"].flatten()}
    return sides.module(module, weights, x)[0].mT.unflatten(1, (count, 32)).unbind(1)


def test_hyena():
    """The features of the filters and the convolutions are theirs."""
    length = 64  # shorter than the rows

    def theirs(w):
        every = filters(w["filters"], length, length)

        def run(x):
            *gates, z = short(x @ w["xv"].flatten(1), w["conv"], 3)
            for gate, skip, filter in zip(gates, w["skip"], every, strict=True):
                z = gate * convolved(z, filter, skip)
            return z.mT @ w["o"]

        return run

    config = hyena.Config(length=length, filter_hidden=16, filter_bands=4)
    sides.same(config, theirs, dtype="float32")


@pytest.mark.parametrize("causal", [True, False])
def test_monarch_mixer(causal):
    """Filters and convolutions as in M2's MonarchMixerSequenceMixing; its maps are dense there."""
    length, blocks, size = 80, 8, 4  # longer than the rows

    def monarch(x, maps, part=0):
        """Blocks of places, a transposition, blocks of blocks, and back."""
        turned = lambda x, *shape: x.unflatten(-1, shape).mT.flatten(-2)
        x = turned(x @ torch.block_diag(*maps["right"][part]), blocks, size)
        return turned(x @ torch.block_diag(*maps["left"][part]), size, blocks)

    def theirs(w):
        def run(x):
            every = filters(w["filters"], length, x.shape[1])
            v, gate, u = short(
                torch.cat([monarch(x, w["into"], n) for n in range(3)], -1), w["conv"], 3
            )
            if causal:
                y = gate * convolved(u * v, every[0], w["skips"][0])
            else:
                y = gate * convolved(u * v, every[0], w["skips"][0], k_rev=every[1])
                y = y + convolved(x.mT, every[2], w["skips"][1], k_rev=every[3])
            return monarch(y.mT, w["out"])

        return run

    config = monarch_mixer.Config(
        causal=causal, blocks=blocks, length=length, filter_hidden=16, filter_bands=2
    )
    sides.same(config, theirs, dtype="float32")
