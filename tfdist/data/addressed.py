"""Batches of data any example of which can be read at once: step 17 is read without the sixteen before it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tfdist.data.indexed import IndexedSource
from tfdist.data.order import examples_at, num_steps, part_slice, step_size, step_start
from tfdist.data.segment import Segment, Share
from tfdist.data.source import ArraySource, take

_BYTES_AT_ONCE, _MAX_STEPS_AT_ONCE = 2**20, 32
# Fewer where an example may take its time: the first step waits for all of them.
_MAX_OBJECT_STEPS_AT_ONCE = 8


def addressed_batches(source: ArraySource | IndexedSource, share: Share) -> list[Segment]:
    """Returns a process's share of an epoch: for each pass its full batches, and its short last one."""
    count, batch = source.num_examples, share.global_batch_size
    shape: Any = {
        "num_examples": count,
        "global_batch_size": batch,
        "drop_remainder": share.drop_remainder,
    }
    order = {"num_examples": count, "seed": share.seed, "epoch": share.epoch, "shuffle": share.shuffle}
    per_pass = num_steps(**shape)
    last = per_pass if share.num_steps is None else share.num_steps
    if isinstance(source, IndexedSource):
        source.check_length()
    segments = []
    step = share.first_step
    while step < last:
        size = step_size(step=step, **shape)
        end = step + 1 if size < batch else min(last, (step // per_pass) * per_pass + max(count // batch, 1))
        slices = [part_slice(size, k, share.num_replicas) for k in share.replica_ids]
        start = step_start(step=step, **shape)
        build = functools.partial(
            _read_all, source, order, start, end - step, size, batch, slices, share.num_replicas > 1
        )
        segments.append(Segment(build=build, num_steps=end - step))
        step = end
    return segments


def _read_all(
    source: ArraySource | IndexedSource,
    order: dict[str, Any],
    start: int,
    steps: int,
    size: int,
    batch: int,
    slices: Sequence[tuple[int, int]],
    is_divided: bool,
) -> tf.data.Dataset:
    """Reads several small batches at once: a call of the function costs more than what it reads."""
    most, num_parallel = _MAX_STEPS_AT_ONCE, tf.data.AUTOTUNE
    if isinstance(source, IndexedSource):
        most, num_parallel = _MAX_OBJECT_STEPS_AT_ONCE, source.num_parallel_reads
    at_once = max(1, min(most, steps, _BYTES_AT_ONCE // max(1, _example_bytes(source) * size)))
    if any(low == high for low, high in slices):
        at_once = 1  # `unbatch` crashes on tensors without elements
    numbers = {"start": start, "steps": steps, "batch": batch, "at_once": at_once, **order}
    shuffle = numbers.pop("shuffle")
    # As tensors, so that epochs and segments share one function: to trace it takes longer than to read an epoch.
    fixed = {name: tf.constant(value, tf.int64) for name, value in numbers.items()}
    bounds = tf.constant(slices, tf.int64)
    if isinstance(source, IndexedSource):
        read_rows = _build_reader(source.take, len(slices), shuffle)
        data: Any = ()
    else:
        data = source.tensors
        specs = tf.nest.map_structure(lambda t: tf.TensorSpec([None, *t.shape[1:]], t.dtype), data)
        read_rows = _array_reader(repr(specs), len(slices), shuffle)

    def read(first: Any) -> Any:
        several = tuple(
            tf.nest.map_structure(functools.partial(_with_size, high - low if is_divided else None), part)
            for (low, high), part in zip(slices, read_rows(data, first, bounds, **fixed), strict=True)
        )
        if at_once == 1:
            return tf.nest.map_structure(lambda t: t[0], several), tf.constant(size)
        return several, tf.fill([tf.shape(tf.nest.flatten(several)[0])[0]], size)

    dataset = tf.data.Dataset.range(0, steps, at_once)
    dataset = dataset.map(read, num_parallel_calls=num_parallel, deterministic=True)
    return (dataset.unbatch() if at_once > 1 else dataset).prefetch(tf.data.AUTOTUNE)


@functools.lru_cache(maxsize=32)
def _array_reader(specs: str, num_parts: int, shuffle: bool) -> Any:
    """Returns one function for all arrays of these specs."""
    del specs
    return tf.function(_build_reader(None, num_parts, shuffle), autograph=False)


def forget_readers() -> None:
    """Forgets what was traced; to be called where TensorFlow forgets all functions, as in another cluster."""
    _array_reader.cache_clear()


def _build_reader(take_own: Any, num_parts: int, shuffle: bool) -> Any:
    """Returns a function that reads the batches of several steps: for each part a nest of `[steps, length, …]`."""

    def read(
        data: Any, first: Any, bounds: Any, *, start: Any, steps: Any, batch: Any, at_once: Any, **order: Any
    ) -> Any:
        starts = start + (first + tf.range(tf.minimum(at_once, steps - first))) * batch
        parts = []
        for low, high in (tf.unstack(bounds[part]) for part in range(num_parts)):
            positions = starts[:, None] + tf.range(low, high)[None]
            places = examples_at(tf.reshape(positions, [-1]), shuffle=shuffle, **order)
            rows = take(data, places) if take_own is None else take_own(places)
            shape = tf.shape(positions)
            parts.append(
                tf.nest.map_structure(
                    lambda t, s=shape: tf.reshape(t, tf.concat([s, tf.shape(t)[1:]], 0)), rows
                )
            )
        return tuple(parts)

    return read


def _with_size(size: int | None, tensor: tf.Tensor) -> tf.Tensor:
    """Says how long a part is, which replicas weigh their means by; None forgets it.

    As in Keras, a whole batch and the short one at the end then share a step's graph.
    """
    shape = [None, size, *tensor.shape[2:]]
    if size is None:
        return tf.raw_ops.PlaceholderWithDefault(input=tensor, shape=shape)
    return tf.ensure_shape(tensor, shape)


def _example_bytes(source: ArraySource | IndexedSource) -> int:
    if isinstance(source, IndexedSource):
        specs = [(spec.shape, spec.dtype) for spec in tf.nest.flatten(source.spec)]
    else:
        specs = [(tensor.shape[1:], tensor.dtype) for tensor in tf.nest.flatten(source.tensors)]
    return sum((shape.num_elements() or 1) * max(dtype.size, 1) for shape, dtype in specs)
