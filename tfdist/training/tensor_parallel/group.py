"""What some of a run's processes compute together, forwards and backwards: those with blocks of the same layers."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

# Far from the keys that TensorFlow gives its own groups and tensors, and from those of pairs of workers.
_KEYS = 1 << 24
# Exchanges of a group have numbers that no other group's have; all of the group count alike, whatever the model.
_MOST_EXCHANGES = 1 << 20
_COUNTERS: dict[int, Iterator[int]] = collections.defaultdict(itertools.count)


class ProcessGroup:
    """The processes that hold the blocks of the same layers; all trace the same functions in the same order.

    Args:
        size: How many.
        number: Of the group, among all groups of the run.
    """

    def __init__(self, size: int, number: int = 0) -> None:
        self.size = size
        self._number = number

    def enter(self, x: Any) -> Any:
        """Returns a tensor that all have, on its way into blocks: what these say of its gradient is added up."""
        if self.size == 1:
            return x

        @tf.custom_gradient
        def entered(value: Any) -> Any:
            return tf.identity(value), self._add

        return entered(x)

    def sum(self, x: Any) -> Any:
        """Returns the sum over the blocks; each has the whole gradient."""
        if self.size == 1:
            return x

        @tf.custom_gradient
        def summed(value: Any) -> Any:
            return self._add(value), lambda gradient: gradient

        return summed(x)

    def max(self, x: Any) -> Any:
        """Returns the greatest over the blocks, through which no gradient goes."""
        return tf.stop_gradient(x if self.size == 1 else self._reduce(tf.stop_gradient(x), "Max"))

    def _add(self, value: Any) -> Any:
        return self._reduce(tf.convert_to_tensor(value), "Add")

    def _reduce(self, value: Any, operation: str) -> Any:
        # A number stands for one place in one graph of one model: every trace has its own.
        return tf.raw_ops.CollectiveReduceV2(
            input=value,
            group_size=self.size,
            group_key=_KEYS + self._number,
            instance_key=_KEYS + self._number * _MOST_EXCHANGES + next(_COUNTERS[self._number]),
            ordering_token=[],
            merge_op=operation,
            final_op="Id",
            communication_hint="RING",
        )
