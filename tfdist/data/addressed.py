"""Batches of data any example of which can be read at once: step 17 is read without the sixteen before it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tfdist.data.indexed import IndexedSource
from tfdist.data.order import examples_at, num_steps, part_slice, step_size, step_start
from tfdist.data.segment import Segment, Share
from tfdist.data.source import ArraySource

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
        build = functools.partial(_read_all, source, order, start, end - step, size, batch, slices)
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
) -> tf.data.Dataset:
    """Reads several small batches at once: a call of the function costs more than what it reads."""
    most, num_parallel = _MAX_STEPS_AT_ONCE, tf.data.AUTOTUNE
    if isinstance(source, IndexedSource):
        most, num_parallel = _MAX_OBJECT_STEPS_AT_ONCE, source.num_parallel_reads
    at_once = max(1, min(most, _BYTES_AT_ONCE // max(1, _example_bytes(source) * size)))
    if any(low == high for low, high in slices):
        at_once = 1  # `unbatch` crashes on tensors without elements

    def read(first: Any) -> Any:
        here = tf.minimum(tf.constant(at_once, tf.int64), steps - first)
        starts = start + (first + tf.range(here)) * batch
        parts = tuple(_read_part(source, order, starts, low, high) for low, high in slices)
        several = parts, tf.fill([here], size)
        return several if at_once > 1 else tf.nest.map_structure(lambda t: t[0], several)

    dataset = tf.data.Dataset.range(0, steps, at_once)
    dataset = dataset.map(read, num_parallel_calls=num_parallel, deterministic=True)
    return (dataset.unbatch() if at_once > 1 else dataset).prefetch(tf.data.AUTOTUNE)


def _read_part(
    source: ArraySource | IndexedSource, order: dict[str, Any], starts: tf.Tensor, low: int, high: int
) -> Any:
    """Returns `[steps, high - low, …]`: of the batches that begin at `starts` the examples from `low` to `high`."""
    positions = starts[:, None] + tf.range(low, high, dtype=tf.int64)[None]
    rows = source.take(examples_at(tf.reshape(positions, [-1]), **order))

    def divide(tensor: tf.Tensor) -> tf.Tensor:
        divided = tf.reshape(tensor, tf.concat([tf.shape(positions), tf.shape(tensor)[1:]], 0))
        return tf.ensure_shape(divided, [None, high - low, *tensor.shape[1:]])

    return tf.nest.map_structure(divide, rows)


def _example_bytes(source: ArraySource | IndexedSource) -> int:
    if isinstance(source, IndexedSource):
        specs = [(spec.shape, spec.dtype) for spec in tf.nest.flatten(source.spec)]
    else:
        specs = [(tensor.shape[1:], tensor.dtype) for tensor in tf.nest.flatten(source.tensors)]
    return sum((shape.num_elements() or 1) * max(dtype.size, 1) for shape, dtype in specs)
