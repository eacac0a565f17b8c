"""LARS, which Keras does not have (its relative for Adam is `keras.optimizers.Lamb`)."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tfdist.errors import ConfigError


@keras.saving.register_keras_serializable(package="tfdist")
class LARS(keras.optimizers.SGD):
    """`keras.optimizers.SGD` with momentum, whose step in each layer is a share of the length of the layer's weights.

    With weights w, gradient g and decay d, what momentum SGD gets of a kernel or table is
    `trust_coefficient * |w| / (|g| + d * |w|) * (g + d * w)`. Biases and the scales and offsets of normalisations (all
    that has one axis or none), and weights or gradients that are zero, get the plain gradient, without decay. Each
    shard of a sharded table is a layer by itself.

    Args:
        learning_rate: The rate, times which the share is taken.
        momentum: Share of the last step that is kept, at least 0 and less than 1.
        trust_coefficient: The share of its weights' length by which a layer moves, at a rate of 1.
        weight_decay: The decay d, which is part of the gradient here as in the paper; None is none.
        **kwargs: As of `keras.optimizers.SGD`.

    Raises:
        ConfigError: If the trust coefficient is not greater than 0.

    Source: You, Gitman and Ginsburg 2017, algorithm 1.

    Examples:
        >>> import tfdist
        >>> tfdist.optimizers.LARS(0.1, weight_decay=1e-4).trust_coefficient
        0.001
    """

    def __init__(
        self,
        learning_rate: Any = 1.0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
        weight_decay: float | None = None,
        name: str = "lars",
        **kwargs: Any,
    ) -> None:
        if not trust_coefficient > 0:
            raise ConfigError(f"trust_coefficient={trust_coefficient}: it must be greater than 0.")
        # Keras would take it off the weights directly.
        super().__init__(learning_rate, momentum=momentum, weight_decay=None, name=name, **kwargs)
        self.trust_coefficient = trust_coefficient
        self.gradient_decay = weight_decay

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Makes momentum SGD's step with the gradient brought to its length."""
        if len(variable.shape) > 1:
            gradient = self._scale(
                keras.ops.convert_to_tensor(gradient), keras.ops.convert_to_tensor(variable)
            )
        super().update_step(gradient, variable, learning_rate)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments."""
        own = {"trust_coefficient": self.trust_coefficient, "weight_decay": self.gradient_decay}
        return super().get_config() | own

    def _scale(self, gradient: Any, variable: Any) -> Any:
        ops = keras.ops
        decay = self.gradient_decay or 0.0
        weights = ops.convert_to_tensor(variable)
        # TensorFlow's, which adds up what rows occur several times.
        gradient = ops.cast(tf.convert_to_tensor(gradient), weights.dtype)
        weight_norm, gradient_norm = (ops.sqrt(ops.sum(ops.square(x))) for x in (weights, gradient))
        length = gradient_norm + decay * weight_norm
        moves = ops.logical_and(weight_norm > 0, gradient_norm > 0)
        ratio = self.trust_coefficient * weight_norm / ops.where(moves, length, 1.0)
        return ops.where(moves, ratio * (gradient + decay * weights), gradient)
