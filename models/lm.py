"""The language model: embedding, a pattern of blocks repeated to depth, a norm, a head, the loss.

Blocks of equal position in the pattern are stacked and scanned by period, so compile time follows
the pattern and not the depth; blocks left over when the pattern does not divide the depth follow
one by one.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from kernels.cross_entropy import cross_entropy
from models import auxiliary, layers, mixer, multi_token, positions, stacks, weights
from models.attention import softmax
from models.block import residual
from models.channel import glu
from parallel.sharding import constrain, gathered


@dataclasses.dataclass
class Config:
    """A language model; elements of `pattern` are Configs of mixers or of whole blocks."""

    vocabulary: int = 257  # ids; 0: as many as the tokenizer has (training finds out)
    width: int = 256  # of the residual stream
    depth: int = 4  # layers in all
    # Configs of the layers of one period, repeated to the depth; by flag as models/pattern.py says.
    pattern: tuple = dataclasses.field(
        default_factory=lambda: (softmax.Config(),), metadata={"parser": "models.pattern"}
    )
    channel: Any = dataclasses.field(default_factory=glu.Config)  # follows each bare mixer
    head: Literal["tied", "untied"] = "tied"
    embed_scale: float = 1.0  # multiplies the embedding (Gemma: sqrt(width))
    positions: Literal["none", "sinusoidal"] = "none"  # added to the embedding (arXiv 1706.03762)
    softcap: float = 0.0  # logits become softcap * tanh(logits / softcap); 0: off
    objective: Literal["next", "masked"] = "next"  # masked: an encoder that fills in 15 % (BERT)
    predict: int = 1  # tokens ahead that training predicts; above 1 by extra modules (MTP)
    predict_weight: float = 0.3  # of the mean loss of the tokens after the next one
    norm_eps: float = 1e-6  # of the last norm and of those before each layer
    layers: Literal["scanned", "unrolled"] = "scanned"  # unrolled: faster steps, slower compiles
    remat: Literal["none", "blocks", "dots"] = "none"  # what the backward pass computes again
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of activations; weights stay float32

    def build(self, rngs: nnx.Rngs, multiple: int = 1) -> "LM":
        """The module; ValueError where sizes do not fit.

        Tables of the vocabulary get rows of zeros up to a multiple of `multiple`, for a mesh that
        splits them. No row beyond the vocabulary has a probability, a gradient or a use.
        """
        return LM(self, rngs, multiple)

    def blocks(self) -> tuple:
        """The block of each layer of one period.

        A bare mixer stands in a pre-norm block, before `channel` unless it mixes channels itself.
        """

        def wrapped(part):
            if mixer.is_block(part):
                return part
            channel = None if is_channel(part) else self.channel
            return residual.Config(part, channel, self.norm_eps)

        return tuple(wrapped(part) for part in self.pattern)


def is_channel(config: Any) -> bool:
    """Whether a Config is of a channel mixer, which mixes no tokens."""
    return type(config).__module__.startswith("models.channel.")


REMAT = {
    "none": None,
    "blocks": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
}


HIDDEN = 0.15  # share of tokens that an encoder fills in (arXiv 1810.04805, section 3.1)


def _padded(init: weights.Initializer, shape: tuple[int, int]) -> weights.Initializer:
    """`init` of `shape`, and zeros around it up to the shape that is asked for."""

    def padded(key, whole):
        return jnp.pad(init(key, shape), [(0, b - a) for a, b in zip(shape, whole, strict=True)])

    return padded


def asked(
    x: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    answers: Int[Array, "B A"] | None,
) -> tuple[Float[Array, "B N D"], Int[Array, "B N"], Float[Array, "B N"]]:
    """All three at the places `answers` of each row, with weight 0 where that is -1; None: all."""
    if answers is None:
        return x, targets, weights
    at = jnp.maximum(answers, 0)
    here = lambda values: jnp.take_along_axis(values, at, axis=1)
    x = jnp.take_along_axis(x, at[..., None], axis=1)
    return x, here(targets), here(weights) * (answers >= 0)


class LM(nnx.Module):
    """Maps tokens (B, T) to hidden states (B, T, D); `loss` and `logits` apply the head."""

    def __init__(self, config: Config, rngs: nnx.Rngs, multiple: int = 1):
        if config.vocabulary == 0:
            raise ValueError(
                "model.vocabulary=0 is the tokenizer's, which a model alone does not know. Give "
                "the number of ids, 257 for bytes."
            )
        for name in ("vocabulary", "width", "depth"):
            if getattr(config, name) < 1:
                raise ValueError(f"model.{name}={getattr(config, name)} must be at least 1.")
        if not config.pattern:
            raise ValueError("model.pattern is empty; it needs at least one mixer.")
        parts = config.blocks()
        periods = config.depth // len(parts) if config.layers == "scanned" else 0
        rest = config.depth - periods * len(parts)
        table_std = 0.02 if config.head == "tied" else 1.0
        self.vocabulary = config.vocabulary
        rows = -(-config.vocabulary // multiple) * multiple
        init = _padded(weights.normal(table_std), (config.vocabulary, config.width))
        self.embed = weights.weight(rngs, init, (rows, config.width), ("vocab", "embed"))
        self.positions = positions.build(config.positions, config.width, rngs, table_std)
        self.stacks = nnx.List([])
        if periods:
            stack = lambda part: stacks.stack(part, config.width, periods, rngs)
            self.stacks = nnx.List([stack(part) for part in parts])
        self.rest = nnx.List([parts[i % len(parts)].build(config.width, rngs) for i in range(rest)])
        self.norm = layers.RMSNorm(config.width, rngs, config.norm_eps)
        init = _padded(weights.fan_in(config.width), (config.width, config.vocabulary))
        head = init, (config.width, rows), ("embed", "vocab")
        self.head: Any = weights.weight(rngs, *head) if config.head == "untied" else None
        self.dtype, self.remat = config.dtype, config.remat
        self.embed_scale, self.softcap = config.embed_scale, config.softcap
        self.objective = config.objective
        masked = config.objective == "masked"
        mask = weights.normal(0.02), (config.width,), ("embed",)
        self.mask: Any = weights.weight(rngs, *mask) if masked else None
        if not (masked or self.causal):
            raise ValueError(
                "model.pattern or model.channel holds a bidirectional mixer, which reads later "
                "tokens: a language model would see what it predicts. Use "
                "model.objective='masked', an encoder."
            )
        self.further = multi_token.build(config, parts[-1], rngs)

    @property
    def causal(self) -> bool:
        """Whether no output depends on later tokens."""
        return all(part.causal for part in (*self.stacks, *self.rest))

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        segments: Int[Array, "B T"] | None = None,
        state: mixer.State | None = None,
    ) -> tuple[Float[Array, "B T D"], mixer.State]:
        """Hidden states after the final norm, and the state after the last token.

        Rows whose first document is not the one that `state` left off in start from nothing.
        """
        given = self.init_state(*tokens.shape) if state is None else state
        before = self._enter(given, segments)
        number = self._number(before["segment"], segments)
        x, after, _ = self._blocks(tokens, segments, before)
        return self.norm(x), after | {"segment": number}

    def read(
        self,
        tokens: Int[Array, "B T"],
        *,
        segments: Int[Array, "B T"] | None = None,
        hidden: Bool[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Hidden states after the final norm; keeps no state, so an encoder reads as well.

        Where `hidden` an encoder ("masked") sees no token, but that there is one to fill in.
        """
        x, _, _ = self._blocks(tokens, segments, None, hidden)
        return self.norm(x)

    def loss(
        self,
        inputs: Int[Array, "B T"],
        targets: Int[Array, "B T"],
        weights: Float[Array, "B T"],
        *,
        segments: Int[Array, "B T"] | None = None,
        hidden: Bool[Array, "B T"] | None = None,
        answers: Int[Array, "B A"] | None = None,
    ) -> tuple[Float[Array, ""], Float[Array, "B N"]]:
        """Sum over tokens of weights * nll in nats, and the nll of each token; keeps no state.

        Where `answers` names the only places with a weight (and -1 for none), logits are made there
        alone, and the nll is that of each place.

        An encoder ("masked") ignores `targets`: it fills in `inputs` where they are `hidden`, a
        share HIDDEN of them (see data/masking.py).
        """
        task = self._task(inputs, targets, weights, hidden)
        x = self.read(inputs, segments=segments, hidden=hidden)
        return self.nll(*asked(x, *task, answers))

    def training_loss(
        self,
        inputs: Int[Array, "B T"],
        targets: Int[Array, "B T"],
        weights: Float[Array, "B T"],
        *,
        segments: Int[Array, "B T"] | None = None,
        hidden: Bool[Array, "B T"] | None = None,
        answers: Int[Array, "B A"] | None = None,
        state: mixer.State | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]], mixer.State]:
        """What training minimises, metrics by name, and the state if one came in.

        The total is `loss` and, on top, the losses that layers add (of routers) and those of tokens
        further ahead; the metrics hold "loss" itself and every addend.
        """
        task = self._task(inputs, targets, weights, hidden)
        old = None if state is None else self._enter(state, segments)
        x, new, found = self._blocks(inputs, segments, old, hidden)
        after = new | {"segment": self._number(old["segment"], segments)} if old else ()
        nll, _ = self.nll(*asked(self.norm(x), *task, answers))
        losses, metrics = found["losses"], found["metrics"]
        if self.further is not None:
            losses = losses | {"further": self.further.loss(self, x, targets, weights, segments)}
        total = nll + sum(losses.values())
        return total, {"loss": nll, **losses, **metrics}, after

    @jax.named_scope("head")
    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Float32 logits of hidden states that the final norm has passed."""
        logits = jnp.matmul(
            hidden,
            self._head().astype(hidden.dtype),
            preferred_element_type=mixer.wide(hidden.dtype),
        )
        return self.softcap * jnp.tanh(logits / self.softcap) if self.softcap else logits

    def init_state(self, batch: int, capacity: int) -> mixer.State:
        """The state before the first token, for rows of up to `capacity` tokens in all."""
        dtype = jnp.dtype(self.dtype)

        def stacked(stack):
            graph, params = nnx.split(stack)
            periods = jax.tree.leaves(params)[0].shape[0]
            one = nnx.merge(graph, jax.tree.map(lambda p: p[0], params))
            state = one.init_state(batch, capacity, dtype)
            return jax.tree.map(lambda s: jnp.broadcast_to(s, (periods, *s.shape)), state)

        none = jnp.zeros(batch, jnp.int32)
        position = {} if self.positions is None else {"position": none}
        return position | {
            "segment": none,
            "stacks": tuple(stacked(stack) for stack in self.stacks),
            "rest": tuple(part.init_state(batch, capacity, dtype) for part in self.rest),
        }

    def _enter(self, state, segments):
        """The state that the rows go on from."""
        return state if segments is None else stacks.resumed(state, segments)

    def _number(self, before, segments):
        """The number of the document that each row ends in."""
        if segments is None:
            return jnp.maximum(before, 1)
        _, last = mixer.first_and_last(segments)
        return jnp.where(last > 0, last, before)

    def _task(self, inputs, targets, weights, hidden):
        """What to predict at each token, and its weight: hidden tokens count for all."""
        if (hidden is None) != (self.objective == "next"):
            raise ValueError(
                f"model.objective={self.objective!r} with{'out' * (hidden is None)} `hidden`: an "
                "encoder ('masked') needs what to fill in, a language model has none."
            )
        if hidden is None:
            return targets, weights
        return inputs, weights * hidden / HIDDEN

    @jax.named_scope("head")
    def nll(self, x, targets, weights):
        """(sum of weights * nll, nll of each token) of hidden states after the norm, in nats."""
        head = self._head().astype(x.dtype)
        return cross_entropy(x, head, targets, weights, softcap=self.softcap)

    def _head(self):
        head = self.embed[...].T if self.head is None else self.head[...]
        return head[:, : self.vocabulary]  # equal shards: the cut moves nothing between devices

    @jax.named_scope("embed")
    def embedded(self, tokens, hidden=None):
        """Embeddings (B, T, D) in the compute dtype; a learned vector where `hidden`."""
        dtype = jnp.dtype(self.dtype)
        x = gathered(self.embed[...].astype(dtype), "vocab", "embed")[tokens]
        if hidden is not None:
            x = jnp.where(hidden[..., None], self.mask[...].astype(dtype), x)
        x = x if self.embed_scale == 1.0 else x * self.embed_scale
        return constrain(x, "batch", "time", "embed")

    def _blocks(self, tokens, segments, state, hidden=None):
        """Embed the tokens, run all blocks: (stream, states, auxiliary); state None keeps none."""
        x, position = self.embedded(tokens, hidden), {}
        if self.positions is not None:
            waves, after = self.positions(tokens, segments, state and state["position"])
            x, position = x + (self.embed_scale * waves).astype(x.dtype), {"position": after}
        keep = state is not None

        def apply(graph, params, x, old):
            def run(params, x, old):
                with auxiliary.collecting() as found:
                    y, new = nnx.merge(graph, params)(x, segments=segments, state=old)
                return y, new if keep else None, found

            if self.remat != "none":
                run = jax.checkpoint(run, policy=REMAT[self.remat])
            return run(params, x, old)

        splits = [nnx.split(stack) for stack in self.stacks]

        def period(x, layer):
            new, found = [], []
            for i, ((graph, _), (params, old)) in enumerate(zip(splits, layer, strict=True)):
                with jax.named_scope(f"stacks.{i}"):
                    x, after, more = apply(graph, params, x, old)
                new.append(after)
                found.append(more)
            return x, (tuple(new), found)

        states, found = (), []
        if splits:
            old = state["stacks"] if keep else (None,) * len(splits)
            xs = tuple((params, s) for (_, params), s in zip(splits, old, strict=True))
            x, (states, found) = jax.lax.scan(period, x, xs)
        rest = []
        for i, part in enumerate(self.rest):
            with jax.named_scope(f"rest.{i}"):
                x, after, more = apply(*nnx.split(part), x, state["rest"][i] if keep else None)
            rest.append(after)
            found.append(more)
        return x, position | {"stacks": states, "rest": tuple(rest)}, auxiliary.over_layers(found)
