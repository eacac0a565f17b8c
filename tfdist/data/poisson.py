"""Batches of which each example is a part, or not, by a chance of its own."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import tensorflow as tf

from tfdist.data.sources.batched import BatchedSource
from tfdist.data.sources.indexed import IndexedSource
from tfdist.data.sources.source import ArraySource

_NUM_READ_AHEAD = 2


def poisson_batches(source: ArraySource | IndexedSource, *, batch_size: int, key: bytes) -> BatchedSource:
    """Returns batches that hold each example with the same probability, whatever the others do (Poisson sampling).

    Args:
        source: Examples, any of which can be read at once.
        batch_size: Examples of a batch on average.
        key: What the batches follow from, besides the pass: at least 16 bytes that nobody knows.

    Returns:
        As many batches a pass as cover the examples on average.
    """
    num_examples = source.num_examples
    num_batches = math.ceil(num_examples / batch_size)

    def choose(seed: np.ndarray, place: np.ndarray) -> np.ndarray:
        # A generator for each batch: where a pass is gone on with, its batches are still the same.
        told = hashlib.sha256(key + np.array([seed, place], np.int64).tobytes()).digest()
        random = np.random.Generator(np.random.Philox(key=int.from_bytes(told[:16], "little")))
        # The number first, and then that many: the same law, without a coin for each example.
        size = random.binomial(num_examples, batch_size / num_examples)
        return np.sort(random.choice(num_examples, size, replace=False)).astype(np.int64)

    def read_all(seed: int) -> tf.data.Dataset:
        def read(place: tf.Tensor) -> object:
            indices = tf.numpy_function(choose, [tf.constant(seed, tf.int64), place], tf.int64)
            indices.set_shape([None])
            return source.take(indices)

        places = tf.data.Dataset.range(num_batches)
        return places.map(read, num_parallel_calls=_NUM_READ_AHEAD, deterministic=True)

    return BatchedSource(dataset=read_all(0), num_batches=num_batches, reorder=read_all)
