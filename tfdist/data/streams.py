"""Batches of examples that come one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfdist.data.segment import Segment, Share
from tfdist.data.sources.batched import BatchedSource
from tfdist.data.sources.source import SelfShardedSource, ServedSource, ShardedSource, StreamSource
from tfdist.errors import ConfigError

_SHUFFLE_BUFFER = 10_000


def streamed_batches(source: StreamSource, share: Share) -> Segment:
    """Returns batches of the whole stream, of which each process takes its parts."""
    buffer = max(min(source.num_examples or _SHUFFLE_BUFFER, _SHUFFLE_BUFFER), 1) if share.shuffle else 0

    def build() -> tf.data.Dataset:
        dataset = source.dataset
        if buffer:
            dataset = dataset.shuffle(buffer, seed=share.shuffle_seed())
        dataset = dataset.batch(share.global_batch_size, drop_remainder=share.drop_remainder)
        return _alike_everywhere(_as_far_as_asked(dataset, share)).prefetch(tf.data.AUTOTUNE)

    # Split in the step, not here: where the pipeline stands is then the same for all workers.
    return _segment(build, source, share, split=share.split, num_buffered=buffer)


def made_batches(source: BatchedSource, share: Share) -> Segment:
    """Returns batches as they come, of which each process takes its parts."""

    def build() -> tf.data.Dataset:
        dataset = source.dataset
        if share.shuffle and source.reorder is not None:
            dataset = source.reorder(share.shuffle_seed())
        return _alike_everywhere(_as_far_as_asked(dataset, share)).prefetch(tf.data.AUTOTUNE)

    return _segment(build, source, share, split=share.split)


def sharded_batches(source: ShardedSource, share: Share) -> Segment:
    """Returns batches of this process's own part of a stream, with each whether there is another."""

    def build() -> tf.data.Dataset:
        dataset = source.dataset
        if share.shuffle:
            dataset = dataset.shuffle(_SHUFFLE_BUFFER, seed=share.shuffle_seed(share.replica_ids[0]))
        dataset = dataset.batch(share.own_batch_size, drop_remainder=share.drop_remainder)
        return _with_has_more(dataset).prefetch(tf.data.AUTOTUNE)

    return _segment(build, source, share, split=share.split_own)


def served_batches(source: ServedSource, share: Share) -> Segment:
    """Returns batches of what a tf.data service hands this process, several readers' as `sharded_batches` does."""
    is_sole = source.num_readers == 1

    def build() -> tf.data.Dataset:
        dataset = source.stream.dataset
        if share.shuffle:
            # There and not here, where a worker would fill its buffer with what the others shall have.
            dataset = dataset.shuffle(_SHUFFLE_BUFFER, seed=share.shuffle_seed())
        # Workers' batches may differ in size, while what is served is one for all; and those who prepare it end
        # with a short batch each, in the middle of the epoch.
        dataset = source.serve(dataset.batch(max(1, share.global_batch_size // source.num_readers)))
        dataset = dataset.rebatch(share.own_batch_size, drop_remainder=share.drop_remainder)
        if not is_sole:
            dataset = _with_has_more(dataset)
        # No more: what one worker holds another lacks at the epoch's end.
        return dataset.prefetch(1)

    return _segment(build, source, share, split=share.split if is_sole else share.split_own)


def self_sharded_batches(source: SelfShardedSource, share: Share) -> Segment:
    """Returns the batches that a pipeline makes for this process's replicas itself.

    Raises:
        ConfigError: If nothing says where all replicas end.
    """
    if share.num_steps is None and share.num_replicas > 1:
        raise ConfigError(
            "a pipeline that shards itself ends at its own step on each worker; pass steps_per_epoch "
            "(or steps), and let the dataset repeat."
        )
    num_local = len(share.replica_ids)
    context = tf.distribute.InputContext(
        num_input_pipelines=share.num_replicas // num_local,
        input_pipeline_id=share.replica_ids[0] // num_local,
        num_replicas_in_sync=share.num_replicas,
    )

    def build() -> tf.data.Dataset:
        dataset = source.local_dataset(context)
        rows = tf.data.Dataset.zip(tuple(dataset.shard(num_local, i) for i in range(num_local)))
        return rows.map(lambda *parts: (parts, -1)).prefetch(tf.data.AUTOTUNE)

    return _segment(build, source, share)


def _segment(build: Callable[[], tf.data.Dataset], source: Any, share: Share, **more: Any) -> Segment:
    """Returns what is asked of a pass, with the rest of which an epoch that follows goes on."""
    if share.num_steps is not None:
        order = (share.lap, share.seed, share.shuffle, share.global_batch_size, share.drop_remainder)
        stop = None if share.num_epochs_after else share.num_steps
        more |= {"run": (source, order), "start": share.first_step, "stop": stop}
    return Segment(build=build, num_steps=share.num_left, num_skipped=share.first_step, **more)


def _as_far_as_asked(dataset: tf.data.Dataset, share: Share) -> tf.data.Dataset:
    """Reads no further ahead than somebody may ask for.

    The number is no part of what a saved place must fit, the operation is: another epoch's pipeline has it, too.
    """
    if share.num_steps is None:
        return dataset
    return dataset.take(share.num_steps * (1 + share.num_epochs_after))


def _alike_everywhere(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Each worker reads the whole stream and must see the same one."""
    options = tf.data.Options()
    options.deterministic = True
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return dataset.with_options(options)


def _with_has_more(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Returns batches one step behind, so that with each comes whether there is another; then empty ones for ever."""
    empty = tf.nest.map_structure(
        lambda spec: tf.zeros([0, *(d or 0 for d in spec.shape[1:])], spec.dtype), dataset.element_spec
    )
    # A function of a dataset gets the parts of a tuple one by one, and anything else whole.
    is_tuple = isinstance(dataset.element_spec, tuple)
    dataset = dataset.map(lambda *b: (b if is_tuple else b[0], True)).concatenate(
        tf.data.Dataset.from_tensors((empty, False)).repeat()
    )
    return dataset.scan(empty, lambda before, element: (element[0], (before, element[1])))
