"""Whether a step's loss and gradients are finite, asked before they change anything: else nothing is applied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfdist import keras_internals

# What a step reports: which of its numbers was wrong.
SOUND, LOSS, GRADIENTS, SPIKE = range(4)
# The verdict on a step that was not checked.
UNCHECKED = (float(SOUND), 0.0)


class StepCheck:
    """One step's check. Whoever exchanges gradients asks it with the sums, so that all replicas decide alike.

    An optimizer that scales its loss (`LossScaleOptimizer`) leaves out overflowing gradients by itself, as it must
    to find its scale: there only the loss is looked at.

    Args:
        limit: Largest loss that passes, float32 scalar; infinity lets every finite one pass.
    """

    def __init__(self, limit: Any) -> None:
        self._limit = limit
        self._graph = current_graph()
        self._losses: list[Any] = []
        self._fault: Any = tf.constant(SOUND)
        self._loss: Any = tf.constant(0.0)

    def note_loss(self, loss: Any, *, is_total: bool) -> None:
        """Takes a scalar loss that the step computed; a total one holds those noted before."""
        # A loss inside a loop or a branch of the step's own is out of reach here: its gradients are not.
        if current_graph() is self._graph:
            self._losses = [loss] if is_total else [*self._losses, loss]

    @property
    def own_loss(self) -> Any:
        """The sum of the losses noted, float32 scalar."""
        return tf.add_n([tf.cast(loss, tf.float32) for loss in self._losses] or [tf.constant(0.0)])

    def judge(self, optimizer: keras.optimizers.Optimizer, grads: Sequence[Any], loss: Any) -> Any:
        """Returns whether gradients (or None) may be applied, a bool scalar; `loss` is that of the whole batch."""
        fault = tf.where(loss > self._limit, SPIKE, SOUND)
        fault = tf.where(tf.math.is_finite(loss), fault, LOSS)
        if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            fault = tf.where((fault == SOUND) & ~_all_finite(grads), GRADIENTS, fault)
        # The first of several optimizers may have found what the second does not see.
        fault = tf.where(self._fault == SOUND, fault, self._fault)
        # In a branch of the step's own the update is left out as well, but nobody hears of it.
        if current_graph() is self._graph:
            self._fault, self._loss = fault, loss
        return fault == SOUND

    @property
    def is_sound(self) -> Any:
        """Whether nothing was wrong, a bool scalar."""
        return self._fault == SOUND

    @property
    def verdict(self) -> Any:
        """What was wrong and the batch's loss, `[2]` float32: one number to fetch instead of two."""
        return tf.stack([tf.cast(self._fault, tf.float32), self._loss])

    def undo(self, variables: Sequence[tf.Variable], before: Sequence[Any]) -> None:
        """Gives variables back what they held before the step, if something was wrong with it."""

        def restore() -> None:
            for variable, value in zip(variables, before, strict=True):
                variable.assign(value)

        tf.cond(self.is_sound, lambda: None, restore)


def run_if(condition: Any, update: Callable[[], Any]) -> None:
    """Runs `update`, whose result is of no interest, if the bool scalar `condition` holds when the step runs."""

    def run() -> None:
        update()

    tf.cond(condition, run, lambda: None)


def on_values(change: Callable[[Any], Any], grad: Any) -> Any:
    """Returns a gradient with its numbers changed: all of a dense one, or those of the rows that it is about."""
    if isinstance(grad, tf.IndexedSlices):
        return tf.IndexedSlices(change(grad.values), grad.indices, grad.dense_shape)
    return change(grad)


def zero_unless(condition: Any, grad: Any) -> Any:
    """Returns a gradient, or zeros where the bool scalar `condition` does not hold; None where there is none."""
    if grad is None:
        return None
    return on_values(lambda values: tf.where(condition, values, tf.zeros_like(values)), grad)


def side_variables(model: keras.Model) -> list[keras.Variable]:
    """Returns what a step changes besides through an optimizer: metrics, moving statistics, random streams."""
    found = [
        *model.non_trainable_variables,
        *model.metrics_variables,
        *keras_internals.seed_states(model),
    ]
    return list({id(v): v for v in found}.values())


def _all_finite(grads: Sequence[Any]) -> Any:
    """Adds everything up, one pass over memory: NaN and infinities survive in a sum whatever they meet."""
    values = [g.values if isinstance(g, tf.IndexedSlices) else g for g in grads if g is not None]
    sums = []
    for value in values:
        with tf.device(value.device):  # that of a ps, beside the weight
            sums.append(tf.reduce_sum(tf.cast(value, tf.float32)))
    return tf.math.is_finite(tf.add_n(sums)) if sums else tf.constant(True)


def current_graph() -> Any:
    """Returns the graph that is being traced, None where nothing is: a branch or a loop has one of its own."""
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
