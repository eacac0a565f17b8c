"""How workers share a stream: each reads its own files, or its own examples, or the whole of it."""

from __future__ import annotations

import tensorflow as tf

from tfdist.config.run_config import SHARDS
from tfdist.data.operations import apply_operation
from tfdist.data.sources.source import ShardedSource, Source, StreamSource
from tfdist.errors import ConfigError

_FILE_POLICY = int(tf.data.experimental.AutoShardPolicy.FILE.value)


def shard_source(source: Source, shard: str, *, num_workers: int, index: int) -> Source:
    """Takes a worker's part of a stream.

    Args:
        source: Anything but a stream is returned as it is: workers read no more than their part of it anyway.
        shard: One of `SHARDS`. "auto" is "file" for a TFDS split of enough files, else "off".
        num_workers: Those who share it.
        index: This worker's place, 0..num_workers - 1.

    Returns:
        The part, or with "off" or a single worker the source.

    Raises:
        ConfigError: If `shard` is unknown, or a stream has fewer files than workers.
    """
    if shard not in SHARDS:
        raise ConfigError(f"shard={shard!r}: choose one of {', '.join(SHARDS)}.")
    if not isinstance(source, StreamSource) or num_workers == 1:
        return source
    if shard == "auto":
        shard = "file" if (source.num_files or 0) >= num_workers else "off"
    if shard == "off":
        return source
    if shard == "data":
        return ShardedSource(dataset=source.dataset.shard(num_workers, index), stream=source)
    _check_files(source.dataset, num_workers)
    return ShardedSource(dataset=_own_files(source.dataset, num_workers, index), stream=source)


def _own_files(dataset: tf.data.Dataset, num_workers: int, index: int) -> tf.data.Dataset:
    return apply_operation(
        tf.raw_ops.AutoShardDataset,
        dataset,
        dataset.element_spec,
        num_workers=num_workers,
        index=index,
        auto_shard_policy=_FILE_POLICY,
        num_replicas=num_workers,
    )


def _check_files(dataset: tf.data.Dataset, num_workers: int) -> None:
    """Makes sure that each worker has a file; all workers look at the same part, and so find the same."""
    try:
        if _has_files_for(dataset, num_workers):
            return
    except tf.errors.NotFoundError:
        raise ConfigError(
            "shard='file' needs a tf.data.Dataset that reads files, and this one reads none; take shard='data' "
            "(--shard=data), which shares out the examples instead."
        ) from None
    num_files = next(n for n in range(num_workers - 1, 0, -1) if n == 1 or _has_files_for(dataset, n))
    raise ConfigError(
        f"shard='file': {num_files} files cannot be shared by {num_workers} workers, each of which needs one; take "
        "shard='data' (--shard=data), write more files, or start fewer workers."
    )


def _has_files_for(dataset: tf.data.Dataset, num_workers: int) -> bool:
    try:
        next(iter(_own_files(dataset, num_workers, 0)), None)
    except tf.errors.InvalidArgumentError as error:
        if "FILE based sharding" not in str(error):
            raise
        return False
    return True
