"""Which example stands where: a batch is addressed by (seed, epoch, step), the same for any number of workers."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

# Four rounds, TensorFlow's default, leave neighbours correlated; eight are as good as NumPy's permutation.
_SHUFFLE_ROUNDS = 8


def epoch_indices(
    *, num_examples: int, seed: int, epoch: Any, start: Any, size: Any, shuffle: bool
) -> tf.Tensor:
    """Returns the examples at positions `start … start + size - 1` of a run through the data.

    Positions count on over the end of the data: position `num_examples` is the first of the next pass, in
    an order of its own.

    Args:
        num_examples: Examples in the data.
        seed: Of the order.
        epoch: Zero-based, int or int64 scalar tensor.
        start: First position, int or int64 scalar tensor.
        size: How many, int or scalar tensor.
        shuffle: False keeps the data's own order.

    Returns:
        `[size]` int64, 0..num_examples - 1; each once in a pass.
    """
    positions = tf.cast(start, tf.int64) + tf.range(tf.cast(size, tf.int64))
    if isinstance(size, int):
        positions = tf.ensure_shape(positions, [size])
    return examples_at(positions, num_examples=num_examples, seed=seed, epoch=epoch, shuffle=shuffle)


def examples_at(
    positions: tf.Tensor, *, num_examples: int, seed: int, epoch: Any, shuffle: bool
) -> tf.Tensor:
    """Returns the examples at any positions (`[n]` int64) of a run through the data; see `epoch_indices`.

    The epoch may be another one for each position (`[n]` too).
    """
    within = tf.math.floormod(positions, num_examples)
    if not shuffle:
        return within
    lap = positions // num_examples
    key = tf.stack(
        [
            tf.fill(tf.shape(lap), tf.cast(seed, tf.int64)),
            tf.broadcast_to(tf.cast(epoch, tf.int64), tf.shape(lap)),
            lap,
        ],
        axis=-1,
    )
    key = tf.cast(tf.math.floormod(key, 2**31), tf.int32)
    return tf.raw_ops.RandomIndexShuffle(
        index=within,
        seed=key,
        max_index=tf.fill(tf.shape(lap), tf.cast(num_examples, tf.int64) - 1),
        rounds=_SHUFFLE_ROUNDS,
    )


def num_steps(*, num_examples: int, global_batch_size: int, drop_remainder: bool = False) -> int:
    """Returns the steps in one pass over the data."""
    whole, rest = divmod(num_examples, global_batch_size)
    return whole if drop_remainder else whole + (rest > 0)


def part_slice(size: Any, part: int, num_parts: int) -> tuple[Any, Any]:
    """Returns where a part of a batch, or of an axis, starts and ends; parts differ by at most one."""
    return part * size // num_parts, (part + 1) * size // num_parts
