"""TensorFlow's own reduction and gathering over replicas, of tensors of any types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf


def reduce_all(
    context: tf.distribute.ReplicaContext, op: tf.distribute.ReduceOp, tensors: Sequence[Any]
) -> list[Any]:
    """Reduces tensors, dense or `tf.IndexedSlices`, of the same types in the same order on every replica.

    One exchange for each type: TensorFlow packs what one call takes together.
    """
    # TensorFlow would send them to itself, and keep 1.6 kB of each time.
    if context.num_replicas_in_sync == 1:
        return list(tensors)
    results: list[Any] = [None] * len(tensors)
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        places = [i for i, t in enumerate(tensors) if t.dtype == dtype]
        for i, value in zip(places, context.all_reduce(op, [tensors[i] for i in places]), strict=True):
            results[i] = value
    return results


def gather_all(context: tf.distribute.ReplicaContext, tensor: tf.Tensor) -> tf.Tensor:
    """Returns the rows of all replicas, which may differ in their number, in the replicas' order."""
    if context.num_replicas_in_sync == 1:
        return tensor
    dtype = tensor.dtype
    if dtype == tf.string:
        return _gather_texts(context, tensor)
    # TensorFlow gathers these alone.
    sent = tf.float32 if dtype.is_floating and dtype.size < 4 else tf.int32 if dtype.size < 4 else dtype
    gathered = context.all_gather(tf.cast(tensor, sent), axis=0)
    return tf.cast(gathered, dtype)


def _gather_texts(context: tf.distribute.ReplicaContext, texts: tf.Tensor) -> tf.Tensor:
    """Sends texts as numbers: bytes, filled up to the longest one's length."""
    lengths = context.all_gather(tf.strings.length(texts), axis=0)
    longest = tf.maximum(tf.reduce_max(lengths), 1)
    codes = tf.io.decode_raw(texts, tf.uint8, fixed_length=longest)
    codes = context.all_gather(tf.cast(codes, tf.int32), axis=0)
    symbols = tf.constant([bytes([code]) for code in range(256)])
    joined = tf.strings.reduce_join(tf.gather(symbols, codes), axis=-1)
    return tf.strings.substr(joined, tf.zeros_like(lengths), lengths)
