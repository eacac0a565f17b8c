"""The loop of `one_device`, `mirrored` and `multiworker`: every replica takes its part of each global batch."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist import keras_internals
from tfdist.data import Segment, SelfShardedSource, Source, local_batches
from tfdist.training.metrics import metric_results, select_logs, zero_state
from tfdist.training.plan import BatchPlan, FinishedStep
from tfdist.training.replica import ReplicaStep, returned_names, scalar_logs


class SyncLoop:
    """Runs epochs, evaluation and prediction of a built model in lock step over all replicas."""

    def __init__(self, *, strategy: tf.distribute.Strategy, model: keras.Model) -> None:
        self._strategy = strategy
        self._model = model
        self._alone = not tf.distribute.has_strategy() and strategy is tf.distribute.get_strategy()
        num_local = 1 if self._alone else len(strategy.extended.worker_devices)
        resolver = strategy.cluster_resolver
        offset = 0
        if not self._alone and resolver is not None and resolver.task_id is not None:
            offset = _worker_index(resolver) * num_local
        self.num_replicas = strategy.num_replicas_in_sync
        self.replica_ids = list(range(offset, offset + num_local))
        optimizers = keras_internals.find_optimizers(model)
        self._step: ReplicaStep | _SoleStep = (
            _SoleStep(model)
            if self._alone
            else ReplicaStep(strategy=strategy, model=model, optimizers=optimizers)
        )
        self._functions: dict[tuple[str, bool], Any] = {}

    def start(self) -> None:
        """Prepares the replicas for training: equal weights are TensorFlow's, different random streams ours."""
        self._step.spread_seeds()

    def train_epoch(self, source: Source, plan: BatchPlan) -> Iterator[FinishedStep]:
        """Trains over the plan's steps, yielding once a step, with the logs where `plan.wants_logs`."""
        self._model.reset_metrics()
        if plan.metrics:
            self._step.set_metric_state(plan.metrics)
        extra: dict[str, Any] = {}
        for step, extra in enumerate(self._each("train", source, plan), start=plan.first_step):
            logs = self._logs("train", extra) if plan.wants_logs(step) else None
            yield FinishedStep(step=step, logs=logs, is_boundary=plan.is_boundary(step))
        self._step.average_statistics()
        self.epoch_logs = self._logs("train", extra)

    def evaluate(self, source: Source, plan: BatchPlan) -> dict[str, Any]:
        """Returns the metrics over the plan's steps."""
        self._model.reset_metrics()
        # The last batch's, as in Keras: only metrics gather over batches.
        extra = collections.deque(self._each("test", source, plan), maxlen=1)
        return self._logs("test", extra[0] if extra else {})

    def snapshot_metrics(self) -> list[Any]:
        """Averages what replicas keep for themselves, and returns the metrics' state; every process must call it."""
        self._step.average_statistics()
        return self._step.metric_state()

    def broadcast(self, content: bytes) -> bytes:
        """Returns the first process's bytes on every process."""
        if isinstance(self._step, _SoleStep) or self.num_replicas == len(self.replica_ids):
            return content
        size = int(self._step.sum_first([tf.constant([len(content)])])[0][0])
        if size == 0:
            return b""
        words = np.zeros(-(-size // 4), np.int32)
        words.view(np.uint8)[: len(content)] = np.frombuffer(content, np.uint8)
        (shared,) = self._step.sum_first([tf.constant(words)])
        return shared.view(np.uint8)[:size].tobytes()

    def vote(self, values: list[float]) -> list[float]:
        """Returns the sums over all processes."""
        if isinstance(self._step, _SoleStep) or self.num_replicas == len(self.replica_ids):
            return values
        (total,) = self._step.sum_first([tf.constant(values)], everyone=True)
        return [float(v) for v in total]

    def predict(self, source: Source, plan: BatchPlan) -> Any:
        """Returns the outputs as arrays in the data's order, on every process."""
        batches = list(self._each("predict", source, plan))
        return tf.nest.map_structure(lambda *parts: np.concatenate([p.numpy() for p in parts]), *batches)

    def _logs(self, kind: str, extra: dict[str, Any]) -> dict[str, Any]:
        results = metric_results(self._model, self._step.metric_state())
        return select_logs(results, self._step.returned.get(kind), extra)

    def _each(self, kind: str, source: Source, plan: BatchPlan) -> Iterator[Any]:
        for segment in self._segments(source, plan):
            iterator = iter(segment.dataset)
            function = self._function(kind, own=isinstance(source, SelfShardedSource))
            steps = 0
            while segment.num_steps is None or steps < segment.num_steps:
                try:
                    outputs = function(iterator)
                except tf.errors.OutOfRangeError:
                    break
                steps += 1
                yield tf.nest.map_structure(self._first_local, outputs)

    def _segments(self, source: Source, plan: BatchPlan) -> Sequence[Segment]:
        return local_batches(
            source,
            epoch=plan.epoch,
            seed=plan.seed,
            shuffle=plan.shuffle,
            global_batch_size=plan.global_batch_size,
            num_replicas=self.num_replicas,
            replica_ids=self.replica_ids,
            first_step=plan.first_step,
            num_steps=plan.num_steps,
        )

    def _function(self, kind: str, *, own: bool) -> Any:
        if (kind, own) not in self._functions:
            step = getattr(self._step, kind)

            def one_step(iterator: Any) -> Any:
                parts, global_size = next(iterator)
                return step(parts, None if own else global_size)

            compiled = one_step
            if not self._model.run_eagerly:
                jit = bool(self._model.jit_compile) and self._alone
                compiled = tf.function(one_step, autograph=False, jit_compile=jit or None)
            self._functions[kind, own] = compiled
        return self._functions[kind, own]

    def _first_local(self, value: Any) -> Any:
        return value if self._alone else self._strategy.experimental_local_results(value)[0]


class _SoleStep:
    """The step of a single device: Keras's own, untouched."""

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self.returned: dict[str, list[str] | None] = {}
        self._metric_names = set(metric_results(model, zero_state(model)))

    def train(self, parts: Any, global_size: Any) -> Any:
        del global_size
        return self._logs("train", self._model.train_step(parts[0]))

    def test(self, parts: Any, global_size: Any) -> Any:
        del global_size
        return self._logs("test", self._model.test_step(parts[0]))

    def predict(self, parts: Any, global_size: Any) -> Any:
        del global_size
        return self._model.predict_step(parts[0])

    def _logs(self, kind: str, logs: Any) -> dict[str, Any]:
        self.returned[kind] = returned_names(logs)
        return scalar_logs(logs, self._metric_names)

    def spread_seeds(self) -> None:
        """One replica keeps the model's seeds."""

    def average_statistics(self) -> None:
        """One replica has one set of statistics."""

    def metric_state(self) -> list[Any]:
        return [v.numpy() for v in self._model.metrics_variables]

    def set_metric_state(self, state: Sequence[Any]) -> None:
        for variable, value in zip(self._model.metrics_variables, state, strict=True):
            variable.assign(value)


def _worker_index(resolver: tf.distribute.cluster_resolver.ClusterResolver) -> int:
    """Returns this process's place in the replicas' order: the chief, then workers."""
    has_chief = "chief" in resolver.cluster_spec().jobs
    if resolver.task_type == "chief":
        return 0
    return int(resolver.task_id) + (1 if has_chief else 0)
