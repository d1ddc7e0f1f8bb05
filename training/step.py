"""The training step: loss, gradient, clipping, guarded update; one jitted function of a state."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs.schema import Data, Experiment, Optimizer
from data import generated
from models import lm, weights
from parallel import sharding
from training import metrics
from training.update import averaged, make_rule, schedule


class State(NamedTuple):
    """All that a run carries from step to step, and all that a checkpoint holds."""

    step: Any  # updates done (also the position in the data)
    params: Any  # float32 master weights, a nested dict
    optimizer: Any
    carry: Any  # model state of the rows (truncated BPTT), or ()
    key: Any  # random state
    average: Any = ()  # of the weights over steps (optimizer.ema), or ()


class Trainer(NamedTuple):
    """A model's graph, its shardings and the functions that work on its state."""

    graph: Any
    abstract: State  # shapes, dtypes and shardings
    stored: State  # the same as a checkpoint holds it: without the padding that the mesh needs
    init: Any  # () -> State
    step: Any  # (State, batch) -> (State, metrics); donates the state
    evaluate: Any  # (params, batch) -> what the metric adds up, and what it is divided by
    weights: Any  # State -> the params that are judged and sampled from
    judged: tuple[str, ...]  # the fields of a state that `weights` reads
    batch: dict[str, Any]  # shape, dtype and sharding of each array of a batch


def make_trainer(
    experiment: Experiment, mesh: jax.sharding.Mesh, byte_lengths: np.ndarray
) -> Trainer:
    """Functions for `experiment` on `mesh`; ValueError where model and mesh do not fit.

    `byte_lengths[id]` says how many bytes of text a token stands for.
    """
    key = jax.random.key(experiment.seed)
    ways = sharding.ways(mesh, "vocab")

    def build(key, multiple=ways):
        return experiment.model.build(nnx.Rngs(key), multiple)

    model = nnx.eval_shape(build, key)
    rule, platform = experiment.optimizer.rule, mesh.devices.flat[0].platform
    if getattr(rule, "one_cpu", False) and mesh.size > 1 and platform == "cpu":
        name = type(rule).__module__.rpartition(".")[2]
        raise ValueError(
            f"optimizer.rule={name} waits for ever on {mesh.size} CPU devices with this version of "
            "jaxlib. Use one device, Python 3.12 with its jaxlib, or another optimizer.rule."
        )
    if experiment.carry_state and not model.causal:
        raise ValueError(
            "carry_state=True: model.pattern or model.channel holds a bidirectional mixer, which "
            "reads whole rows and has no state. Use carry_state=False."
        )
    graph = nnx.split(model)[0]
    dims = weights.dims(model)
    data, config = experiment.data, experiment.optimizer

    def init(key, multiple=ways) -> State:
        model = build(key, multiple)
        params = nnx.to_pure_dict(nnx.split(model)[1])
        carry = model.init_state(data.batch, data.length) if experiment.carry_state else ()
        step = jnp.zeros((), jnp.int32)
        moments = make_rule(config, dims).init(params)
        average = jax.tree.map(jnp.copy, params) if config.ema else ()
        return State(step, params, moments, carry, jax.random.fold_in(key, 1), average)

    abstract = _placed(jax.eval_shape(init, key), dims, mesh)
    stored = abstract
    if ways > 1:
        bare = jax.eval_shape(functools.partial(init, multiple=1), key)
        stored = jax.tree.map(_unpadded, abstract, bare)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    batch = _abstract_batch(data, mesh, model.objective == "masked")
    rows = {name: leaf.sharding for name, leaf in batch.items()}
    one = NamedSharding(mesh, P())
    # The key is an argument: the programs of two seeds are one, which the compile cache keeps.
    fresh = jax.jit(init, out_shardings=shardings, compiler_options=_quick(mesh))
    update = _update_function(experiment, graph, dims, byte_lengths)
    evaluate = _evaluate_function(graph, byte_lengths, metrics.of(data))
    return Trainer(
        graph,
        abstract,
        stored,
        lambda: fresh(key),
        jax.jit(
            update, in_shardings=(shardings, rows), out_shardings=(shardings, one), donate_argnums=0
        ),
        jax.jit(evaluate, in_shardings=(shardings.params, rows), out_shardings=one),
        *_weights_function(config, shardings.params),
        batch,
    )


def _quick(mesh: jax.sharding.Mesh) -> dict[str, int] | None:
    """Compiler options for a program that runs once: LLVM's first level gives the same numbers."""
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return {"xla_backend_optimization_level": 1} if on_cpu else None


def fitted(tree: Any, abstract: Any) -> Any:
    """`tree` in the shapes of `abstract`, cut or filled up with zeros: padding lost, or gained."""

    def resized(leaf, shape):
        kept = leaf[tuple(map(slice, shape))]
        pad = [(0, new - old) for new, old in zip(shape, kept.shape, strict=True)]
        return jnp.pad(kept, pad)

    def one(leaf, like):
        if leaf.shape == like.shape:
            return leaf
        return jax.jit(resized, static_argnums=1, out_shardings=like.sharding)(leaf, like.shape)

    return jax.tree.map(one, tree, abstract)


def _unpadded(leaf, bare) -> jax.ShapeDtypeStruct:
    """`leaf` in the shape of `bare`; a dimension that is padded is whole on every device."""
    if leaf.shape == bare.shape:
        return leaf
    spec = (*leaf.sharding.spec, *(None,) * len(bare.shape))  # short where the rest is whole
    pairs = zip(spec, leaf.shape, bare.shape, strict=False)
    axes = (axis if a == b else None for axis, a, b in pairs)
    where = NamedSharding(leaf.sharding.mesh, P(*axes))
    return jax.ShapeDtypeStruct(bare.shape, bare.dtype, sharding=where)


def _abstract_batch(data: Data, mesh, masked: bool) -> dict[str, jax.ShapeDtypeStruct]:
    ways = sharding.row_ways(mesh)
    rows = data.batch
    if rows % ways:
        near = max(ways, round(rows / ways) * ways)
        raise ValueError(f"data.batch={rows} does not split over {ways} devices. Use {near}.")
    where = NamedSharding(mesh, sharding.batch_spec(2))
    dtypes = dict(inputs=jnp.int32, targets=jnp.int32, segments=jnp.int32, weights=jnp.float32)
    dtypes |= dict(hidden=jnp.bool_) if masked else {}
    shapes = dict.fromkeys(dtypes, (rows, data.length))
    if most := generated.answers(data):
        dtypes, shapes = dtypes | {"answers": jnp.int32}, shapes | {"answers": (rows, most)}
    return {n: jax.ShapeDtypeStruct(shapes[n], dtypes[n], sharding=where) for n in dtypes}


def put_batch(abstract: dict[str, jax.ShapeDtypeStruct], rows: dict[str, np.ndarray]) -> dict:
    """This host's rows of a batch as global arrays, each device holding its own.

    They may be of another length than those of `abstract`.
    """
    return {
        name: jax.make_array_from_process_local_data(
            leaf.sharding, rows[name], (leaf.shape[0], *rows[name].shape[1:])
        )
        for name, leaf in abstract.items()
    }


def _placed(abstract: State, dims, mesh) -> State:
    """`abstract` with a sharding on every leaf: by the weights' names, carried states by row."""
    carry = {
        name: sharding.place_rows(mesh, part, _row_axis(name))
        for name, part in (abstract.carry or {}).items()
    }
    rest = sharding.place(mesh, abstract._replace(carry=()), abstract.params, dims)
    return rest._replace(carry=carry or ())


def _row_axis(name: str) -> int:
    """Where the rows are in a part of the model's state: stacks have layers in front."""
    return int(name == "stacks")


def _update_function(experiment: Experiment, graph, dims, byte_lengths):
    config = experiment.optimizer
    rate = schedule(config, experiment.steps)
    gradient = _gradient_function(graph, config.accumulation)

    def update(state: State, batch) -> tuple[State, dict]:
        metrics, carry, grads = gradient(state.params, batch, state.carry)
        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(grads)
            if config.clip_norm:
                scale = jnp.minimum(1.0, config.clip_norm / jnp.maximum(norm, 1e-30))
                grads = jax.tree.map(lambda g: g * scale, grads)
            rule = make_rule(config, dims, rate(state.step))
            moves, moments = rule.update(grads, state.optimizer, state.params)
            params, average = optax.apply_updates(state.params, moves), state.average
            if config.ema:
                average = averaged(config.ema, average, params, state.step)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        params, moments, carry, average = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, moments, carry, average),
            (state.params, state.optimizer, state.carry, state.average),
        )
        metrics = {
            **metrics,
            "grad_norm": norm,
            "finite": finite,
            "learning_rate": rate(state.step),
            "tokens": batch["weights"].sum(),
            "bytes": _bytes(batch, byte_lengths),
        }
        return State(state.step + 1, params, moments, carry, state.key, average), metrics

    return update


def _gradient_function(graph, parts: int):
    """(params, batch, carry) -> (metrics, carry, gradient) of the mean loss, in `parts` in turn."""

    def mean_loss(params, batch, weight, carry):
        model = nnx.merge(graph, params)
        tokens = (batch["inputs"], batch["targets"], batch["weights"] / weight)
        old = jax.lax.stop_gradient(carry) if carry else None
        total, metrics, carry = model.training_loss(*tokens, **_rows(batch), state=old)
        return total, (metrics, carry)

    def gradient(params, batch, carry):
        weight = jnp.maximum(batch["weights"].sum(), 1.0)
        grad = jax.grad(mean_loss, has_aux=True)
        if parts == 1:
            grads, (metrics, carry) = grad(params, batch, weight, carry)
            return metrics, carry, grads

        # A microbatch adds its share of the mean; what layers say of it is a mean by itself.
        def add(total, part):
            grads, (metrics, carry) = grad(params, part[0], weight / parts, part[1])
            return jax.tree.map(lambda t, new: t + new / parts, total, (metrics, grads)), carry

        batches = jax.tree.map(lambda x: _split_rows(x, parts), batch)
        carries = _over_rows(lambda x, axis: _split_rows(x, parts, axis), carry)
        one = jax.tree.map(lambda x: x[0], (batches, carries))
        metrics = jax.eval_shape(mean_loss, params, one[0], weight, one[1])[1][0]
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (metrics, params))
        (metrics, grads), carries = jax.lax.scan(add, zero, (batches, carries))
        return metrics, _over_rows(_join_rows, carries), grads

    return gradient


def _over_rows(function, carry):
    """`function` of every leaf of the model's state and the axis of its rows."""
    return {
        name: jax.tree.map(functools.partial(function, axis=_row_axis(name)), part)
        for name, part in (carry or {}).items()
    } or ()


def _split_rows(x, parts: int, axis: int = 0):
    """(..., B, ...) to (parts, ..., B / parts, ...), row b to part b % parts.

    Devices keep their own rows. What has no rows goes to every part.
    """
    if x.ndim <= axis:
        return jnp.broadcast_to(x, (parts, *x.shape))
    rows = x.shape[axis] // parts
    apart = x.reshape(*x.shape[:axis], rows, parts, *x.shape[axis + 1 :])
    return jnp.moveaxis(apart, axis + 1, 0)


def _join_rows(x, axis: int = 0):
    """The inverse of `_split_rows`: (parts, ..., B / parts, ...) to (..., B, ...)."""
    if x.ndim - 1 <= axis:
        return x[-1]
    back = jnp.moveaxis(x, 0, axis + 1)
    return back.reshape(*back.shape[:axis], -1, *back.shape[axis + 2 :])


def _weights_function(config: Optimizer, where):
    """State -> its averaged weights, laid out as `where` says, or its weights; what that reads."""
    own = getattr(config.rule, "evaluated", None)
    if config.ema:
        return lambda state: state.average, ("average",)
    if own is None:
        return lambda state: state.params, ("params",)
    evaluated = jax.jit(own, out_shardings=where)
    return lambda state: evaluated(state.optimizer, state.params), ("params", "optimizer")


def _evaluate_function(graph, byte_lengths, metric: metrics.Metric):
    count = metric.count

    def bits(params, batch):
        model = nnx.merge(graph, params)
        inputs, targets, weights = batch["inputs"], batch["targets"], batch["weights"]
        total, _ = model.loss(inputs, targets, weights, **_rows(batch))
        return total, _bytes(batch, byte_lengths)

    if count is None:
        return bits

    def answers(params, batch):
        model = nnx.merge(graph, params)

        def right(at):  # one place of all rows after another: the logits of all are many
            hidden, targets = at
            return jnp.argmax(model.logits(hidden), axis=-1) == targets

        x = model.read(batch["inputs"], segments=batch["segments"], hidden=batch.get("hidden"))
        x, targets, weights = lm.asked(x, batch["targets"], batch["weights"], batch.get("answers"))
        return count(jax.lax.map(right, (x.swapaxes(0, 1), targets.T)).T, weights > 0)

    return answers


def _rows(batch) -> dict[str, Any]:
    """What a model reads of a batch beside its tokens, targets and weights."""
    return {name: batch.get(name) for name in ("segments", "hidden", "answers")}


def _bytes(batch, byte_lengths):
    """Bytes of text that the weighted targets stand for."""
    return jnp.sum(batch["weights"] * jnp.asarray(byte_lengths, jnp.float32)[batch["targets"]])
