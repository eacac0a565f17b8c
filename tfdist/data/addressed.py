"""Batches of data any example of which can be read at once: step 17 is read without the sixteen before it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import tensorflow as tf

from tfdist.data.iterators import untuned
from tfdist.data.operations import apply_operation
from tfdist.data.order import examples_at, num_steps, part_slice
from tfdist.data.segment import Segment, Share
from tfdist.data.sources.indexed import IndexedSource
from tfdist.data.sources.source import ArraySource, take

_BYTES_AT_ONCE, _MAX_STEPS_AT_ONCE = 2**20, 32
# Fewer where an example may take its time: the first step waits for all of them.
_MAX_OBJECT_STEPS_AT_ONCE = 8
_NUM_PARALLEL_READS = 2
# Batches that wait for their step.
_NUM_READ_AHEAD = 4


def addressed_batches(source: ArraySource | IndexedSource, share: Share) -> list[Segment]:
    """Returns a process's share of an epoch: its full batches, and the short one at the pass's end."""
    count, batch = source.num_examples, share.global_batch_size
    per_pass = num_steps(num_examples=count, global_batch_size=batch, drop_remainder=share.drop_remainder)
    whole, rest = divmod(count, batch)
    last = per_pass if share.num_steps is None else min(share.num_steps, per_pass)
    if isinstance(source, IndexedSource):
        source.check_length()
    sizes = {batch: whole, rest: per_pass - whole}
    never_empty = min(size for size, number in sizes.items() if number) >= share.num_replicas
    segments = []
    for size, offset, first, end in (
        (batch, 0, share.first_step, min(last, whole)),
        (rest, whole, max(share.first_step, whole), last),
    ):
        if first >= end:
            continue
        run = _Run(
            source=source,
            seed=share.seed,
            shuffle=share.shuffle,
            offset=offset * batch,
            every=sizes[size],
            batch=batch,
            size=size,
            slices=tuple(part_slice(size, k, share.num_replicas) for k in share.replica_ids),
            # What of a batch may be empty is known where the sizes are: a step without examples is another one.
            is_sized=share.num_replicas > 1 and (share.fixed_sizes or not never_empty),
        )
        before = share.lap * run.every
        start, stop = before + first - offset, before + end - offset
        if share.num_epochs_after:
            stop = before + (1 + share.num_epochs_after) * run.every
        segments.append(
            Segment(
                build=functools.partial(run.read, start, stop),
                num_steps=end - first,
                never_empty=never_empty,
                is_short=size < batch and whole > 0,
                run=run,
                start=start,
                stop=stop,
            )
        )
    return segments


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """Batches of one size in their order, pass after pass, numbered from the first pass's first.

    Attributes:
        source: The examples.
        seed: Of the order.
        shuffle: False keeps the data's own.
        offset: Where in a pass the first of them starts.
        every: How many a pass has.
        batch: Examples from the start of one to that of the next.
        size: Examples of each.
        slices: Which of these this process's replicas take.
        is_sized: Whether their lengths are static.
    """

    source: ArraySource | IndexedSource
    seed: int
    shuffle: bool
    offset: int
    every: int
    batch: int
    size: int
    slices: tuple[tuple[int, int], ...]
    is_sized: bool

    def read(self, start: int, stop: int) -> tf.data.Dataset:
        """Reads several small batches at once: a call of the function costs more than what it reads."""
        source, most, num_parallel = self.source, _MAX_STEPS_AT_ONCE, _NUM_PARALLEL_READS
        if isinstance(source, IndexedSource):
            most, num_parallel = _MAX_OBJECT_STEPS_AT_ONCE, source.num_parallel_reads
        at_once = max(1, min(most, self.every, _BYTES_AT_ONCE // max(1, _example_bytes(source) * self.size)))
        if any(low == high for low, high in self.slices):
            at_once = 1  # `unbatch` crashes on tensors without elements
        # As tensors, so that epochs and segments share one function: to trace it takes longer than to read an epoch.
        numbers = tf.constant(
            [
                at_once,
                stop,
                self.every,
                self.offset,
                self.batch,
                self.size,
                source.num_examples,
                self.seed,
                *(bound for low_high in self.slices for bound in low_high),
            ],
            tf.int64,
        )
        options = len(self.slices), self.shuffle, at_once > 1
        if isinstance(source, IndexedSource):
            reader, data = _build_reader(source.take, *options), ()
        else:
            data = source.tensors
            specs = tf.nest.map_structure(lambda t: tf.TensorSpec([None, *t.shape[1:]], t.dtype), data)
            reader = _array_reader(repr(specs), *options)

        def read(first: Any) -> Any:
            parts, sizes = reader(data, first, numbers)
            sized = tuple(
                tf.nest.map_structure(
                    functools.partial(_with_size, high - low if self.is_sized else None, at_once > 1), part
                )
                for (low, high), part in zip(self.slices, parts, strict=True)
            )
            return sized, sizes

        dataset = tf.data.Dataset.range(start, stop, at_once)
        read = tf.autograph.experimental.do_not_convert(read)
        dataset = dataset.map(read, num_parallel_calls=num_parallel, deterministic=True)
        return untuned((_unbatch(dataset) if at_once > 1 else dataset).prefetch(_NUM_READ_AHEAD))


@functools.lru_cache(maxsize=32)
def _array_reader(specs: str, num_parts: int, shuffle: bool, is_several: bool) -> Any:
    """Returns one function for all arrays of these specs."""
    del specs
    return tf.function(_build_reader(None, num_parts, shuffle, is_several), autograph=False)


def forget_readers() -> None:
    """Forgets what was traced; to be called where TensorFlow forgets all functions, as in another cluster."""
    _array_reader.cache_clear()


def _build_reader(take_own: Any, num_parts: int, shuffle: bool, is_several: bool) -> Any:
    """Returns a function that reads the batches of several steps, or of one.

    It returns for each part a nest of `[steps, length, …]`, or `[length, …]`, and the examples in each whole batch.
    """

    def read(data: Any, first: Any, numbers: Any) -> Any:
        at_once, stop, every, offset, batch, size, count, seed, *bounds = tf.unstack(
            numbers, 8 + 2 * num_parts
        )
        places = first + (
            tf.range(tf.minimum(at_once, stop - first)) if is_several else tf.zeros([1], tf.int64)
        )
        laps = places // every
        starts = offset + places % every * batch
        parts = []
        for low, high in zip(bounds[::2], bounds[1::2], strict=True):
            positions = starts[:, None] + tf.range(low, high)[None]
            wanted = examples_at(
                tf.reshape(positions, [-1]),
                num_examples=count,
                seed=seed,
                epoch=tf.reshape(tf.broadcast_to(laps[:, None], tf.shape(positions)), [-1]),
                shuffle=shuffle,
            )
            rows = take(data, wanted) if take_own is None else take_own(wanted)
            if is_several:
                shape = tf.shape(positions)
                rows = tf.nest.map_structure(
                    lambda t, s=shape: tf.reshape(t, tf.concat([s, tf.shape(t)[1:]], 0)), rows
                )
            parts.append(rows)
        sizes = tf.fill(tf.shape(places) if is_several else [], tf.cast(size, tf.int32))
        return tuple(parts), sizes

    return read


def _unbatch(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Does what `Dataset.unbatch` does, without its map of dense tensors to themselves, a fifth of the start."""
    spec = tf.nest.map_structure(lambda s: tf.TensorSpec(s.shape[1:], s.dtype), dataset.element_spec)
    return apply_operation(tf.raw_ops.UnbatchDataset, dataset, spec)


def _with_size(size: int | None, is_several: bool, tensor: tf.Tensor) -> tf.Tensor:
    """Says how long a part is; None forgets it.

    As in Keras, a whole batch and the short one at the end then share a step's graph.
    """
    shape = [None, size, *tensor.shape[2:]] if is_several else [size, *tensor.shape[1:]]
    if size is None:
        return tf.raw_ops.PlaceholderWithDefault(input=tensor, shape=shape)
    return tf.ensure_shape(tensor, shape)


def _example_bytes(source: ArraySource | IndexedSource) -> int:
    if isinstance(source, IndexedSource):
        specs = [(spec.shape, spec.dtype) for spec in tf.nest.flatten(source.spec)]
    else:
        specs = [(tensor.shape[1:], tensor.dtype) for tensor in tf.nest.flatten(source.tensors)]
    return sum((shape.num_elements() or 1) * max(dtype.size, 1) for shape, dtype in specs)
