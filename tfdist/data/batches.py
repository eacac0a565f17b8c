"""Examples → this process's parts of each global batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tfdist.data.order import epoch_indices, num_steps, part_slice, step_size, step_start
from tfdist.data.source import ArraySource, SelfShardedSource, Source, StreamSource, take
from tfdist.errors import ConfigError

_SHUFFLE_BUFFER = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """A run of batches of one shape.

    Attributes:
        dataset: Yields `(parts, global_size)`: one nest for each of this process's replicas, and the examples in
            the whole batch (int32 scalar; -1 where only the replicas together know).
        num_steps: Its length, None where only the data's end will tell.
    """

    dataset: tf.data.Dataset
    num_steps: int | None


def local_batches(
    source: Source,
    *,
    epoch: int,
    seed: int,
    shuffle: bool,
    global_batch_size: int,
    num_replicas: int,
    replica_ids: Sequence[int],
    first_step: int = 0,
    num_steps: int | None = None,
) -> list[Segment]:
    """Returns this process's share of an epoch.

    Every process must pass the same seed: the global batches are then the same on all, and replica k of R
    takes examples `k·n//R … (k+1)·n//R - 1` of the n in a batch.

    Args:
        source: The examples.
        epoch: Zero-based.
        seed: Of the order.
        shuffle: False keeps the data's own order.
        global_batch_size: Examples per step over all replicas.
        num_replicas: R.
        replica_ids: This process's k.
        first_step: Steps of the epoch to leave out at its start.
        num_steps: Where the epoch ends, counted from its start; None: with the data. Past the data's end
            another pass begins.

    Returns:
        Runs of batches with static shapes where the number of examples is known.
    """
    if isinstance(source, SelfShardedSource):
        return [_own(source, num_replicas, replica_ids, first_step, num_steps)]
    if isinstance(source, StreamSource):
        return [
            _streamed(
                source,
                epoch,
                seed,
                shuffle,
                global_batch_size,
                num_replicas,
                replica_ids,
                first_step,
                num_steps,
            )
        ]
    return _addressed(
        source, epoch, seed, shuffle, global_batch_size, num_replicas, replica_ids, first_step, num_steps
    )


def _addressed(
    source: ArraySource,
    epoch: int,
    seed: int,
    shuffle: bool,
    batch: int,
    num_replicas: int,
    replica_ids: Sequence[int],
    first_step: int,
    steps: int | None,
) -> list[Segment]:
    count = source.num_examples
    per_pass = num_steps(num_examples=count, global_batch_size=batch)
    last = per_pass if steps is None else steps
    segments = []
    step = first_step
    while step < last:
        size = step_size(step=step, num_examples=count, global_batch_size=batch)
        # A run: the full batches of a pass, or its short last one.
        end = step + 1 if size < batch else min(last, (step // per_pass) * per_pass + max(count // batch, 1))
        slices = [part_slice(size, k, num_replicas) for k in replica_ids]
        start = step_start(step=step, num_examples=count, global_batch_size=batch)

        def read(index: Any, start: int = start, size: int = size, slices: Any = tuple(slices)) -> Any:
            first = start + index * batch
            parts = tuple(
                take(
                    source.tensors,
                    epoch_indices(
                        num_examples=count,
                        seed=seed,
                        epoch=epoch,
                        start=first + low,
                        size=high - low,
                        shuffle=shuffle,
                    ),
                )
                for low, high in slices
            )
            return parts, tf.constant(size, tf.int32)

        dataset = tf.data.Dataset.range(end - step).map(
            read, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
        )
        segments.append(Segment(dataset=dataset.prefetch(tf.data.AUTOTUNE), num_steps=end - step))
        step = end
    return segments


def _streamed(
    source: StreamSource,
    epoch: int,
    seed: int,
    shuffle: bool,
    batch: int,
    num_replicas: int,
    replica_ids: Sequence[int],
    first_step: int,
    steps: int | None,
) -> Segment:
    dataset = source.dataset
    if shuffle:
        buffer = min(source.num_examples or _SHUFFLE_BUFFER, _SHUFFLE_BUFFER)
        dataset = dataset.shuffle(max(buffer, 1), seed=hash((seed, epoch)) % 2**31)
    dataset = dataset.batch(batch)
    if steps is not None:
        dataset = dataset.repeat().take(steps)
    dataset = dataset.skip(first_step)

    def split(*element: Any) -> Any:
        size = tf.shape(tf.nest.flatten(element)[0])[0]
        slices = [part_slice(size, k, num_replicas) for k in replica_ids]
        parts = tuple(
            tf.nest.map_structure(lambda t, low=low, high=high: t[low:high], element) for low, high in slices
        )
        return parts, size

    options = tf.data.Options()
    # Each worker reads the whole stream and must see the same one.
    options.deterministic = True
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    dataset = dataset.map(split, num_parallel_calls=tf.data.AUTOTUNE).with_options(options)
    left = None if steps is None else steps - first_step
    return Segment(dataset=dataset.prefetch(tf.data.AUTOTUNE), num_steps=left)


def _own(
    source: SelfShardedSource,
    num_replicas: int,
    replica_ids: Sequence[int],
    first_step: int,
    steps: int | None,
) -> Segment:
    if steps is None and num_replicas > 1:
        raise ConfigError(
            "a pipeline that shards itself ends at its own step on each worker; pass steps_per_epoch "
            "(or steps), and let the dataset repeat."
        )
    num_local = len(replica_ids)
    context = tf.distribute.InputContext(
        num_input_pipelines=num_replicas // num_local,
        input_pipeline_id=replica_ids[0] // num_local,
        num_replicas_in_sync=num_replicas,
    )
    dataset = source.local_dataset(context)
    rows = tf.data.Dataset.zip(tuple(dataset.shard(num_local, i) for i in range(num_local))).skip(first_step)
    return Segment(
        dataset=rows.map(lambda *parts: (tuple(_as_tuple(p) for p in parts), -1)).prefetch(tf.data.AUTOTUNE),
        num_steps=None if steps is None else steps - first_step,
    )


def _as_tuple(part: Any) -> Any:
    return part if isinstance(part, tuple) else (part,)
