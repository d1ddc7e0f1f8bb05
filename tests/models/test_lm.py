"""What the language model adds to its blocks: auxiliary losses, encoders, tokens further ahead."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from inference.generate import generate
from models import auxiliary, lm, stacks
from models.attention import bidirectional, softmax
from models.block import residual
from models.channel import dropless, glu
from models.linear_attention import efficient_attention
from models.low_rank import synthesizer
from models.recurrent import rg_lru
from tests.tolerance import assert_close

SMALL = lm.Config(width=32, depth=2, pattern=(rg_lru.Config(),), dtype="float32")
IDS = jnp.asarray([[1] * 10 + [2] * 6, [1] * 16])


def batch(seed=0):
    tokens = np.random.default_rng(seed).integers(0, 256, (2, 17))
    weights = jnp.full((2, 16), 1 / 32)
    return jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:]), weights


# One program a shape, where calls that are not compiled as one are hundreds.
@functools.partial(jax.jit, static_argnums=0)
def _call(graph, params, inputs, segments=None, state=None):
    return nnx.merge(graph, params)(inputs, segments=segments, state=state)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _loss(name, graph, params, data, segments):
    return getattr(nnx.merge(graph, params), name)(*data, segments=segments)


def compiled(model):
    """The model's call, which takes (inputs, segments, state)."""
    return functools.partial(_call, *nnx.split(model))


def training_loss(model, segments=IDS):
    return _loss("training_loss", *nnx.split(model), batch(), segments)


def nll(model):
    return _loss("loss", *nnx.split(model), batch(), IDS)[0]


def test_losses_of_layers_join_the_total_and_the_metrics():
    model = dataclasses.replace(SMALL, channel=dropless.Config(experts=4)).build(nnx.Rngs(0))
    total, metrics, _ = training_loss(model)
    assert_close(metrics["loss"], nll(model), np.float32, "nll")
    assert_close(total, metrics["loss"] + metrics["balance"] + metrics["z"], np.float32, "total")
    assert 1 <= float(metrics["load_max"]) <= 4 and float(metrics["dropped"]) == 0


@pytest.mark.parametrize("layers", ["scanned", "unrolled"])
def test_losses_are_summed_and_metrics_averaged_over_layers(layers):
    config = dataclasses.replace(SMALL, depth=3, channel=dropless.Config(experts=4), layers=layers)
    model = config.build(nnx.Rngs(0))
    _, metrics, _ = training_loss(model)

    @jax.jit
    def layer_by_layer(params):
        with auxiliary.collecting() as found:
            flat = stacks.unrolled(nnx.merge(graph, params))
            x = flat.embedded(batch()[0])
            for block in flat.rest:
                x, _ = block(x, segments=IDS)
        return found

    graph, params = nnx.split(model)
    found = layer_by_layer(params)
    assert_close(metrics["balance"], sum(found["losses"]["balance"]), np.float32, "loss")
    assert_close(metrics["entropy"], np.mean(found["metrics"]["entropy"]), np.float32, "metric")


def test_remat_changes_no_metric():
    config = dataclasses.replace(SMALL, channel=dropless.Config(experts=4))
    plain, again = (
        training_loss(dataclasses.replace(config, remat=remat).build(nnx.Rngs(0)), None)
        for remat in ("none", "blocks")
    )
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        assert_close(b, a, np.float32, "remat")


def test_an_untied_head_is_a_weight_that_learns_and_decodes():
    model = dataclasses.replace(SMALL, depth=1, head="untied").build(nnx.Rngs(0))
    assert model.head[...].shape == (32, 257)
    graph, params = nnx.split(model)
    loss = lambda params: nnx.merge(graph, params).loss(*batch(), segments=IDS)[0]
    slope = jax.jit(jax.value_and_grad(loss))
    before, slopes = slope(params)
    assert all(np.asarray(slopes[name][...]).any() for name in ("embed", "head"))
    params = jax.tree.map(lambda weight, slope: weight - 0.1 * slope, params, slopes)
    assert float(slope(params)[0]) < float(before)
    model, tokens = nnx.merge(graph, params), jnp.asarray([[1, 2, 3]])
    written = generate(model, tokens, 2, key=jax.random.key(0), temperature=0.0)
    x, _ = compiled(model)(jnp.concatenate([tokens, written[:, :1]], axis=1))
    np.testing.assert_array_equal(written, jnp.argmax(x[:, 2:] @ model.head[...], axis=-1))


@pytest.mark.parametrize(
    "change",
    [
        dict(depth=1, layers="unrolled"),
        dict(depth=1, pattern=(rg_lru.Config(), glu.Config())),  # fewer layers than the pattern
        dict(depth=2, pattern=(glu.Config(),)),  # stacked layers that keep nothing
        dict(depth=2),
    ],
    ids=str,
)
def test_any_arrangement_of_layers_takes_documents_and_a_state(change):
    """Layers one by one, stacked, or stacked and taken apart: a state goes on or starts anew."""
    built = dataclasses.replace(SMALL, **change).build(nnx.Rngs(0))
    inputs, _, _ = batch()
    alone = jnp.stack([inputs[0, :8], inputs[1, 4:12]])
    for model in (built, stacks.unrolled(built)):
        call, state = compiled(model), model.init_state(2, 16)
        _, state = call(inputs[:, :4], jnp.full((2, 4), 1), state)
        x, _ = call(inputs[:, 4:8], jnp.asarray([[1] * 4, [2] * 4]), state)
        want, _ = call(alone)
        assert_close(x[0], want[0, 4:], np.float32, "goes on")
        assert_close(x[1], want[1, :4], np.float32, "starts anew")


def test_document_numbers_may_come_back_in_a_row():
    """1 x 5, 2 x 4, 1 x 5 is 1, 2, 3: in the row, after a carried state, and for what follows."""
    config = dataclasses.replace(SMALL, pattern=(softmax.Config(), synthesizer.Config(causal=True)))
    model, (inputs, _, _) = config.build(nnx.Rngs(0)), batch()
    call = compiled(model)
    _, before = call(inputs[:, :4], jnp.full((2, 4), 1), model.init_state(2, 19))
    number = lambda *of: jnp.asarray([[of[0]] * 5 + [of[1]] * 4 + [of[2]] * 5] * 2)
    for state in (model.init_state(2, 19), before):
        want, kept = call(inputs[:, :14], number(1, 2, 3), state)
        got, again = call(inputs[:, :14], number(1, 2, 1), state)
        np.testing.assert_array_equal(got, want)
        want, got = (call(inputs[:, 14:15], None, s)[0] for s in (kept, again))
        np.testing.assert_array_equal(got, want)


def test_a_bidirectional_mixer_needs_the_masked_objective():
    config = dataclasses.replace(SMALL, pattern=(bidirectional.Config(),))
    with pytest.raises(ValueError, match="language model would see what it predicts"):
        config.build(nnx.Rngs(0))
    dataclasses.replace(config, objective="masked").build(nnx.Rngs(0))


def test_an_encoder_fills_in_what_was_hidden():
    """Its loss depends on hidden tokens as targets only: as inputs they are one learned vector."""
    config = dataclasses.replace(SMALL, pattern=(bidirectional.Config(),), objective="masked")
    model = config.build(nnx.Rngs(0))
    inputs, targets, weights = batch()
    hidden = jnp.asarray(np.random.default_rng(1).random(inputs.shape) < lm.HIDDEN)
    assert 0 < int(hidden.sum()) < inputs.size / 2
    x = model.embedded(inputs, hidden)
    other = model.embedded((inputs + 7) % 256, hidden)
    assert_close(x * hidden[..., None], other * hidden[..., None], np.float32, "hidden inputs")
    total, nll = model.loss(inputs, targets, weights, hidden=hidden)
    assert_close(total, jnp.sum(nll * weights * hidden) / lm.HIDDEN, np.float32, "total")


def test_what_is_hidden_is_given_to_encoders_alone():
    encoder = dataclasses.replace(SMALL, pattern=(bidirectional.Config(),), objective="masked")
    with pytest.raises(ValueError, match="model.objective='masked' without `hidden`"):
        encoder.build(nnx.Rngs(0)).loss(*batch())
    with pytest.raises(ValueError, match="model.objective='next' with `hidden`"):
        SMALL.build(nnx.Rngs(0)).loss(*batch(), hidden=jnp.ones((2, 16), bool))


def test_an_encoder_has_no_state():
    config = dataclasses.replace(SMALL, pattern=(bidirectional.Config(),), objective="masked")
    with pytest.raises(ValueError, match="bidirectional"):
        config.build(nnx.Rngs(0)).init_state(1, 8)


def test_positions_count_in_each_document_and_go_on_from_a_state():
    model = dataclasses.replace(SMALL, positions="sinusoidal").build(nnx.Rngs(0))
    call, (inputs, _, _) = compiled(model), batch()
    packed, _ = call(inputs, IDS)
    alone, _ = call(jnp.stack([inputs[0], jnp.roll(inputs[0], -10), inputs[1]]))
    assert_close(packed[0, :10], alone[0, :10], np.float32, "alone")
    assert_close(packed[0, 10:], alone[1, :6], np.float32, "alone")
    state, parts = model.init_state(2, 16), []
    for start in range(0, 16, 4):  # the first row's documents meet within the third
        x, state = call(inputs[:, start : start + 4], IDS[:, start : start + 4], state)
        parts.append(x)
    assert_close(jnp.concatenate(parts, axis=1), packed, np.float32, "in parts")
    assert state["position"].tolist() == [6, 16]
    x, _ = call(inputs[:, :4], jnp.full((2, 4), 9), state)  # another document
    assert_close(x, alone[::2, :4], np.float32, "fresh")


def test_an_encoder_that_is_blind_to_order_learns_it_from_positions():
    """Two hidden tokens of one text differ by nothing but their places."""
    blind = efficient_attention.Config(causal=False)
    config = dataclasses.replace(SMALL, pattern=(blind,), objective="masked")
    hidden = jnp.asarray([[True, False, True, False]])
    apart = {}
    for positions in ("none", "sinusoidal"):
        model = dataclasses.replace(config, positions=positions).build(nnx.Rngs(0))
        read = jax.jit(lambda tokens: model._blocks(tokens, None, None, hidden))  # noqa: B023
        x, _, _ = read(jnp.asarray([[1, 2, 3, 4]]))
        apart[positions] = float(jnp.abs(x[0, 0] - x[0, 2]).max())
    assert apart["none"] < 1e-6 and apart["sinusoidal"] > 1e-3


def test_tokens_further_ahead_count_within_their_document():
    """Of 16 tokens, 15 have a token after the next; of documents of 10 and 6, 9 + 5."""
    config = dataclasses.replace(SMALL, predict=2, predict_weight=1.0)
    model = config.build(nnx.Rngs(0))
    inputs, targets, weights = batch()
    x = jnp.zeros((2, 16, 32))
    model.embed[...] = jnp.zeros_like(model.embed[...])  # every nll is then log(vocabulary)
    found = model.further.loss(model, x, targets, weights, IDS)
    assert_close(found, (9 + 5 + 15) / 32 * np.log(257), np.float32, "further")


def test_further_modules_leave_the_model_itself_alone():
    config = dataclasses.replace(SMALL, predict=3)
    model = config.build(nnx.Rngs(0))
    total, metrics, _ = training_loss(model)
    assert_close(metrics["loss"], nll(model), np.float32, "nll")
    assert_close(total, metrics["loss"] + metrics["further"], np.float32, "total")
    state = model.init_state(2, 16)
    assert jax.eval_shape(compiled(model), batch()[0], None, state)[0].shape == (2, 16, 32)


def test_norms_stand_where_the_config_says():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 4, 32)), jnp.float32)
    post = residual.Config(glu.Config(), norm="post").build(32, nnx.Rngs(0))
    rms = jnp.sqrt(jnp.mean(jnp.square(post(x)[0]), -1))
    assert_close(rms, jnp.ones_like(rms), np.float32, "after a post-norm", least=1.0)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (dict(predict=0), "model.predict=0 must be at least 1 token ahead."),
        (dict(predict=2, objective="masked"), "model.predict=2 is for objective='next'"),
        (dict(width=0), "model.width=0 must be at least 1."),
        (dict(depth=0), "model.depth=0 must be at least 1."),
        (dict(vocabulary=0), "model.vocabulary=0 is the tokenizer's, which a model alone does not"),
        (dict(vocabulary=-1), "model.vocabulary=-1 must be at least 1."),
        (dict(pattern=()), "model.pattern is empty"),
    ],
)
def test_refusals(change, line):
    with pytest.raises(ValueError) as error:
        dataclasses.replace(SMALL, **change).build(nnx.Rngs(0))
    assert line in str(error.value)
