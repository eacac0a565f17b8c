"""A sync strategy's step: a `KerasReplicaContext` for each local replica, and what replicas bring together."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfdist import keras_internals
from tfdist.collectives import Communicator, gather_all, reduce_all
from tfdist.errors import ConfigError
from tfdist.layers.embedding import shards_of
from tfdist.optimizers.one_pass import in_one_pass
from tfdist.optimizers.sparse import with_summed_rows
from tfdist.training.metrics import metric_results, returned_names, scalar_logs
from tfdist.training.monitoring.clock import on_host, step_time_after
from tfdist.training.privacy.gradients import PrivateGradients
from tfdist.training.privacy.per_example import num_rows
from tfdist.training.step.compute import Compute, Computed, time_calls, touch
from tfdist.training.step.finite_check import UNCHECKED, StepCheck, side_variables
from tfdist.training.step.gradient_aggregation import (
    AllReducedGradients,
    DelayedGradients,
    GradientAggregation,
)
from tfdist.training.step.replica_context import KerasReplicaContext
from tfdist.training.step.replicas import Replicas
from tfdist.training.step.replicated_metrics import ReplicatedMetrics

# A prime far from the steps' counters: replica r draws from seed + r * stride.
SEED_STRIDE = 1_000_003


# Wide: what replicas share, and what they are told between steps.
class ReplicaStep:
    """Runs a model's `train_step`, `test_step` or `predict_step` on every replica of a sync strategy.

    Attributes:
        replicas: Which run it.
        metrics: Their parts of the metrics' state.
        gradient_aggregation: What the replicas do with their gradients; functions traced before it was changed keep the
            old one.
        communicator: What sums between replicas go by; None: the strategy.
        num_seen: Examples that this process's replicas have trained on by themselves.
        private: What stands for their gradients in private training; functions traced before keep the old one.
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
        self.replicas = Replicas(strategy, first_replica)
        self.metrics = ReplicatedMetrics(model, self.replicas, whole_metrics)
        self.metric_names = set(metric_results(model, self.metrics.start))
        self.returned: dict[str, list[str] | None] = {}
        self.gradient_aggregation: GradientAggregation = AllReducedGradients()
        self.communicator: Communicator | None = None
        self.private: PrivateGradients | None = None
        self.num_seen = tf.Variable(0, dtype=tf.int64, trainable=False)
        self._model = model
        self._optimizers = list(optimizers)
        self._variables = keras_internals.all_variables(model, self._optimizers)
        self._tables = shards_of(model)
        self._side_ids = {id(v) for v in side_variables(model)}
        self._average_fn: Callable[[], Any] | None = None
        self._waiting_fns: dict[bool, Callable[..., Any]] = {}

    def run(
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
            seconds since 1970, 0 where that is not known. For `predict` the outputs of the whole batch, in order. Where
            `has_more` is given, a pair of that and of the number of processes that have.
        """
        args = (kind, tuple(parts), global_size, limit, never_empty, has_more, jit)
        return self.replicas.run(self._replica_fn, args)

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
        local_index = self.replicas.index_of(outer)
        part = parts[local_index]
        local_size = num_rows(part)
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
            result = self._train_part(sole, local_index, part, jit)
        else:
            with sole.guarding(self.metrics.partial_ids), after_reading(part), sole:
                outputs = getattr(self._model, f"{kind}_step")(_at_least_one(part, sole))
            if kind == "predict":
                return tf.nest.map_structure(lambda t: gather_all(outer, t[:local_size]), outputs)
            self.returned[kind] = returned_names(outputs)
            result = self._weighted_logs(outputs, sole)
        return result if has_more is None else (result, num_more)

    def _bind(self, sole: KerasReplicaContext, local_index: int) -> None:
        local = [(v, self.replicas.local(v, local_index)) for v in self._variables]
        sole.bound = local
        sole.binding = keras_internals.ReplicaBinding(
            variables=local,
            optimizers=self._optimizers,
            apply=lambda optimizer, apply: self.gradient_aggregation.wrap_apply(
                sole, optimizer, in_one_pass(optimizer, with_summed_rows(optimizer, apply, self._tables))
            ),
            loss_correction=sole.loss_correction,
            model=self._model,
            note_loss=None if sole.check is None else sole.check.note_loss,
            updates=[(metric, self._see_all(metric, sole)) for metric in self.metrics.whole],
        )

    def _see_all(self, metric: keras.metrics.Metric, sole: KerasReplicaContext) -> Callable[..., Any]:
        """Returns an `update_state` that gets the examples of all replicas."""

        def update_state(*args: Any, **kwargs: Any) -> Any:
            gathered = tf.nest.map_structure(lambda t: None if t is None else sole.gather(t), (args, kwargs))
            return type(metric).update_state(metric, *gathered[0], **gathered[1])

        return update_state

    def _train_part(
        self, sole: KerasReplicaContext, local_index: int, part: Any, jit: Compute | None
    ) -> tuple[dict[str, Any], Any, Any]:
        check = sole.check
        side = [] if check is None else [own for v, own in sole.bound if id(v) in self._side_ids]
        before = [tf.identity(v) for v in side]
        started_at = step_time_after(part)
        with sole.guarding(self.metrics.partial_ids), after_reading(part), sole:
            if isinstance(self.gradient_aggregation, DelayedGradients):
                self.gradient_aggregation.begin_step(sole)
            part = _at_least_one(part, sole)
            if self.private is not None:
                sole.private = functools.partial(
                    self.private.contribute,
                    part=part,
                    num_examples=sole.local_size,
                    batch_size=sole.global_size,
                    is_first=self.replicas.first + local_index == 0,
                    local=sole.bound,
                )
            outputs, self.returned["train"] = self._step(sole, part, jit)
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
        """Returns the seconds of a forward and backward pass that changes nothing; every process must call it."""

        def run(index: int, parts: Sequence[Any]) -> Any:
            outer = tf.distribute.get_replica_context()
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

        compiled = self.replicas.compile(run)
        return time_calls(lambda: self.replicas.first_local(compiled(parts)).numpy())

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

        Returns what was wrong with them, and their loss; a limit of None checks nothing.
        """
        aggregation = self.gradient_aggregation
        assert isinstance(aggregation, DelayedGradients)
        (optimizer,) = self._optimizers

        def apply(index: int, *limits: Any) -> Any:
            outer = tf.distribute.get_replica_context()
            check = StepCheck(*limits) if limits else None
            sole = KerasReplicaContext(
                outer=outer,
                local_index=index,
                local_size=1,
                global_size=1,
                check=check,
                communicator=self.communicator,
            )
            self._bind(sole, index)
            with sole:
                aggregation.apply_rest(sole, optimizer, type(optimizer).apply.__get__(optimizer))
            return tf.convert_to_tensor(UNCHECKED if check is None else check.verdict)

        limits = [] if limit is None else [tf.constant(limit, tf.float32)]
        if bool(limits) not in self._waiting_fns:
            self._waiting_fns[bool(limits)] = self.replicas.compile(apply)
        fault, loss = self.replicas.first_local(self._waiting_fns[bool(limits)](*limits)).numpy()
        return int(fault), float(loss)

    def spread_seeds(self) -> None:
        """Gives each replica its own random streams, replica 0 keeping the model's: masks must differ."""
        states = keras_internals.seed_states(self._model)

        def spread(local_index: int) -> None:
            context = tf.distribute.get_replica_context()
            index = context.replica_id_in_sync_group
            own = [self.replicas.local(s, local_index) for s in states]
            first = [tf.where(index == 0, tf.cast(s, tf.int64), 0) for s in own]
            base = context.all_reduce(tf.distribute.ReduceOp.SUM, first)
            shift = tf.cast(index, tf.int64) * tf.constant([SEED_STRIDE, 0], tf.int64)
            for variable, value in zip(own, base, strict=True):
                variable.assign(tf.cast(tf.math.floormod(value + shift, 2**32), variable.dtype))

        if states and self.replicas.num_all > 1:
            self.replicas.compile(spread)()

    def average_statistics(self) -> None:
        """Averages what replicas keep for themselves (BatchNormalization's moving statistics)."""
        others = {id(v) for v in keras_internals.seed_states(self._model)} | self.metrics.partial_ids
        kept = [
            v
            for v in self._model.non_trainable_variables
            if id(v) not in others and tf.as_dtype(v.dtype).is_floating
        ]

        def average(index: int) -> None:
            own = [self.replicas.local(v, index) for v in kept]
            context = tf.distribute.get_replica_context()
            means = reduce_all(context, tf.distribute.ReduceOp.MEAN, [tf.identity(v) for v in own])
            for variable, value in zip(own, means, strict=True):
                variable.assign(value)

        if kept and self.replicas.num_all > 1:
            if self._average_fn is None:
                self._average_fn = self.replicas.compile(average)
            self._average_fn()


def after_reading(batch: Any) -> contextlib.AbstractContextManager[None]:
    """Makes a step begin when its batch is there.

    What needs no data would not wait: the optimizer's counter would move once more where a stream ends inside a step.
    """
    return tf.control_dependencies(tf.nest.flatten(batch, expand_composites=True))


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
