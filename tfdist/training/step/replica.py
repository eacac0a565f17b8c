"""A sync strategy's step: a `KerasReplicaContext` for each local replica, and what replicas bring together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist import keras_internals
from tfdist.collectives import Communicator, gather_all, reduce_all
from tfdist.errors import ConfigError
from tfdist.optimizers.one_pass import in_one_pass
from tfdist.training.metric_parts import aggregation_of, part_origin, start_state, weigh_part
from tfdist.training.metrics import metric_results, returned_names, scalar_logs
from tfdist.training.monitoring.clock import on_host, step_time_after
from tfdist.training.step.compute import Compute, Computed, time_calls, touch
from tfdist.training.step.finite_check import UNCHECKED, StepCheck, side_variables
from tfdist.training.step.gradient_aggregation import (
    AllReducedGradients,
    DelayedGradients,
    GradientAggregation,
)
from tfdist.training.step.replica_context import KerasReplicaContext

# A prime far from the steps' counters: replica r draws from seed + r * stride.
SEED_STRIDE = 1_000_003


class ReplicaStep:
    """Runs a model's `train_step`, `test_step` or `predict_step` on every replica of a sync strategy.

    Attributes:
        gradient_aggregation: What the replicas do with their gradients; functions traced before it was changed keep the
            old one.
        communicator: What sums between replicas go by; None: the strategy.
        num_seen: Examples that this process's replicas have trained on by themselves.
        metric_origins: What replicas' parts of the metrics' states are counted from; see `part_origin`.
    """

    def __init__(
        self,
        *,
        strategy: tf.distribute.Strategy,
        model: keras.Model,
        optimizers: Sequence[keras.optimizers.Optimizer],
        first_replica: int = 0,
        whole_metrics: Sequence[keras.metrics.Metric] = (),
    ) -> None:
        self._strategy = strategy
        self._model = model
        self._optimizers = list(optimizers)
        self._variables = keras_internals.all_variables(model, self._optimizers)
        self._first_replica = first_replica
        self._whole_metrics = list(whole_metrics)
        # Those that see all examples are the same on every replica, whoever has any.
        self._whole_ids = {id(v) for metric in whole_metrics for v in metric.variables}
        self._metric_ids = {id(v) for v in model.metrics_variables} - self._whole_ids
        start = start_state(model)
        aggregations = [self._aggregation(v) for v in model.metrics_variables]
        self.metric_origins = [part_origin(s, a) for s, a in zip(start, aggregations, strict=True)]
        self._start = start
        self._side_ids = {id(v) for v in side_variables(model)}
        self.returned: dict[str, list[str] | None] = {}
        self.gradient_aggregation: GradientAggregation = AllReducedGradients()
        self.communicator: Communicator | None = None
        self.num_seen = tf.Variable(0, dtype=tf.int64, trainable=False)
        self.num_local = len(strategy.extended.worker_devices)
        self._average_fn: Callable[[], Any] | None = None
        self._metric_state_fn: Callable[[], Any] | None = None
        self._reset_fn: Callable[[], Any] | None = None
        self._sum_fns: dict[Any, Callable[..., Any]] = {}
        self.metric_names = set(metric_results(model, self._start))

    def train(self, parts: Sequence[Any], global_size: Any, limit: Any = None, **known: Any) -> Any:
        """Runs one optimizer step; see `_run`."""
        return self._run("train", parts, global_size, limit, **known)

    def test(self, parts: Sequence[Any], global_size: Any, **known: Any) -> Any:
        """Updates the metrics on one batch; see `_run`."""
        return self._run("test", parts, global_size, **known)

    def predict(self, parts: Sequence[Any], global_size: Any, **known: Any) -> Any:
        """Returns the outputs for one whole global batch, in order, on every replica."""
        return self._run("predict", parts, global_size, **known)

    def _run(
        self,
        kind: str,
        parts: Sequence[Any],
        global_size: Any,
        limit: Any = None,
        *,
        never_empty: bool = False,
        has_more: Any = None,
        jit: Compute | None = None,
    ) -> Any:
        """Runs the step on each local replica.

        Args:
            kind: `train`, `test` or `predict`.
            parts: One nest of tensors for each local replica; a leading axis may be empty.
            global_size: Examples in the whole batch, int32 scalar; None where replicas must add them up.
            limit: Largest loss that passes the check; None checks nothing.
            never_empty: Whether each replica of the strategy has an example.
            has_more: Whether this process has examples for another step, where each reads its own: a bool scalar.
            jit: Computes gradients by XLA; None: as TensorFlow does.

        Returns:
            For `train` and `test` the logs that are no metrics, averaged over the batch's examples (where replicas step
            by themselves: this one's share of that average). For `train` two tensors beside them: `[2]` float32, the
            check's verdict and the loss, and `[3]` float64, when the batch, gradients and their sums were there, in
            seconds since 1970, 0 where that is not known. Where `has_more` is given, a pair of that and of the number
            of processes that have.
        """
        args = (kind, tuple(parts), global_size, limit, never_empty, has_more, jit)
        return self._strategy.run(self._replica_fn, args=args)

    def _replica_fn(
        self,
        kind: str,
        parts: tuple[Any, ...],
        global_size: Any,
        limit: Any,
        never_empty: bool,
        has_more: Any,
        jit: Compute | None,
    ) -> Any:
        outer = tf.distribute.get_replica_context()
        local_index = local_replica_index(outer, len(parts))
        part = parts[local_index]
        first = tf.nest.flatten(part)[0]
        local_size = tf.shape(first)[0] if first.shape[0] is None else first.shape[0]
        num_more = None
        if global_size is None:
            # In one exchange: how many examples there are now, and who has any for another step.
            tells = has_more is not None and local_index == 0
            counts = tf.stack([local_size, tf.cast(has_more, tf.int32) if tells else 0])
            (sums,) = reduce_all(outer, tf.distribute.ReduceOp.SUM, [counts])
            global_size, num_more = sums[0], sums[1]
        check = None if limit is None else StepCheck(limit)
        sole = KerasReplicaContext(
            outer=outer,
            local_index=local_index,
            local_size=local_size,
            global_size=global_size,
            check=check,
            communicator=self.communicator,
            never_empty=never_empty,
            is_local=self.gradient_aggregation.is_local and kind == "train",
        )
        self._bind(sole, local_index)
        result: Any
        if kind == "train":
            result = self._train_part(sole, part, jit)
        else:
            with sole.guarding(self._metric_ids), after_reading(part), sole:
                outputs = getattr(self._model, f"{kind}_step")(_at_least_one(part, sole))
            if kind == "predict":
                return tf.nest.map_structure(lambda t: gather_all(outer, t[:local_size]), outputs)
            self.returned[kind] = returned_names(outputs)
            result = self._weighted_logs(outputs, sole)
        return result if has_more is None else (result, num_more)

    def _bind(self, sole: KerasReplicaContext, local_index: int) -> None:
        local = [(v, self._local(v, local_index)) for v in self._variables]
        sole.bound = local
        sole.binding = keras_internals.ReplicaBinding(
            variables=local,
            optimizers=self._optimizers,
            apply=lambda optimizer, apply: self.gradient_aggregation.wrap_apply(
                sole, optimizer, in_one_pass(optimizer, apply)
            ),
            loss_correction=sole.loss_correction,
            model=self._model,
            note_loss=None if sole.check is None else sole.check.note_loss,
            updates=[(metric, self._see_all(metric, sole)) for metric in self._whole_metrics],
        )

    def _see_all(self, metric: keras.metrics.Metric, sole: KerasReplicaContext) -> Callable[..., Any]:
        """Returns an `update_state` that gets the examples of all replicas."""

        def update_state(*args: Any, **kwargs: Any) -> Any:
            gathered = tf.nest.map_structure(lambda t: None if t is None else sole.gather(t), (args, kwargs))
            return type(metric).update_state(metric, *gathered[0], **gathered[1])

        return update_state

    def _aggregation(self, variable: keras.Variable) -> str:
        return "only_first_replica" if id(variable) in self._whole_ids else aggregation_of(variable)

    def _train_part(
        self, sole: KerasReplicaContext, part: Any, jit: Compute | None
    ) -> tuple[dict[str, Any], Any, Any]:
        check = sole.check
        side = [] if check is None else [own for v, own in sole.bound if id(v) in self._side_ids]
        before = [tf.identity(v) for v in side]
        started_at = step_time_after(part)
        with sole.guarding(self._metric_ids), after_reading(part), sole:
            if isinstance(self.gradient_aggregation, DelayedGradients):
                self.gradient_aggregation.begin_step(sole)
            outputs, self.returned["train"] = self._step(sole, _at_least_one(part, sole), jit)
        if not sole.num_applied and self._model.trainable_variables:
            raise ConfigError(
                f"{type(self._model).__name__}.train_step changed no weights through a Keras optimizer; "
                "replicas can only stay equal if updates go through optimizer.apply or apply_gradients."
            )
        if self.gradient_aggregation.is_local:
            self.num_seen.assign_add(tf.cast(sole.local_size, tf.int64))
        if check is not None:
            check.undo(side, before)
        logs = self._weighted_logs(outputs, sole)
        verdict = tf.convert_to_tensor(UNCHECKED if check is None else check.verdict)
        with on_host():
            return logs, verdict, tf.stack([started_at, sole.ready_at, sole.exchanged_at])

    def _step(
        self, sole: KerasReplicaContext, part: Any, jit: Compute | None
    ) -> tuple[Any, list[str] | None]:
        if jit is None:
            try:
                outputs = self._model.train_step(part)
            except RuntimeError as error:
                if "merge_call" not in str(error):
                    raise
                raise ConfigError(
                    f"{type(self._model).__name__}.train_step applies gradients inside a tf.cond or a loop, where "
                    "replicas cannot meet: apply them in every step, zeros where nothing is to change, or let the "
                    "optimizer's gradient_accumulation_steps count; workers can meet there by exchange='mpi'."
                ) from error
            return outputs, returned_names(outputs)
        found = self._compute(sole, jit, part, jit=True)
        # Where XLA has no code for the model, nothing else may have happened when it says so.
        with tf.control_dependencies(tf.nest.flatten([g for g in found.gradients if g is not None])):
            jit.optimizer.apply(found.gradients, found.variables)
        return found.logs, found.names

    def _compute(self, sole: KerasReplicaContext, compute: Compute, part: Any, *, jit: bool) -> Computed:
        return compute.run(
            part,
            variables=sole.bound,
            loss_correction=sole.loss_correction,
            note_loss=None if sole.check is None else sole.check.note_loss,
            jit=jit,
        )

    def time_compute(self, compute: Compute, parts: Sequence[Any], *, jit: bool) -> float:
        """Returns the seconds of a forward and backward pass that changes nothing; every process must call it.

        Args:
            compute: Of the model.
            parts: One nest of tensors for each local replica.
            jit: Whether by XLA.
        """

        def run(parts: Sequence[Any]) -> Any:
            outer = tf.distribute.get_replica_context()
            index = local_replica_index(outer, len(parts))
            size = tf.nest.flatten(parts[index])[0].shape[0]
            # As if the part were the whole batch: nobody exchanges anything.
            sole = KerasReplicaContext(
                outer=outer, local_index=index, local_size=size, global_size=size, is_local=True
            )
            self._bind(sole, index)
            side = [own for v, own in sole.bound if id(v) in self._side_ids]
            before = [tf.identity(v) for v in side]
            with sole:
                found = self._compute(sole, compute, parts[index], jit=jit)
            for variable, value in zip(side, before, strict=True):
                variable.assign(value)
            return touch(found.gradients)

        compiled = tf.function(lambda parts: self._strategy.run(run, args=(parts,)), autograph=False)
        return time_calls(lambda: self.first_local(compiled(parts)).numpy())

    def _weighted_logs(self, outputs: Any, sole: KerasReplicaContext) -> dict[str, Any]:
        own = scalar_logs(outputs, self.metric_names)
        if not own:
            return {}
        # Every replica must exchange in the same order: dictionaries keep the order the step wrote.
        weighted = [tf.cast(v, tf.float32) * sole.share for v in own.values()]
        if sole.is_local:
            return dict(zip(own, weighted, strict=True))
        # After the weights have moved, for the same reason.
        moved = [tf.identity(own) for _, own in sole.bound]
        with tf.control_dependencies(moved):
            weighted = [tf.identity(v) for v in weighted]
        sums = reduce_all(sole.outer, tf.distribute.ReduceOp.SUM, weighted)
        return dict(zip(own, sums, strict=True))

    def apply_waiting(self, limit: float | None) -> tuple[int, float]:
        """Applies the gradients that wait for the next step; every process must call it.

        Args:
            limit: Largest loss that passes the check; None checks nothing.

        Returns:
            What was wrong with them, and their loss.
        """
        aggregation = self.gradient_aggregation
        assert isinstance(aggregation, DelayedGradients)
        (optimizer,) = self._optimizers

        def apply(*limits: Any) -> Any:
            outer = tf.distribute.get_replica_context()
            check = StepCheck(*limits) if limits else None
            sole = KerasReplicaContext(
                outer=outer,
                local_index=0,
                local_size=1,
                global_size=1,
                check=check,
                communicator=self.communicator,
            )
            self._bind(sole, 0)
            with sole:
                aggregation.apply_rest(sole, optimizer, type(optimizer).apply.__get__(optimizer))
            return tf.convert_to_tensor(UNCHECKED if check is None else check.verdict)

        key = ("waiting", limit is None)
        if key not in self._sum_fns:
            self._sum_fns[key] = tf.function(
                lambda *limits: self._strategy.run(apply, args=limits), autograph=False
            )
        limits = [] if limit is None else [tf.constant(limit, tf.float32)]
        fault, loss = self.first_local(self._sum_fns[key](*limits)).numpy()
        return int(fault), float(loss)

    def build(self, function: Callable[[tf.distribute.ReplicaContext], Any]) -> Callable[[], np.ndarray]:
        """Compiles a function of the replica context that the strategy gives.

        Args:
            function: Returns a tensor.

        Returns:
            What runs it on every replica, and returns the result of this process's first; every process must call it.
        """
        compiled = tf.function(
            lambda: self._strategy.run(lambda: function(tf.distribute.get_replica_context())), autograph=False
        )
        # Traced by itself: TensorFlow would take many functions from one place for one that is traced again and again.
        traced: list[Any] = []

        def run() -> np.ndarray:
            if not traced:
                traced.append(compiled.get_concrete_function())
            return self.first_local(traced[0]()).numpy()

        return run

    def own_variable(self, variable: keras.Variable) -> tf.Variable:
        """Returns the TensorFlow variable of this process's first replica."""
        return self._local(variable, 0)

    def first_local(self, value: Any) -> Any:
        """Returns the value of this process's first replica."""
        return self._strategy.experimental_local_results(value)[0]

    def spread_seeds(self) -> None:
        """Gives each replica its own random streams, replica 0 keeping the model's: masks must differ."""
        states = keras_internals.seed_states(self._model)

        def spread() -> None:
            context = tf.distribute.get_replica_context()
            index = context.replica_id_in_sync_group
            own = [self._local(s, local_replica_index(context, self.num_local)) for s in states]
            first = [tf.where(index == 0, tf.cast(s, tf.int64), 0) for s in own]
            base = context.all_reduce(tf.distribute.ReduceOp.SUM, first)
            shift = tf.cast(index, tf.int64) * tf.constant([SEED_STRIDE, 0], tf.int64)
            for variable, value in zip(own, base, strict=True):
                variable.assign(tf.cast(tf.math.floormod(value + shift, 2**32), variable.dtype))

        if states and self._strategy.num_replicas_in_sync > 1:
            tf.function(lambda: self._strategy.run(spread), autograph=False)()

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
            own = [self._local(v, local_replica_index(context, self.num_local)) for v in kept]
            means = reduce_all(context, tf.distribute.ReduceOp.MEAN, [tf.identity(v) for v in own])
            for variable, value in zip(own, means, strict=True):
                variable.assign(value)

        if kept and self._strategy.num_replicas_in_sync > 1:
            if self._average_fn is None:
                self._average_fn = tf.function(lambda: self._strategy.run(average), autograph=False)
            self._average_fn()

    def reset_metrics(self) -> None:
        """Lets the metrics begin anew: in one call, where Keras has one of 10 ms for each variable under workers."""
        if not keras_internals.resets_by_variables(self._model):
            self._model.reset_metrics()
            return
        if self._reset_fn is None:

            def reset() -> None:
                index = local_replica_index(tf.distribute.get_replica_context(), self.num_local)
                for variable, start in zip(self._model.metrics_variables, self._start, strict=True):
                    self._local(variable, index).assign(start)

            self._reset_fn = tf.function(lambda: self._strategy.run(reset), autograph=False)
        self._reset_fn()

    def metric_state(self) -> list[Any]:
        """Returns the metrics' state over the examples of all replicas; every process must call it."""
        if self._metric_state_fn is None:

            def total() -> list[Any]:
                context = tf.distribute.get_replica_context()
                index = local_replica_index(context, self.num_local)
                changes = [
                    weigh_part(
                        self._local(v, index) - origin,
                        self._aggregation(v),
                        is_first=context.replica_id_in_sync_group == 0,
                        num_parts=context.num_replicas_in_sync,
                    )
                    for v, origin in zip(self._model.metrics_variables, self.metric_origins, strict=True)
                ]
                sums = reduce_all(context, tf.distribute.ReduceOp.SUM, changes)
                return [origin + change for origin, change in zip(self.metric_origins, sums, strict=True)]

            self._metric_state_fn = tf.function(lambda: self._strategy.run(total), autograph=False)
        state = self._metric_state_fn()
        return [self._strategy.experimental_local_results(v)[0].numpy() for v in state]

    def own_metrics(self) -> list[np.ndarray]:
        """Returns what this process's replicas have added to the metrics' state."""
        found = []
        for variable, origin in zip(self._model.metrics_variables, self.metric_origins, strict=True):
            changes = [
                weigh_part(
                    self._local(variable, index) - origin,
                    self._aggregation(variable),
                    is_first=self._first_replica + index == 0,
                    num_parts=self._strategy.num_replicas_in_sync,
                )
                for index in range(self.num_local)
            ]
            found.append(np.asarray(sum(changes)))
        return found

    def set_metric_state(self, state: Sequence[Any]) -> None:
        """Gives the replicas a state: the first one where the parts are added up, the others what they start from."""

        def share_out(values: Sequence[Any]) -> None:
            context = tf.distribute.get_replica_context()
            index = local_replica_index(context, self.num_local)
            is_first = context.replica_id_in_sync_group == 0
            for variable, value, start in zip(
                self._model.metrics_variables, values, self._start, strict=True
            ):
                is_own = is_first | (self._aggregation(variable) != "sum")
                self._local(variable, index).assign(tf.where(is_own, value, start))

        tf.function(lambda values: self._strategy.run(share_out, args=(values,)), autograph=False)(
            [tf.convert_to_tensor(value) for value in state]
        )

    def sum_first(self, values: np.ndarray) -> np.ndarray:
        """Sums an array over processes, of each its first replica's; every process must call it.

        Args:
            values: `[n]`, of one length everywhere.
        """
        dtype = tf.as_dtype(values.dtype)

        def total(values: tf.Tensor) -> Any:
            context = tf.distribute.get_replica_context()
            is_first = context.replica_id_in_sync_group % self.num_local == 0
            counted = tf.where(is_first, values, tf.zeros_like(values))
            return context.all_reduce(tf.distribute.ReduceOp.SUM, counted)

        if dtype not in self._sum_fns:
            self._sum_fns[dtype] = tf.function(
                lambda v: self._strategy.run(total, args=(v,)),
                autograph=False,
                input_signature=[tf.TensorSpec([None], dtype)],  # one trace for every length
            )
        sums = self._sum_fns[dtype](values)
        return self._strategy.experimental_local_results(sums)[0].numpy()

    def _local(self, variable: keras.Variable, index: int) -> tf.Variable:
        return self._strategy.experimental_local_results(keras_internals.native(variable))[index]


def after_reading(batch: Any) -> contextlib.AbstractContextManager[None]:
    """Makes a step begin when its batch is there.

    What needs no data would not wait: the optimizer's counter would move once more where a stream ends inside a step.
    """
    return tf.control_dependencies(tf.nest.flatten(batch, expand_composites=True))


def local_replica_index(context: tf.distribute.ReplicaContext, num_local: int) -> int:
    """Returns which of this process's replicas the context is, 0-based."""
    index = tf.get_static_value(context.replica_id_in_sync_group)
    return int(index) % num_local


def _at_least_one(part: Any, sole: KerasReplicaContext) -> Any:
    """Gives an empty part one example of zeros, so that a mean over it is finite; its share is zero."""
    if sole.never_empty:
        return part

    def pad(tensor: tf.Tensor) -> tf.Tensor:
        missing = tf.maximum(1 - tf.shape(tensor)[0], 0)
        zeros = tf.zeros(tf.concat([[missing], tf.shape(tensor)[1:]], 0), tensor.dtype)
        padded = tf.concat([tensor, zeros], 0)
        return tf.ensure_shape(padded, [None, *tensor.shape[1:]])

    return tf.nest.map_structure(pad, part)
