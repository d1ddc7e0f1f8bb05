"""The training step: loss, gradient, clipping, guarded update; one jitted function of a state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs.schema import Data, Experiment
from models import weights
from parallel import sharding
from training.optimizer import make_optimizer, schedule


class State(NamedTuple):
    """All that a run carries from step to step, and all that a checkpoint holds."""

    step: Any  # updates done (also the position in the data)
    params: Any  # float32 master weights, a nested dict
    optimizer: Any
    carry: Any  # model state of the rows (truncated BPTT), or ()
    key: Any  # random state


class Trainer(NamedTuple):
    """A model's graph, its shardings and the functions that work on its state."""

    graph: Any
    abstract: State  # shapes, dtypes and shardings
    stored: State  # the same as a checkpoint holds it: without the padding that the mesh needs
    init: Any  # () -> State
    step: Any  # (State, batch) -> (State, metrics); donates the state
    evaluate: Any  # (params, batch) -> (total nll in nats, total bytes)
    batch: dict[str, Any]  # shape, dtype and sharding of each array of a batch


def make_trainer(
    experiment: Experiment, mesh: jax.sharding.Mesh, byte_lengths: np.ndarray
) -> Trainer:
    """Functions for `experiment` on `mesh`; ValueError where model and mesh do not fit.

    `byte_lengths[id]` says how many bytes of text a token stands for.
    """
    key = jax.random.key(experiment.seed)

    ways = sharding.ways(mesh, "vocab")

    def build(multiple=ways):
        return experiment.model.build(nnx.Rngs(key), multiple)

    model = nnx.eval_shape(build)
    graph = nnx.split(model)[0]
    dims = weights.dims(model)
    optimizer = make_optimizer(experiment.optimizer, experiment.steps, dims)
    data = experiment.data

    def init(model) -> State:
        params = nnx.to_pure_dict(nnx.split(model)[1])
        carry = model.init_state(data.batch, data.length) if experiment.carry_state else ()
        step = jnp.zeros((), jnp.int32)
        return State(step, params, optimizer.init(params), carry, jax.random.fold_in(key, 1))

    abstract = _with_shardings(jax.eval_shape(lambda: init(build())), dims, mesh)
    stored = jax.tree.map(_unpadded, abstract, jax.eval_shape(lambda: init(build(multiple=1))))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    batch = _abstract_batch(data, mesh, model.objective == "masked")
    rows = {name: leaf.sharding for name, leaf in batch.items()}
    one = NamedSharding(mesh, P())
    update = _update_function(experiment, graph, optimizer, byte_lengths)
    evaluate = _evaluate_function(graph, byte_lengths)
    return Trainer(
        graph,
        abstract,
        stored,
        jax.jit(lambda: init(build()), out_shardings=shardings),
        jax.jit(
            update, in_shardings=(shardings, rows), out_shardings=(shardings, one), donate_argnums=0
        ),
        jax.jit(evaluate, in_shardings=(shardings.params, rows), out_shardings=one),
        batch,
    )


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
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = data.batch
    if rows % ways:
        near = max(ways, round(rows / ways) * ways)
        raise ValueError(f"data.batch={rows} does not split over {ways} devices. Use {near}.")
    where = NamedSharding(mesh, sharding.batch_spec(2))
    dtypes = dict(inputs=jnp.int32, targets=jnp.int32, segments=jnp.int32, weights=jnp.float32)
    dtypes |= dict(hidden=jnp.bool_) if masked else {}
    shape = (rows, data.length)
    return {n: jax.ShapeDtypeStruct(shape, dtype, sharding=where) for n, dtype in dtypes.items()}


def put_batch(abstract: dict[str, jax.ShapeDtypeStruct], rows: dict[str, np.ndarray]) -> dict:
    """This host's rows of a batch as global arrays, each device holding its own."""
    return {
        name: jax.make_array_from_process_local_data(leaf.sharding, rows[name], leaf.shape)
        for name, leaf in abstract.items()
    }


def _with_shardings(abstract: State, dims, mesh) -> State:
    """`abstract` with a sharding on every leaf: weights and moments by name, states by row."""

    def place(path, leaf, names):
        where = sharding.weight_sharding(mesh, ".".join(map(str, _keys(path))), leaf.shape, names)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    whole = lambda leaf: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, P())
    )
    params = jax.tree_util.tree_map_with_path(place, abstract.params, dims)
    by_path = {_keys(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def moment(path, leaf):  # a moment's path ends in the path of its weight
        keys = _keys(path)
        suffixes = (by_path.get(keys[i:]) for i in range(len(keys)))
        param = next((p for p in suffixes if p is not None), None)
        if param is None or param.shape != leaf.shape:
            return whole(leaf)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=param.sharding)

    moments = jax.tree_util.tree_map_with_path(moment, abstract.optimizer)
    return State(
        whole(abstract.step),
        params,
        moments,
        _place_carry(abstract.carry, mesh),
        whole(abstract.key),
    )


def _place_carry(carry, mesh):
    """Rows of carried states lie where the rows of the batch do; stacks have layers in front."""
    if not carry:
        return carry

    def place(axis):
        return lambda tree: jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            tree,
            sharding.shard_states(mesh, tree, axis),
        )

    return {name: place(int(name == "stacks"))(tree) for name, tree in carry.items()}


def _keys(path) -> tuple:
    return tuple(part.key for part in path if isinstance(part, jax.tree_util.DictKey))


def _update_function(experiment: Experiment, graph, optimizer, byte_lengths):
    config = experiment.optimizer
    rate = schedule(config, experiment.steps)

    def mean_loss(params, batch, weight, carry):
        model = nnx.merge(graph, params)
        tokens = (batch["inputs"], batch["targets"], batch["weights"] / weight)
        old = jax.lax.stop_gradient(carry) if carry else None
        rows = dict(segments=batch["segments"], hidden=batch.get("hidden"))
        total, said, carry = model.training_loss(*tokens, **rows, state=old)
        return total, (said, carry)

    def gradient(params, batch, carry):
        weight = jnp.maximum(batch["weights"].sum(), 1.0)
        grad = jax.grad(mean_loss, has_aux=True)
        parts = config.accumulation
        if parts == 1:
            grads, (said, carry) = grad(params, batch, weight, carry)
            return said, carry, grads

        # A microbatch adds its share of the mean; what layers say of it is a mean by itself.
        def add(total, part):
            grads, (said, _) = grad(params, part, weight / parts, ())
            return jax.tree.map(lambda t, new: t + new / parts, total, (said, grads)), None

        batches = jax.tree.map(lambda x: _split_rows(x, parts), batch)
        one = jax.tree.map(lambda x: x[0], batches)
        said = jax.eval_shape(mean_loss, params, one, weight, ())[1][0]
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (said, params))
        (said, grads), _ = jax.lax.scan(add, zero, batches)
        return said, carry, grads

    def update(state: State, batch) -> tuple[State, dict]:
        said, carry, grads = gradient(state.params, batch, state.carry)
        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(grads)
            if config.clip_norm:
                scale = jnp.minimum(1.0, config.clip_norm / jnp.maximum(norm, 1e-30))
                grads = jax.tree.map(lambda g: g * scale, grads)
            updates, moments = optimizer.update(grads, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
        finite = jnp.isfinite(said["loss"]) & jnp.isfinite(norm)
        params, moments, carry = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, moments, carry),
            (state.params, state.optimizer, state.carry),
        )
        metrics = {
            **said,
            "grad_norm": norm,
            "finite": finite,
            "learning_rate": rate(state.step),
            "tokens": batch["weights"].sum(),
            "bytes": _bytes(batch, byte_lengths),
        }
        return State(state.step + 1, params, moments, carry, state.key), metrics

    return update


def _split_rows(x, parts: int):
    """(B, ...) to (parts, B / parts, ...), row b to part b % parts: devices keep their own rows."""
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)


def _evaluate_function(graph, byte_lengths):
    def evaluate(params, batch):
        model = nnx.merge(graph, params)
        inputs, targets, weights = batch["inputs"], batch["targets"], batch["weights"]
        rows = dict(segments=batch["segments"], hidden=batch.get("hidden"))
        total, _ = model.loss(inputs, targets, weights, **rows)
        return total, _bytes(batch, byte_lengths)

    return evaluate


def _bytes(batch, byte_lengths):
    """Bytes of text that the weighted targets stand for."""
    return jnp.sum(batch["weights"] * jnp.asarray(byte_lengths, jnp.float32)[batch["targets"]])
