"""The replicas of a sync strategy, seen from one of its processes: their variables, and what they compute together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist import keras_internals

# Messages of 2 GiB are more than gRPC takes.
_MESSAGE_BYTES = 1 << 27


class Replicas:
    """Compiles what runs on every replica, and hands out what this process's have.

    Args:
        strategy: Any sync strategy.
        first: Number of this process's first replica among all.

    Attributes:
        num_all: Of the strategy.
        num_local: Of this process.
        first: Number of this process's first replica among all.
    """

    def __init__(self, strategy: tf.distribute.Strategy, first: int = 0) -> None:
        self.num_all = strategy.num_replicas_in_sync
        self.num_local = len(strategy.extended.worker_devices)
        self.first = first
        self._strategy = strategy
        self._sums: dict[Any, Callable[..., Any]] = {}

    def run(self, function: Callable[..., Any], args: Sequence[Any] = ()) -> Any:
        """Calls a function once for each local replica, inside its replica context."""
        return self._strategy.run(function, args=tuple(args))

    def compile(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """Returns what runs a function of the replica's index here, and of tensors, in the context of every replica.

        The tensors are of the same shapes each time; `options` are those of `tf.function`.
        """

        def on_replica(*args: Any) -> Any:
            return function(self.index_of(tf.distribute.get_replica_context()), *args)

        compiled = tf.function(lambda *args: self.run(on_replica, args), autograph=False, **options)
        # Traced by itself: TensorFlow would take many functions from one place for one that is traced again and again.
        traced: list[Any] = []

        def call(*args: Any) -> Any:
            if not traced:
                traced.append(compiled.get_concrete_function(*args))
            return traced[0](*args)

        return call

    def build(self, function: Callable[[tf.distribute.ReplicaContext], Any]) -> Callable[[], np.ndarray]:
        """Compiles a function of the replica context that the strategy gives, which returns a tensor.

        What comes of it runs on every replica, every process must call it, and it returns this process's first result.
        """
        compiled = self.compile(lambda index: function(tf.distribute.get_replica_context()))
        return lambda: self.first_local(compiled()).numpy()

    def index_of(self, context: tf.distribute.ReplicaContext) -> int:
        """Returns which of this process's replicas the context is, 0-based."""
        return int(tf.get_static_value(context.replica_id_in_sync_group)) % self.num_local

    def local(self, variable: keras.Variable, index: int) -> tf.Variable:
        """Returns the TensorFlow variable of one of this process's replicas."""
        return self._strategy.experimental_local_results(keras_internals.native(variable))[index]

    def first_local(self, value: Any) -> Any:
        """Returns the value of this process's first replica."""
        return self._strategy.experimental_local_results(value)[0]

    def sum_first(self, values: np.ndarray) -> np.ndarray:
        """Sums arrays `[n]` of one length, of each process its first replica's; every process must call it."""
        dtype = tf.as_dtype(values.dtype)

        def total(index: int, values: tf.Tensor) -> Any:
            counted = tf.identity(values) if index == 0 else tf.zeros_like(values)
            context = tf.distribute.get_replica_context()
            return context.all_reduce(tf.distribute.ReduceOp.SUM, counted)

        if dtype not in self._sums:
            signature = [tf.TensorSpec([None], dtype)]  # one trace for every length
            self._sums[dtype] = self.compile(total, input_signature=signature)
        return self.first_local(self._sums[dtype](tf.convert_to_tensor(values))).numpy()

    def broadcast(self, content: bytes, *, is_source: bool) -> bytes:
        """Returns one process's bytes on every process; every one must call it, though others' does not matter."""
        if not is_source:
            content = b""
        size = int(self.sum_first(np.array([len(content)], np.int64))[0])
        blocks = []
        for start in range(0, size, _MESSAGE_BYTES):
            words = np.zeros(-(-min(size - start, _MESSAGE_BYTES) // 4), np.int32)
            own = content[start : start + _MESSAGE_BYTES]
            words.view(np.uint8)[: len(own)] = np.frombuffer(own, np.uint8)
            blocks.append(self.sum_first(words).view(np.uint8)[: size - start].tobytes())
        return b"".join(blocks)
