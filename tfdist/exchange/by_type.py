"""TensorFlow's own reduction over replicas, of tensors of any types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf


def reduce_all(
    context: tf.distribute.ReplicaContext, op: tf.distribute.ReduceOp, tensors: Sequence[Any]
) -> list[Any]:
    """Reduces tensors, one exchange for each type: TensorFlow packs what one call takes together.

    Args:
        context: The replica context that the strategy gave.
        op: Sum or mean.
        tensors: Dense or `tf.IndexedSlices`, the same types in the same order on every replica.
    """
    results: list[Any] = [None] * len(tensors)
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        places = [i for i, t in enumerate(tensors) if t.dtype == dtype]
        for i, value in zip(places, context.all_reduce(op, [tensors[i] for i in places]), strict=True):
            results[i] = value
    return results
