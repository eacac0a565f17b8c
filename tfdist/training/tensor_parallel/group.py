"""What the processes that hold a layer's blocks compute together, forwards and backwards."""

from __future__ import annotations

import itertools
from typing import Any

import tensorflow as tf

# All of a group count alike.
_NUMBERS = itertools.count()


class BlockGroup:
    """The processes that hold the blocks of the same layers; all trace the same functions in the same order.

    Args:
        size: How many.
        key: Of the group, which TensorFlow's processes know it by; far from other groups' keys.
        first_number: Of its exchanges; others' are none of the million from it on.
    """

    def __init__(self, size: int, *, key: int = 0, first_number: int = 0) -> None:
        self.size = size
        self._key = key
        self._first_number = first_number

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
            group_key=self._key,
            instance_key=self._first_number + next(_NUMBERS),
            ordering_token=[],
            merge_op=operation,
            final_op="Id",
            communication_hint="RING",
        )
