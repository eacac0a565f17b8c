"""How the rows of a table are divided into shards, what is in them at the start, and how some are gathered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

Partition = Literal["mod", "div"]

# A longer table is drawn in pieces of this many rows, so that no machine needs room for the whole.
BLOCK_ROWS = 1 << 18
# Far from the seeds that people choose for neighbouring layers.
_SEED_STRIDE = 1_000_003
_init = keras.initializers
# Each number is drawn for itself, whatever the shape.
_BY_ROW = (_init.RandomUniform, _init.RandomNormal, _init.TruncatedNormal)


def rows_of_shard(shard: int, *, num_rows: int, num_shards: int, partition: Partition) -> slice:
    """Returns which logical rows a shard holds, in its order.

    Args:
        shard: From 0.
        num_rows: Of the whole table.
        num_shards: At most `num_rows`.
        partition: "mod" deals the rows out in turn: shard s holds s, s + n, s + 2n and so on. "div" cuts the table into
            runs of rows. Either way the first shards hold the rows that are left over, one each.

    Returns:
        A slice with start, stop and step, to be used on the whole table.
    """
    if partition == "mod":
        return slice(shard, num_rows, num_shards)
    size, left_over = divmod(num_rows, num_shards)
    start = shard * size + min(shard, left_over)
    return slice(start, start + size + (shard < left_over), 1)


def draw_rows(initializer: Any, *, shape: tuple[int, int], rows: slice, dtype: Any) -> Any:
    """Draws some rows of a table that is the same however it is divided.

    Keras's random initializers that draw number by number draw a table of up to `BLOCK_ROWS` rows as
    `keras.layers.Embedding` does, and a longer one in blocks of so many rows, each with its own seed. Others (those
    that look at the shape, such as `GlorotUniform`, and functions) draw the whole table, for every shard again; they
    must give the same one each time.

    Args:
        initializer: A Keras initializer or a function `(shape, dtype) → tensor`.
        shape: Of the whole table, `(rows, features)`.
        rows: As `rows_of_shard` returns them.
        dtype: Of the table.

    Returns:
        A tensor `[len(rows), features]`.
    """
    num_rows, width = shape
    if _is_constant(initializer):
        return initializer((len(range(num_rows)[rows]), width), dtype=dtype)
    if type(initializer) not in _BY_ROW or not isinstance(initializer.seed, int):
        return tf.convert_to_tensor(initializer(shape, dtype=dtype))[rows]
    parts = []
    for block, start in enumerate(range(0, num_rows, BLOCK_ROWS)):
        stop = min(start + BLOCK_ROWS, num_rows)
        inside = rows_inside(rows, start, stop)
        if inside is not None:
            drawn = _reseeded(initializer, block)((stop - start, width), dtype=dtype)
            parts.append(tf.convert_to_tensor(drawn)[inside])
    return parts[0] if len(parts) == 1 else tf.concat(parts, 0)


def rows_inside(rows: slice, start: int, stop: int) -> slice | None:
    """Returns which rows of the block from `start` to `stop` are among `rows`, counted from `start`."""
    first = rows.start + max(0, -(-(start - rows.start) // rows.step)) * rows.step
    last = min(stop, rows.stop)
    return slice(first - start, last - start, rows.step) if first < last else None


def look_up_rows(
    shards: Sequence[Any], ids: Any, *, num_rows: int, partition: Partition, table: str
) -> tf.Tensor:
    """Returns the rows of some ids: each distinct row is gathered once, on the device that holds it.

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


def _reseeded(initializer: Any, block: int) -> Any:
    config = initializer.get_config() | {"seed": initializer.seed + block * _SEED_STRIDE}
    return type(initializer).from_config(config)


def _is_constant(initializer: Any) -> bool:
    if isinstance(initializer, _init.Constant):
        return np.ndim(initializer.value) == 0
    return isinstance(initializer, (_init.Zeros, _init.Ones))
