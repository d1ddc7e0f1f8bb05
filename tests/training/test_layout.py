"""A state whose layers are stacked, and the same state with its layers one by one."""

import dataclasses

import jax
import numpy as np
import pytest

from configs.schema import Data, Experiment, Optimizer
from models import lm
from models.attention import softmax
from models.recurrent import rg_lru
from parallel import sharding
from parallel.mesh import make_mesh
from training import layout
from training.leaves import named
from training.optimizers import muon
from training.step import make_trainer, put_batch

BATCH, LENGTH = 2, 8
PATTERN = (rg_lru.Config(), softmax.Config(heads=2))


def experiment(layers, depth=5):
    """Five layers are two periods of two blocks and one more."""
    return Experiment(
        model=lm.Config(
            width=16, depth=depth, pattern=PATTERN, channel=None, dtype="float32", layers=layers
        ),
        carry_state=True,
        data=Data(layout="stream", length=LENGTH, batch=BATCH),
        optimizer=Optimizer(rule=muon.Config(), warmup_steps=1),
    )


def trainer_of(config):
    mesh = make_mesh(data=1, fsdp=2, devices=jax.devices()[:2])
    return mesh, make_trainer(config, mesh, np.ones(257, np.float32))


def stepped(config, mesh, trainer, state, seed):
    tokens = np.random.default_rng(seed).integers(0, 257, (BATCH, LENGTH + 1)).astype(np.int32)
    ones = np.ones((BATCH, LENGTH), np.int32)
    rows = dict(inputs=tokens[:, :-1], targets=tokens[:, 1:], segments=ones)
    rows |= {"weights": ones.astype(np.float32)}
    with sharding.on(mesh):
        state, metrics = trainer.step(state, put_batch(trainer.batch, rows))
    return state, float(metrics["loss"])


def bits(tree):
    """Bytes of every leaf by name, without the random key."""
    leaves = {name: leaf for name, leaf in named(tree).items() if name != "key"}
    return {name: (leaf.shape, np.asarray(leaf).tobytes()) for name, leaf in leaves.items()}


def test_there_and_back_bit_by_bit_and_the_same_training():
    stacked, apart = experiment("scanned"), experiment("unrolled")
    mesh, scanned = trainer_of(stacked)
    _, unrolled = trainer_of(apart)
    with sharding.on(mesh):
        state = scanned.init()
    state, _ = stepped(stacked, mesh, scanned, state, 0)  # moments and carried states are filled
    before = bits(state)
    flat = layout.relaid(state, stacked.model, unrolled.abstract, apart.model)
    assert {n: (x.shape, x.dtype, x.sharding) for n, x in named(flat).items()} == {
        n: (x.shape, x.dtype, x.sharding) for n, x in named(unrolled.abstract).items()
    }
    # Layer 3 is the second block of the second period; layer 4 follows the stacks.
    one = named(flat)["params/rest/3/parts/0/mixer/q"]
    np.testing.assert_array_equal(one, named(state)["params/stacks/1/parts/0/mixer/q"][1])
    kept = {n.replace("rest/0", "rest/4"): n for n in named(state) if "rest/0" in n}
    assert kept
    for new, old in kept.items():
        np.testing.assert_array_equal(named(flat)[new], named(state)[old])
    back = layout.relaid(flat, apart.model, scanned.abstract, stacked.model)
    assert bits(back) == before
    _, on = stepped(apart, mesh, unrolled, flat, 1)
    _, straight = stepped(stacked, mesh, scanned, back, 1)
    assert on == pytest.approx(straight, rel=1e-5)


def test_nothing_moves_where_no_layer_is_stacked():
    """Fewer layers than the pattern has blocks are never stacked."""
    short, apart = experiment("scanned", depth=1).model, experiment("unrolled", depth=1).model
    tree = {"params": {"rest": {0: jax.numpy.ones(2)}}}
    assert layout.relaid(tree, short, tree, apart) is tree


def test_what_all_layers_share_is_refused_in_one_line():
    model = experiment("scanned").model
    tree = {"optimizer": {"stacks": {0: {"scale": jax.numpy.ones(3)}}}}
    apart = dataclasses.replace(model, layers="unrolled")
    with pytest.raises(ValueError, match="^model.layers='unrolled'.* optimizer/stacks/0/scale is"):
        layout.relaid(tree, model, tree, apart)
