"""How the chief addresses a batch, and how a worker reads it: for each kind of source one feed."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from tfdist.data.batches import local_batches
from tfdist.data.iterators import untuned
from tfdist.data.order import epoch_indices, part_slice
from tfdist.data.sources.source import ArraySource, SelfShardedSource, Source, take
from tfdist.errors import ConfigError
from tfdist.training.input_position import InputPosition
from tfdist.training.monitoring.input_wait import next_element
from tfdist.training.plan import BatchPlan
from tfdist.training.ps.message import pack_batches, unpack_batch

# Data sets whose examples the workers keep at once.
_MAX_FEEDS = 4


class Part(NamedTuple):
    """A batch, or one worker's part of it, as the chief hands it out.

    Attributes:
        size: Examples; None where only the worker knows.
        address: What the worker needs to read it, as its feed packs it.
    """

    size: int | None
    address: Any


class ResidentInput:
    """Arrays held whole by every worker; a batch is addressed by (epoch, start)."""

    def __init__(
        self, source: ArraySource, coordinator: tf.distribute.coordinator.ClusterCoordinator
    ) -> None:
        self._source = source
        self.closures: dict[Any, Any] = {}
        tensors = source.tensors
        dataset = coordinator.create_per_worker_dataset(
            lambda: untuned(tf.data.Dataset.from_tensors(tensors).repeat())
        )
        self._iterator = iter(dataset)

    def batches(self, plan: BatchPlan, num_parts: int = 1) -> Iterator[list[Part]]:
        """Yields the parts of every batch, empty ones left out."""
        for step in range(plan.first_in_pass, plan.end_in_pass or 0):
            start = step * plan.global_batch_size
            size = min(plan.global_batch_size, self._source.num_examples - start)
            slices = [part_slice(size, k, num_parts) for k in range(num_parts)]
            yield [Part(high - low, (plan.place.lap, start + low)) for low, high in slices if high > low]

    def pack(self, parts: Sequence[Part]) -> Any:
        """Returns what a closure that reads some parts is called with."""
        return self._iterator, tf.constant([part.address for part in parts], tf.int64)

    def read(self, size: int | None, plan: BatchPlan) -> Callable[[Any, int], Any]:
        """Returns what reads a part on the worker, as a function of what was packed and of its place there."""
        num_examples = self._source.num_examples

        def read(packed: Any, place: int) -> Any:
            iterator, addresses = packed
            indices = epoch_indices(
                num_examples=num_examples,
                seed=plan.seed,
                epoch=addresses[place, 0],
                start=addresses[place, 1],
                size=size,
                shuffle=plan.shuffle,
            )
            return take(next_element(iterator), indices)

        return read


class SentInput:
    """A stream that the chief reads once and sends, batch by batch, to the workers."""

    def __init__(self, source: Source, position: InputPosition) -> None:
        self._source = source
        self._position = position
        self.closures: dict[Any, Any] = {}

    def batches(self, plan: BatchPlan, num_parts: int = 1) -> Iterator[list[Part]]:
        """Yields the parts of every batch, empty ones left out."""
        for segment in local_batches(self._source, plan.share(num_parts, range(num_parts))):
            iterator = self._position.open(segment, self._source, plan)
            for element in itertools.islice(iterator, segment.num_steps):
                sizes = [(tf.nest.flatten(part)[0].shape[0], part) for part in segment.split(element)[0]]
                yield [Part(size, part) for size, part in sizes if size]
            self._position.keep(segment, iterator)

    def pack(self, parts: Sequence[Part]) -> Any:
        """Returns what a closure that reads some parts is called with."""
        return pack_batches([part.address for part in parts])

    def read(self, size: int | None, plan: BatchPlan) -> Callable[[Any, int], Any]:
        """Returns what reads a part on the worker, as a function of what was packed and of its place there."""
        del size, plan
        return unpack_batch


class OwnInput:
    """A pipeline that shards itself: each worker reads its own part, one batch a step."""

    def __init__(
        self,
        source: SelfShardedSource,
        coordinator: tf.distribute.coordinator.ClusterCoordinator,
        num_workers: int,
    ) -> None:
        self._source = source
        self._num_workers = num_workers
        self.closures: dict[Any, Any] = {}
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

    def batches(self, plan: BatchPlan, num_parts: int = 1) -> Iterator[list[Part]]:
        """Yields one part a step: each worker reads whole batches of its own."""
        if num_parts > 1:
            raise ConfigError(
                "a pipeline that shards itself with ps_mode='sync': the workers must know how a batch is divided; "
                "pass a dataset of examples, or choose ps_mode='async' or strategy='multiworker'."
            )
        if plan.num_steps is None:
            raise ConfigError(
                "a pipeline that shards itself has no known length under ps; pass steps_per_epoch "
                "(or validation_steps), and let the dataset repeat."
            )
        for _ in range(plan.first_step, plan.num_steps):
            yield [Part(None, ())]

    def pack(self, parts: Sequence[Part]) -> Any:
        """Returns what a closure that reads some parts is called with."""
        del parts
        return self._iterator

    def read(self, size: int | None, plan: BatchPlan) -> Callable[[Any, int], Any]:
        """Returns what reads a part on the worker, as a function of what was packed and of its place there."""
        del size, plan
        return lambda iterator, place: next_element(iterator)


WorkerInput = ResidentInput | SentInput | OwnInput


def keep_feeds(
    coordinator: tf.distribute.coordinator.ClusterCoordinator, num_workers: int, position: InputPosition
) -> Callable[[Source], WorkerInput]:
    """Returns what gives a source's feed; kept are those of training, of validation, and one or two more."""

    @functools.lru_cache(_MAX_FEEDS)
    def find(source: Source) -> WorkerInput:
        if isinstance(source, ArraySource):
            return ResidentInput(source, coordinator)
        if isinstance(source, SelfShardedSource):
            return OwnInput(source, coordinator, num_workers)
        return SentInput(source, position)

    return find
