"""Gradient accumulation in one closure: a worker sums the gradients of its own batches and applies their mean once.

Keras keeps the sum in shared variables, where the batches of two workers would mix and be lost. Here those variables
are touched only where a run of batches ends in the middle (an epoch's last steps), and read when it goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tfdist import keras_internals


class Accumulation:
    """The gradients of consecutive batches on one worker: one run of them, or several.

    Args:
        optimizer: One with `gradient_accumulation_steps`.
        phase: How many batches of the running sum came before these; they lie in the optimizer's accumulators.
    """

    def __init__(self, optimizer: keras.optimizers.Optimizer, *, phase: int) -> None:
        self._num_steps = optimizer.gradient_accumulation_steps
        self._accumulators = keras_internals.accumulators(optimizer)
        self._carries = phase > 0
        self._has_used_carried = False
        self._num_summed = phase
        self._sums: dict[int, tf.Tensor] = {}

    def gather(self, grads: Sequence[Any], variables: Sequence[keras.Variable]) -> list[tf.Tensor] | None:
        """Adds a batch's gradients; after the last of `gradient_accumulation_steps` returns the mean, else None."""
        for grad, variable in zip(grads, variables, strict=True):
            dense = tf.convert_to_tensor(grad)
            key = id(variable)
            self._sums[key] = self._sums[key] + dense if key in self._sums else dense
        self._num_summed += 1
        if self._num_summed < self._num_steps:
            return None
        total = [self._sums[id(v)] + self._carried(v) for v in variables]
        self._sums.clear()
        self._has_used_carried = self._carries
        self._num_summed = 0
        return [t / self._num_steps for t in total]

    def keep(self) -> None:
        """Leaves what was not applied to the closure that goes on; call it once, at the end."""
        if self._has_used_carried:
            for accumulator in self._accumulators.values():
                accumulator.assign(tf.zeros_like(accumulator))
        for key, value in self._sums.items():
            self._accumulators[key].assign_add(value)

    def _carried(self, variable: keras.Variable) -> Any:
        carries = self._carries and not self._has_used_carried
        return self._accumulators[id(variable)] if carries else 0.0
