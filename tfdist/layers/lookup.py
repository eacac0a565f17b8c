"""Gathers rows from shards: each distinct row once, on the device that holds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tfdist.layers.partition import Partition


def look_up_rows(
    shards: Sequence[Any], ids: Any, *, num_rows: int, partition: Partition, table: str
) -> tf.Tensor:
    """Returns the rows of some ids.

    Backwards, each shard gets the summed gradients of its own distinct rows, as `tf.IndexedSlices`.

    Args:
        shards: TensorFlow variables, divided as `rows_of_shard` says.
        ids: `[ids]`.
        num_rows: Of all shards together.
        partition: How the rows are divided.
        table: What an error calls the table.

    Returns:
        `[ids, features]`. At a step with an id that is no row, `tf.errors.InvalidArgumentError` names it.
    """
    ids = ids if ids.dtype.is_integer else tf.cast(ids, tf.int32)
    unique, places = tf.unique(ids)
    outside = tf.logical_or(unique < 0, unique >= num_rows)
    message = f"ids of the embedding {table!r} must be 0 to {num_rows - 1}, but there is"
    all_inside = tf.logical_not(tf.reduce_any(outside))
    with tf.control_dependencies(
        [tf.debugging.Assert(all_inside, [message, tf.boolean_mask(unique, outside)])]
    ):
        unique = tf.identity(unique)  # this error must come before the gather's own
    # The function of TensorFlow 2 knows no partition strategy.
    rows = tf.compat.v1.nn.embedding_lookup(list(shards), unique, partition_strategy=partition)
    return tf.gather(rows, places)
