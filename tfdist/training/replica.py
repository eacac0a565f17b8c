"""One replica's step: Keras runs as if it were alone, and only sums cross to the other replicas.

Inside `SoleReplica` TensorFlow reports a single replica and each Keras variable *is* this replica's own
copy, so `train_step` (Keras's or the model's own), clipping, accumulation, averaging and loss scaling do
what they do on one device. The one place where replicas meet is `exchange`: gradients are weighted by
the replica's share of the global batch, summed over replicas, and handed to the optimizer. All replicas
then apply the same update to equal copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfdist import keras_internals
from tfdist.errors import ConfigError
from tfdist.training.metrics import metric_results, zero_state

# A prime far from the steps' counters: replica r draws from seed + r * stride.
_SEED_STRIDE = 1_000_003
_DEFAULT_STRATEGY = tf.distribute.get_strategy()


class SoleReplica(tf.distribute.ReplicaContext):
    """The replica context that Keras sees during a step: a strategy of one replica, with a real `all_reduce`."""

    def __init__(
        self,
        *,
        outer: tf.distribute.ReplicaContext,
        local_index: int,
        local_size: Any,
        global_size: Any,
    ) -> None:
        super().__init__(_DEFAULT_STRATEGY, local_index)
        self.outer = outer
        self.local_size = local_size
        self.global_size = global_size
        self.share = tf.cast(local_size, tf.float32) / tf.cast(global_size, tf.float32)
        self.binding: keras_internals.ReplicaBinding | None = None
        self.num_applied = 0

    def __enter__(self) -> SoleReplica:
        super().__enter__()
        self._install()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._remove()
        super().__exit__(*exc_info)

    def _install(self) -> None:
        if self.binding is not None:
            self.binding.install()

    def _remove(self) -> None:
        if self.binding is not None:
            self.binding.remove()

    def exchange(self, values: Sequence[Any]) -> list[Any]:
        """Sums each tensor over all replicas; not differentiable."""
        # MirroredStrategy lets the other replicas' threads run inside this call: they bind their own.
        self._remove()
        try:
            with self.outer:
                return list(self.outer.all_reduce(tf.distribute.ReduceOp.SUM, list(values)))
        finally:
            self._install()

    def all_reduce(self, reduce_op: Any, value: Any, options: Any = None) -> Any:
        """Sums (or averages) over all replicas, differentiably: what `BatchNormalization(synchronized=True)` calls.

        The backward pass weights each replica's upstream gradient by its share of the batch, since the
        shares are applied to the gradients only after it.
        """
        del options
        mean = "MEAN" in str(reduce_op).upper()
        replicas = self.outer.num_replicas_in_sync

        @tf.custom_gradient
        def reduce(*tensors: Any) -> Any:
            # A replica without examples holds one of zeros (see _at_least_one): it must not be counted.
            present = [t * tf.cast(self.share > 0, t.dtype) for t in tensors]
            sums = self.exchange(present)
            outputs = [s / replicas for s in sums] if mean else sums

            def grad(*upstream: Any) -> list[Any]:
                shares = [tf.cast(self.share, g.dtype) for g in upstream]
                total = self.exchange([g * s for g, s in zip(upstream, shares, strict=True)])
                scale = 1 / replicas if mean else 1.0
                return [tf.math.divide_no_nan(t, s) * scale for t, s in zip(total, shares, strict=True)]

            return outputs, grad

        return tf.nest.pack_sequence_as(value, tf.nest.flatten(reduce(*tf.nest.flatten(value))))

    def wrap_apply(
        self, optimizer: keras.optimizers.Optimizer, apply: Callable[..., Any]
    ) -> Callable[..., Any]:
        """Returns `optimizer.apply` with the exchange in front of it."""

        def apply_global(grads: Sequence[Any], trainable_variables: Any = None) -> Any:
            grads = list(grads)
            present = [i for i, g in enumerate(grads) if g is not None]
            sums = self.exchange([self._weighted(grads[i]) for i in present])
            for i, total in zip(present, sums, strict=True):
                grads[i] = total
            self.num_applied += 1
            return apply(grads, trainable_variables)

        return apply_global

    def _weighted(self, grad: Any) -> Any:
        if isinstance(grad, tf.IndexedSlices):
            return tf.IndexedSlices(self._weighted(grad.values), grad.indices, grad.dense_shape)
        # multiply_no_nan: a replica without examples contributes zero, whatever its model made of padding.
        return tf.math.multiply_no_nan(grad, tf.cast(self.share, grad.dtype))

    def loss_correction(self, values: Any, sample_weight: Any, mask: Any, reduction: str | None) -> Any:
        """Returns the factor that makes Σ share·loss over replicas the loss of the whole batch.

        Keras divides by what this replica holds; where that is not its number of examples (a sum, valid
        elements under a mask, a sum of weights) the global count takes its place.
        """
        if reduction in (None, "none"):
            return None
        grow = tf.math.divide_no_nan(1.0, self.share)
        if reduction == "sum":
            return grow
        if reduction == "mean_with_sample_weight" and sample_weight is not None:
            local = tf.reduce_sum(tf.cast(sample_weight, tf.float32))
        elif mask is not None:
            local = tf.reduce_sum(tf.cast(mask, tf.float32))
        else:
            return None
        local *= tf.cast(self.share > 0, local.dtype)  # An example of padding is none.
        (total,) = self.exchange([local])
        return tf.math.divide_no_nan(local, total) * grow


class ReplicaStep:
    """Runs a model's `train_step`, `test_step` or `predict_step` on every replica of a sync strategy."""

    def __init__(
        self,
        *,
        strategy: tf.distribute.Strategy,
        model: keras.Model,
        optimizers: Sequence[keras.optimizers.Optimizer],
    ) -> None:
        self._strategy = strategy
        self._model = model
        self._optimizers = list(optimizers)
        self._variables = keras_internals.all_variables(model, self._optimizers)
        self._metric_ids = {id(v) for v in model.metrics_variables}
        self.returned: dict[str, list[str] | None] = {}
        self._num_local = len(strategy.extended.worker_devices)
        self._average_fn: Callable[[], Any] | None = None
        self._metric_state_fn: Callable[[], Any] | None = None
        self._sum_fns: dict[bool, Callable[..., Any]] = {}
        self._metric_names = set(metric_results(model, zero_state(model)))

    def train(self, parts: Sequence[Any], global_size: Any) -> Any:
        """Runs one optimizer step; see `_run`."""
        return self._run("train", parts, global_size)

    def test(self, parts: Sequence[Any], global_size: Any) -> Any:
        """Updates the metrics on one batch; see `_run`."""
        return self._run("test", parts, global_size)

    def predict(self, parts: Sequence[Any], global_size: Any) -> Any:
        """Returns the outputs for one whole global batch, in order, on every replica."""
        return self._run("predict", parts, global_size)

    def _run(self, kind: str, parts: Sequence[Any], global_size: Any) -> Any:
        """Runs the step on each local replica.

        Args:
            kind: `train`, `test` or `predict`.
            parts: One nest of tensors for each local replica; a leading axis may be empty.
            global_size: Examples in the whole batch, int32 scalar; None where replicas must add them up.

        Returns:
            For `train` and `test` the logs that are no metrics, averaged over the batch's examples.
        """
        return self._strategy.run(self._replica_fn, args=(kind, tuple(parts), global_size))

    def _replica_fn(self, kind: str, parts: tuple[Any, ...], global_size: Any) -> Any:
        outer = tf.distribute.get_replica_context()
        local_index = local_replica_index(outer, len(parts))
        part = parts[local_index]
        first = tf.nest.flatten(part)[0]
        local_size = tf.shape(first)[0] if first.shape[0] is None else first.shape[0]
        if global_size is None:
            sizes = [tf.convert_to_tensor(local_size)]
            (global_size,) = outer.all_reduce(tf.distribute.ReduceOp.SUM, sizes)
        sole = SoleReplica(
            outer=outer, local_index=local_index, local_size=local_size, global_size=global_size
        )
        local = [(v, self._local(v, local_index)) for v in self._variables]
        sole.binding = keras_internals.ReplicaBinding(
            variables=local,
            optimizers=self._optimizers,
            apply=sole.wrap_apply,
            loss_correction=sole.loss_correction,
        )
        guarded = [] if isinstance(local_size, int) and local_size > 0 else self._metrics_of(local)
        before = [tf.identity(v) for v in guarded]
        with sole:
            outputs = getattr(self._model, f"{kind}_step")(_at_least_one(part, local_size))
        if kind == "train" and not sole.num_applied and self._model.trainable_variables:
            raise ConfigError(
                f"{type(self._model).__name__}.train_step changed no weights through a Keras optimizer; "
                "replicas can only stay equal if updates go through optimizer.apply or apply_gradients."
            )
        for variable, old in zip(guarded, before, strict=True):
            variable.assign(tf.where(local_size > 0, variable, old))
        if kind == "predict":
            return tf.nest.map_structure(lambda t: outer.all_gather(t[:local_size], axis=0), outputs)
        self.returned[kind] = returned_names(outputs)
        return self._weighted_logs(outputs, sole)

    def _weighted_logs(self, outputs: Any, sole: SoleReplica) -> dict[str, Any]:
        own = scalar_logs(outputs, self._metric_names)
        if not own:
            return {}
        # Every replica must exchange in the same order: dictionaries keep the order the step wrote.
        weighted = [tf.cast(v, tf.float32) * sole.share for v in own.values()]
        sums = sole.outer.all_reduce(tf.distribute.ReduceOp.SUM, weighted)
        return dict(zip(own, sums, strict=True))

    def spread_seeds(self) -> None:
        """Gives each replica its own random streams, replica 0 keeping the model's: masks must differ."""
        states = keras_internals.seed_states(self._model)

        def spread() -> None:
            context = tf.distribute.get_replica_context()
            index = context.replica_id_in_sync_group
            own = [self._local(s, local_replica_index(context, self._num_local)) for s in states]
            first = [tf.where(index == 0, tf.cast(s, tf.int64), 0) for s in own]
            base = context.all_reduce(tf.distribute.ReduceOp.SUM, first)
            shift = tf.cast(index, tf.int64) * tf.constant([_SEED_STRIDE, 0], tf.int64)
            for variable, value in zip(own, base, strict=True):
                variable.assign(tf.cast(tf.math.floormod(value + shift, 2**32), variable.dtype))

        if states and self._strategy.num_replicas_in_sync > 1:
            tf.function(lambda: self._strategy.run(spread))()

    def average_statistics(self) -> None:
        """Averages what replicas keep for themselves (BatchNormalization's moving statistics)."""
        seeds = {id(s) for s in keras_internals.seed_states(self._model)}
        kept = [
            v
            for v in self._model.non_trainable_variables
            if id(v) not in seeds and id(v) not in self._metric_ids and tf.as_dtype(v.dtype).is_floating
        ]

        def average() -> None:
            context = tf.distribute.get_replica_context()
            own = [self._local(v, local_replica_index(context, self._num_local)) for v in kept]
            means = context.all_reduce(tf.distribute.ReduceOp.MEAN, [tf.identity(v) for v in own])
            for variable, value in zip(own, means, strict=True):
                variable.assign(value)

        if kept and self._strategy.num_replicas_in_sync > 1:
            if self._average_fn is None:
                self._average_fn = tf.function(lambda: self._strategy.run(average))
            self._average_fn()

    def metric_state(self) -> list[Any]:
        """Returns the metric variables' values summed over all replicas; every process must call it."""
        if self._metric_state_fn is None:

            def total() -> list[Any]:
                context = tf.distribute.get_replica_context()
                index = local_replica_index(context, self._num_local)
                own = [tf.identity(self._local(v, index)) for v in self._model.metrics_variables]
                return list(context.all_reduce(tf.distribute.ReduceOp.SUM, own)) if own else []

            self._metric_state_fn = tf.function(lambda: self._strategy.run(total))
        state = self._metric_state_fn()
        return [self._strategy.experimental_local_results(v)[0].numpy() for v in state]

    def set_metric_state(self, state: Sequence[Any]) -> None:
        """Gives the first replica a state, and the others zeros, so that the sum is that state."""

        def share_out(values: Sequence[Any]) -> None:
            context = tf.distribute.get_replica_context()
            index = local_replica_index(context, self._num_local)
            is_first = context.replica_id_in_sync_group == 0
            for variable, value in zip(self._model.metrics_variables, values, strict=True):
                self._local(variable, index).assign(tf.where(is_first, value, tf.zeros_like(value)))

        tf.function(lambda values: self._strategy.run(share_out, args=(values,)), autograph=False)(
            [tf.convert_to_tensor(value) for value in state]
        )

    def sum_first(self, values: Sequence[tf.Tensor], *, everyone: bool = False) -> list[Any]:
        """Sums tensors over processes, of each its first replica's; every process must call it.

        Args:
            values: int32 or float32, of one shape everywhere.
            everyone: False counts the first process alone: a broadcast.

        Returns:
            Arrays.
        """

        def total(values: Sequence[tf.Tensor]) -> list[Any]:
            context = tf.distribute.get_replica_context()
            place = context.replica_id_in_sync_group
            counts = (place % self._num_local == 0) if everyone else (place == 0)
            counted = [tf.where(counts, v, tf.zeros_like(v)) for v in values]
            return list(context.all_reduce(tf.distribute.ReduceOp.SUM, counted))

        if everyone not in self._sum_fns:
            self._sum_fns[everyone] = tf.function(
                lambda v: self._strategy.run(total, args=(v,)), autograph=False
            )
        sums = self._sum_fns[everyone](list(values))
        return [self._strategy.experimental_local_results(v)[0].numpy() for v in sums]

    def _local(self, variable: keras.Variable, index: int) -> tf.Variable:
        return self._strategy.experimental_local_results(keras_internals.native(variable))[index]

    def _metrics_of(self, local: Sequence[tuple[keras.Variable, tf.Variable]]) -> list[tf.Variable]:
        return [own for variable, own in local if id(variable) in self._metric_ids]


def scalar_logs(logs: Any, metric_names: set[str]) -> dict[str, tf.Tensor]:
    """Returns what a `train_step` reports beside its metrics: scalar tensors by name."""
    if not isinstance(logs, dict):
        return {}
    return {
        name: value
        for name, value in logs.items()
        if name not in metric_names and tf.is_tensor(value) and value.shape.rank == 0
    }


def returned_names(logs: Any) -> list[str] | None:
    """Returns the names of a step's logs, None where it returned no dict."""
    return list(logs) if isinstance(logs, dict) else None


def local_replica_index(context: tf.distribute.ReplicaContext, num_local: int) -> int:
    """Returns which of this process's replicas the context is, 0-based."""
    index = tf.get_static_value(context.replica_id_in_sync_group)
    return int(index) % num_local


def _at_least_one(part: Any, size: Any) -> Any:
    """Gives an empty part one example of zeros, so that a mean over it is finite; its share is zero."""
    if isinstance(size, int) and size > 0:
        return part

    def pad(tensor: tf.Tensor) -> tf.Tensor:
        missing = tf.maximum(1 - tf.shape(tensor)[0], 0)
        zeros = tf.zeros(tf.concat([[missing], tf.shape(tensor)[1:]], 0), tensor.dtype)
        padded = tf.concat([tensor, zeros], 0)
        return tf.ensure_shape(padded, [None, *tensor.shape[1:]])

    return tf.nest.map_structure(pad, part)
