"""The loop of `ps`: the chief hands numbered batches to whichever worker is free; variables live on the ps tasks."""

from __future__ import annotations

import collections
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist import keras_internals
from tfdist.data import (
    ArraySource,
    SelfShardedSource,
    Source,
    epoch_indices,
    local_batches,
    step_size,
    step_start,
    take,
)
from tfdist.errors import ConfigError
from tfdist.training.closure import SharedStep
from tfdist.training.metrics import add_states, metric_results, select_logs, zero_state
from tfdist.training.plan import BatchPlan, FinishedStep

# Closures in flight for each worker: enough that a slow one does not hold up the others.
_WINDOW_PER_WORKER = 16
_RETRY_SECS = 0.1
# Data sets that the workers keep at once: training, validation, and one or two more.
_MAX_FEEDS = 4


class CoordinatorLoop:
    """Runs epochs, evaluation and prediction of a built model through a `ClusterCoordinator`."""

    num_replicas = 1

    def __init__(
        self,
        *,
        coordinator: tf.distribute.coordinator.ClusterCoordinator,
        model: keras.Model,
        num_workers: int,
    ) -> None:
        self._coordinator = coordinator
        self._model = model
        self._num_workers = num_workers
        names = set(metric_results(model, zero_state(model)))
        self._step = SharedStep(model=model, metric_names=names)
        self._feeds: collections.OrderedDict[int, _Feed] = collections.OrderedDict()
        self._num_scheduled = 0

    def start(self) -> None:
        """Goes on counting where the model stands: random streams and accumulation follow the step's number."""
        if self._model.optimizer is not None:
            self._num_scheduled = int(keras_internals.batch_counter(self._model.optimizer).numpy())

    def train_epoch(self, source: Source, plan: BatchPlan) -> Iterator[FinishedStep]:
        """Trains over the plan's steps, yielding once a finished step, with the logs where `plan.wants_logs`."""
        self._state = plan.metrics or zero_state(self._model)
        extra: dict[str, Any] = {}
        results = self._results("train", source, plan)
        for step, ((part, extra), is_boundary) in enumerate(results, start=plan.first_step):
            self._state = add_states(self._state, part)
            logs = self._logs("train", self._state, extra) if plan.wants_logs(step) else None
            yield FinishedStep(step=step, logs=logs, is_boundary=is_boundary)
        self.epoch_logs = self._logs("train", self._state, extra)

    def snapshot_metrics(self) -> list[Any]:
        """Returns the metrics' state so far."""
        return self._state

    def broadcast(self, content: bytes) -> bytes:
        """Returns the bytes: only the chief runs the program."""
        return content

    def vote(self, values: list[float]) -> list[float]:
        """Returns the values: only the chief runs the program."""
        return values

    def evaluate(self, source: Source, plan: BatchPlan) -> dict[str, Any]:
        """Returns the metrics over the plan's steps."""
        state = zero_state(self._model)
        last: dict[str, Any] = {}
        for (part, extra), _ in self._results("test", source, plan):
            state, last = add_states(state, part), extra
        return self._logs("test", state, last)

    def predict(self, source: Source, plan: BatchPlan) -> Any:
        """Returns the outputs as arrays in the data's order."""
        batches = [outputs for outputs, _ in self._results("predict", source, plan)]
        return tf.nest.map_structure(lambda *parts: np.concatenate(parts), *batches)

    def _logs(self, kind: str, state: list[Any], extra: dict[str, Any]) -> dict[str, Any]:
        return select_logs(metric_results(self._model, state), self._step.returned.get(kind), extra)

    def _results(self, kind: str, source: Source, plan: BatchPlan) -> Iterator[tuple[Any, bool]]:
        """Schedules every batch once, and yields the results in order and whether they end at a boundary."""
        pending: collections.deque[Any] = collections.deque()
        step = plan.first_step
        for function, args, size in self._calls(kind, source, plan):
            pending.append(self._coordinator.schedule(function, args=args))
            is_boundary = kind == "train" and any([plan.is_boundary(step + i) for i in range(size)])
            step += size
            room = 0 if is_boundary else _WINDOW_PER_WORKER * self._num_workers - 1
            while len(pending) > room:
                results = self._fetch(pending.popleft())
                for i, result in enumerate(results):
                    yield result, is_boundary and not pending and i == len(results) - 1
        while pending:
            for result in self._fetch(pending.popleft()):
                yield result, False

    def _fetch(self, value: Any) -> Any:
        while True:
            try:
                return self._coordinator.fetch(value)
            except tf.errors.OpError:
                # The worker may have died while its result was on the way: then TensorFlow runs the step elsewhere, and
                # the result will come. An error of the step itself is the coordinator's too: raised here.
                self._coordinator.done()
                time.sleep(_RETRY_SECS)

    def _calls(
        self, kind: str, source: Source, plan: BatchPlan
    ) -> Iterator[tuple[Any, tuple[Any, ...], int]]:
        feed = self._feed(source)
        batches = feed.batches(plan)
        while True:
            period = self._step.accumulation_steps if kind == "train" else 1
            phase = self._num_scheduled % period
            group = list(itertools.islice(batches, period - phase))
            if not group:
                return
            sizes, addresses = zip(*group, strict=True)
            key = (kind, sizes, phase, plan.shuffle, plan.seed)
            if key not in feed.functions:
                reads = [feed.read(size, plan) for size in sizes]
                feed.functions[key] = self._build_function(kind, reads, phase)
            yield feed.functions[key], (addresses, tf.constant(self._num_scheduled, tf.int64)), len(group)
            if kind == "train":
                self._num_scheduled += len(group)

    def _build_function(self, kind: str, reads: Sequence[Callable[..., Any]], phase: int) -> Any:
        def closure(addresses: Any, step: Any) -> Any:
            batches = [read(*address) for read, address in zip(reads, addresses, strict=True)]
            if kind == "predict":
                return [self._step.predict(batch) for batch in batches]
            if kind == "test":
                return self._step.test(batches, step)
            return self._step.train(batches, step, phase=phase)

        return tf.function(closure, autograph=False)

    def _feed(self, source: Source) -> _Feed:
        feed = self._feeds.pop(id(source), None)
        if feed is None:
            feed = self._new_feed(source)
        # The latest last; a feed holds its source, so that an id stands for one source only.
        self._feeds[id(source)] = feed
        while len(self._feeds) > _MAX_FEEDS:
            self._feeds.popitem(last=False)
        return feed

    def _new_feed(self, source: Source) -> _Feed:
        if isinstance(source, ArraySource):
            return _ResidentFeed(source, self._coordinator)
        if isinstance(source, SelfShardedSource):
            return _OwnFeed(source, self._coordinator, self._num_workers)
        return _SentFeed(source)


class _ResidentFeed:
    """Arrays held whole by every worker; a batch is addressed by (epoch, start)."""

    def __init__(
        self, source: ArraySource, coordinator: tf.distribute.coordinator.ClusterCoordinator
    ) -> None:
        self._source = source
        self.functions: dict[Any, Any] = {}
        tensors = source.tensors
        dataset = coordinator.create_per_worker_dataset(
            lambda: tf.data.Dataset.from_tensors(tensors).repeat()
        )
        self._iterator = iter(dataset)

    def batches(self, plan: BatchPlan) -> Iterator[tuple[int, tuple[Any, ...]]]:
        size = plan.global_batch_size
        num_examples = self._source.num_examples
        for step in range(plan.first_step, plan.num_steps or 0):
            here = step_size(step=step, num_examples=num_examples, global_batch_size=size)
            start = step_start(step=step, num_examples=num_examples, global_batch_size=size)
            address = tf.constant([plan.epoch, start], tf.int64)
            yield here, (self._iterator, address)

    def read(self, size: int | None, plan: BatchPlan) -> Callable[..., Any]:
        num_examples = self._source.num_examples

        def read(iterator: Any, address: tf.Tensor) -> Any:
            indices = epoch_indices(
                num_examples=num_examples,
                seed=plan.seed,
                epoch=address[0],
                start=address[1],
                size=size,
                shuffle=plan.shuffle,
            )
            return take(next(iterator), indices)

        return read


class _SentFeed:
    """A stream that the chief reads once and sends, batch by batch, to the workers."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.functions: dict[Any, Any] = {}

    def batches(self, plan: BatchPlan) -> Iterator[tuple[int | None, tuple[Any, ...]]]:
        for segment in local_batches(
            self._source,
            epoch=plan.epoch,
            seed=plan.seed,
            shuffle=plan.shuffle,
            global_batch_size=plan.global_batch_size,
            num_replicas=1,
            replica_ids=[0],
            first_step=plan.first_step,
            num_steps=plan.num_steps,
        ):
            for parts, _ in segment.dataset:
                yield None, (parts[0],)

    def read(self, size: int | None, plan: BatchPlan) -> Callable[..., Any]:
        del size, plan
        return lambda batch: batch


class _OwnFeed:
    """A pipeline that shards itself: each worker reads its own part, one batch a step."""

    def __init__(
        self,
        source: SelfShardedSource,
        coordinator: tf.distribute.coordinator.ClusterCoordinator,
        num_workers: int,
    ) -> None:
        self._source = source
        self._num_workers = num_workers
        self.functions: dict[Any, Any] = {}
        with coordinator.strategy.scope():
            self._num_started = tf.Variable(0, dtype=tf.int32, trainable=False)
        self._iterator = iter(coordinator.create_per_worker_dataset(self._open))

    def _open(self) -> tf.data.Dataset:
        """Runs on each worker: the order in which they come says which part each of them reads."""
        part = self._num_started.assign_add(1, read_value=True) - 1
        parts = [self._source.local_dataset(self._context(i)) for i in range(self._num_workers)]
        variants = [lambda p=p: tf.data.experimental.to_variant(p) for p in parts]
        chosen = tf.switch_case(part % self._num_workers, variants)
        return tf.data.experimental.from_variant(chosen, parts[0].element_spec)

    def _context(self, index: int) -> tf.distribute.InputContext:
        return tf.distribute.InputContext(
            num_input_pipelines=self._num_workers, input_pipeline_id=index, num_replicas_in_sync=1
        )

    def batches(self, plan: BatchPlan) -> Iterator[tuple[int | None, tuple[Any, ...]]]:
        if plan.num_steps is None:
            raise ConfigError(
                "a pipeline that shards itself has no known length under ps; pass steps_per_epoch "
                "(or validation_steps), and let the dataset repeat."
            )
        for _ in range(plan.first_step, plan.num_steps):
            yield None, (self._iterator,)

    def read(self, size: int | None, plan: BatchPlan) -> Callable[..., Any]:
        del size, plan
        return lambda iterator: next(iterator)


_Feed = _ResidentFeed | _SentFeed | _OwnFeed
