"""Row-sparse updates: Keras's own formulas, on the rows of a weight that a gradient has, and on nothing else.

A table's gradient comes as `tf.IndexedSlices`, some rows and their numbers. Keras makes it as large as the table, or
reads the whole table all the same. Here repeated rows are summed, and the optimizer's own `update_step` sees these rows
alone, of the weight and of its slots, on the device that holds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tfdist import keras_internals


class Rows:
    """Some rows of a variable, as a variable of their own: what Keras's formulas need of one.

    They are read once: what a formula adds is known afterwards.
    """

    def __init__(self, variable: Any, indices: tf.Tensor) -> None:
        self._variable = variable
        self._indices = indices
        self._values: tf.Tensor | None = None
        self.dtype = variable.dtype
        # Between a worker's reading of rows and its writing another one may write: on a ps they are added to, which
        # TensorFlow does with a lock for each row, and elsewhere replaced, which takes a third of the time.
        self._is_shared = tf.DeviceSpec.from_string(variable.device).job == "ps"

    def __tf_tensor__(self, dtype: Any = None, name: str | None = None) -> tf.Tensor:
        if self._values is None:
            self._values = tf.gather(self._variable, self._indices, name=name)
        return tf.convert_to_tensor(self._values, dtype)

    def assign(self, values: Any) -> None:
        """Replaces the rows."""
        self._values = tf.convert_to_tensor(values)
        self._variable.scatter_update(tf.IndexedSlices(self._values, self._indices))

    def assign_add(self, values: Any) -> None:
        """Adds to the rows."""
        added = tf.convert_to_tensor(values)
        if not self._is_shared:
            self.assign(tf.convert_to_tensor(self) + added)
            return
        self._variable.scatter_add(tf.IndexedSlices(added, self._indices))
        self._values = None if self._values is None else self._values + added

    def assign_sub(self, values: Any) -> None:
        """Subtracts from the rows."""
        if not self._is_shared:
            self.assign(tf.convert_to_tensor(self) - tf.convert_to_tensor(values))
            return
        self.assign_add(-tf.convert_to_tensor(values))


class RowOptimizer(keras_internals.ClipsSlices):
    """Mixed into a Keras optimizer, updates by rows. On dense gradients everything is Keras's."""

    def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        """As Keras's; repeated rows are summed first, so that clipping sees what a dense gradient would show it."""
        summed = [_sum_rows(g) if isinstance(g, tf.IndexedSlices) else g for g in grads]
        super().apply(summed, trainable_variables)  # type: ignore[misc]

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """As Keras's, on the gradient's rows alone if it has rows."""
        if not isinstance(gradient, tf.IndexedSlices):
            super().update_step(gradient, variable, learning_rate)  # type: ignore[misc]
            return
        # Not the worker's: the rows and their slots then never leave the device that holds them.
        with tf.device(variable.device):
            indices = tf.identity(gradient.indices)
            view = keras_internals.OptimizerView(self, variable, lambda slot: Rows(slot, indices))
            keras_update_step: Any = super(RowOptimizer, type(self)).update_step  # type: ignore[misc]
            keras_update_step(view, tf.identity(gradient.values), Rows(variable, indices), learning_rate)


def _sum_rows(slices: tf.IndexedSlices) -> tf.IndexedSlices:
    indices, places = tf.unique(slices.indices)
    values = tf.math.unsorted_segment_sum(slices.values, places, tf.size(indices))
    return tf.IndexedSlices(values, indices, slices.dense_shape)
