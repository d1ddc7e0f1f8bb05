"""Generation: what is written is what the model holds likeliest, for every family of mixers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from inference import sampling
from inference.generate import generate
from models import catalogue, lm
from models.attention import bidirectional, softmax
from models.channel import glu
from models.recurrent import rg_lru
from tests import whole

KEY = jax.random.key(0)
PROMPT = jnp.asarray([[256, 5, 99, 5, 40], [256, 7, 7, 200, 1]], jnp.int32)
SMALL = lm.Config(vocabulary=300, width=64, depth=1, head="untied", dtype="float32")
CHEAP = dataclasses.replace(SMALL, width=16, pattern=(glu.Config(),), channel=None)


@functools.partial(jax.jit, static_argnums=0)
def likeliest(graph, weights, tokens):
    """The likeliest token after each of `tokens`, by one pass over all of them."""
    model = nnx.merge(graph, weights)
    return jnp.argmax(model.logits(model(tokens)[0]), axis=-1)


@pytest.mark.parametrize("family", sorted({name.partition(".")[0] for name in catalogue.cases()}))
def test_greedy_is_the_argmax_of_the_full_forward_pass(family):
    """One variant of each family of mixers: the first that may write."""
    found = (c for name, c in catalogue.cases().items() if name.startswith(f"{family}."))
    check_greedy(next(config for config in found if whole.causal(config)))


@pytest.mark.long
@pytest.mark.parametrize("name", list(catalogue.cases()))
def test_greedy_of_every_variant(name):
    """Every variant that may write; a model of any other refuses."""
    config = catalogue.cases()[name]
    if whole.causal(config):
        check_greedy(config)
        return
    with pytest.raises(ValueError, match="model.objective='masked'"):
        dataclasses.replace(SMALL, pattern=(config,)).build(nnx.Rngs(0))


def check_greedy(config):
    """The prompt at once and then token by token, against one pass over all that was written."""
    model = dataclasses.replace(SMALL, pattern=(config,)).build(nnx.Rngs(0))
    written = generate(model, PROMPT, 6, key=KEY, temperature=0.0)
    whole_row = jnp.concatenate([PROMPT, written], axis=1)
    best = likeliest(*nnx.split(model), whole_row)[:, PROMPT.shape[1] - 1 : -1]
    np.testing.assert_array_equal(written, best)
    assert len(np.unique(written)) > 1, "one token again and again shows little"


@pytest.mark.parametrize("layers", ["scanned", "unrolled"])
def test_greedy_with_all_options_of_the_model_at_once(layers):
    config = dataclasses.replace(
        SMALL,
        width=32,
        depth=3,
        pattern=(rg_lru.Config(), softmax.Config(heads=2, window=4)),
        head="tied",
        embed_scale=5.0,
        positions="sinusoidal",
        softcap=3.0,
        predict=2,
        layers=layers,
        remat="blocks",
    )
    model = config.build(nnx.Rngs(1))
    written = generate(model, PROMPT, 8, key=KEY, temperature=0.0)
    whole_row = jnp.concatenate([PROMPT, written], axis=1)
    best = likeliest(*nnx.split(model), whole_row)[:, PROMPT.shape[1] - 1 : -1]
    np.testing.assert_array_equal(written, best)


def test_ids_beyond_the_tokenizer_are_never_drawn():
    """However likely the model holds them: of 300 ids only the 257 of the tokenizer are written."""
    model = CHEAP.build(nnx.Rngs(0))
    loud = jnp.where(jnp.arange(300) < 257, 1.0, 100.0)
    model.head[...] = jnp.abs(model.head[...]) * loud
    model.norm.scale[...] = jnp.abs(model.norm.scale[...])
    for temperature in (0.0, 50.0):
        free = generate(model, PROMPT, 20, key=KEY, temperature=temperature)
        kept = generate(model, PROMPT, 20, key=KEY, temperature=temperature, vocabulary=257)
        assert int(free.max()) >= 257 > int(kept.max())


def test_rows_that_a_mesh_adds_are_never_drawn():
    """With all real logits far below 0, the zeros of padding would win."""
    model = CHEAP.build(nnx.Rngs(0), 64)
    assert model.head[...].shape == (16, 320) and not np.asarray(model.head[...])[:, 300:].any()
    assert model.logits(jnp.ones((2, 16))).shape == (2, 300)
    hidden = jnp.ones((1, 16))
    model.head[...] = jnp.where(jnp.arange(320) < 300, -1.0, 0.0) * jnp.ones((16, 1))
    assert float(model.logits(hidden).max()) == -16


def test_a_rule_draws_from_the_softmax():
    logits = jnp.log(jnp.asarray([[0.5, 0.25, 0.25]]))
    draws = jax.vmap(lambda key: sampling.rule(1.0)(logits, key)[0])(jax.random.split(KEY, 4000))
    share = np.bincount(np.asarray(draws), minlength=3) / 4000
    np.testing.assert_allclose(share, [0.5, 0.25, 0.25], atol=0.03)
    cold = jax.vmap(lambda key: sampling.rule(0.1)(logits, key)[0])(jax.random.split(KEY, 400))
    assert np.mean(np.asarray(cold) == 0) > 0.99  # 2^10 to 1
    assert int(sampling.rule(0.0)(logits, KEY)[0]) == 0


def test_rows_have_their_own_randomness_and_keys_repeat_it():
    model = CHEAP.build(nnx.Rngs(0))
    twice = jnp.concatenate([PROMPT[:1]] * 2)
    a = generate(model, twice, 12, key=KEY)
    assert not np.array_equal(a[0], a[1])
    np.testing.assert_array_equal(a, generate(model, twice, 12, key=KEY))
    assert not np.array_equal(a, generate(model, twice, 12, key=jax.random.key(1)))
    np.testing.assert_array_equal(generate(model, twice, 1, key=KEY).shape, (2, 1))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (dict(prompt=PROMPT[:, :0]), "the prompt is empty; give at least one token."),
        (dict(prompt=PROMPT + 100), "token 356 of the prompt is outside of 0..299."),
        (dict(prompt=-PROMPT), "token -256 of the prompt is outside of 0..299."),
        (dict(tokens=0), "tokens=0 must be at least 1."),
        (dict(temperature=-1.0), "temperature=-1.0 is negative. Use 0 (greedy) or more."),
        (dict(vocabulary=-1), "vocabulary=-1 is negative. Use 0 (all ids) or at least 1."),
        (dict(vocabulary=301), "vocabulary=301 is more than the model's 300. Use 300 or less."),
    ],
)
def test_refusals(change, line):
    given = dict(prompt=PROMPT, tokens=3) | change
    with pytest.raises(ValueError) as error:
        generate(
            CHEAP.build(nnx.Rngs(0)), given.pop("prompt"), given.pop("tokens"), key=KEY, **given
        )
    assert str(error.value) == line


def test_an_encoder_writes_nothing():
    encoder = dataclasses.replace(CHEAP, pattern=(bidirectional.Config(),), objective="masked")
    with pytest.raises(ValueError, match="the model is an encoder"):
        generate(encoder.build(nnx.Rngs(0)), PROMPT, 3, key=KEY)
