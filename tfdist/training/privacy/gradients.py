"""What a replica adds to the sum of gradients in private training, in place of its gradients."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from tfdist import keras_internals
from tfdist.errors import ConfigError
from tfdist.training.privacy.per_example import ClippedGradients


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mechanism:
    """What is done to gradients.

    Attributes:
        clip_norm: Largest norm of an example's gradient.
        noise_multiplier: Standard deviation of the noise in the sum, in clip norms.
        noise_seed: None takes a cryptographic generator.
        micro_batch_size: As `ClippedGradients` takes it.
        divisor: What the sum is divided by; None: the number of the batch's examples, where that tells nothing.
    """

    clip_norm: float
    noise_multiplier: float
    noise_seed: int | None
    micro_batch_size: int | None
    divisor: int | None


class PrivateGradients:
    """Sums of clipped gradients, and one noise: the replicas' contributions add up to what DP-SGD applies.

    Raises:
        ConfigError: If the model cannot be trained so.
    """

    def __init__(self, model: keras.Model, mechanism: Mechanism) -> None:
        self.mechanism = mechanism
        self._clipped = ClippedGradients(
            model, clip_norm=mechanism.clip_norm, micro_batch_size=mechanism.micro_batch_size
        )
        self._counter = keras_internals.batch_counter(model.optimizer)
        self._names = [v.path for v in model.trainable_variables]

    def contribute(
        self,
        plain: Sequence[Any],
        part: Any,
        *,
        num_examples: Any,
        batch_size: Any,
        is_first: bool,
        local: Sequence[tuple[keras.Variable, tf.Variable]] = (),
    ) -> list[Any]:
        """Returns what a replica adds, one tensor for each trainable weight; None where there is no gradient.

        Args:
            plain: The gradients of Keras's step, which say where there is one.
            part: What the replica has of the batch; one example at least, of padding where it has none.
            num_examples: How many of them count.
            batch_size: Of all replicas.
            is_first: Whether it is the one that adds the noise.
            local: As `ClippedGradients.sum` takes it.

        Raises:
            ConfigError: If a weight has a gradient that is no example's.
        """
        sums = self._clipped.sum(part, num_examples, local)
        for name, own, other in zip(self._names, sums, plain, strict=True):
            if (own is None) != (other is None):
                raise ConfigError(
                    f"private training: {name!r} has a gradient in a batch that no single example has; it cannot be "
                    "trained so."
                )
        if is_first and self.mechanism.noise_multiplier:
            sums = self._with_noise(sums, local)
        divisor = tf.cast(self.mechanism.divisor or batch_size, tf.float32)
        return [None if value is None else value / tf.cast(divisor, value.dtype) for value in sums]

    def _with_noise(
        self, sums: Sequence[Any], local: Sequence[tuple[keras.Variable, tf.Variable]]
    ) -> list[Any]:
        stddev = self.mechanism.noise_multiplier * self.mechanism.clip_norm
        own = next((value for variable, value in local if variable is self._counter), None)
        step = tf.cast(keras_internals.native(self._counter) if own is None else own, tf.int64)
        shapes = [value.shape for value in sums if value is not None]
        drawn = iter(self._draw(shapes, step))
        return [
            None if value is None else value + stddev * tf.cast(next(drawn), value.dtype) for value in sums
        ]

    def _draw(self, shapes: Sequence[tf.TensorShape], step: Any) -> list[Any]:
        """Returns standard normal numbers of each shape, float32, drawn on the host; with a seed by the step."""
        seed = self.mechanism.noise_seed
        sizes = [math.prod(shape) for shape in shapes]

        def draw(step: np.ndarray, size: np.ndarray) -> NDArray[np.float32]:
            if seed is None:
                return normal_numbers(int(size))
            random = np.random.Generator(np.random.Philox(key=[seed, int(step)]))
            return random.standard_normal(int(size), np.float32)

        numbers = tf.numpy_function(draw, [step, np.int64(sum(sizes))], tf.float32)
        numbers.set_shape([sum(sizes)])
        parts = tf.split(numbers, sizes)
        return [tf.reshape(part, shape) for part, shape in zip(parts, shapes, strict=True)]


def normal_numbers(size: int) -> NDArray[np.float32]:
    """Returns standard normal numbers, `[size]`, by Box and Muller's method from `os.urandom`."""
    half = -(-size // 2)
    words = np.frombuffer(os.urandom(16 * half), np.uint64)
    # 53 bits, the middle of each interval: never 0, of which there is no logarithm.
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log(uniform[:half])), 2 * np.pi * uniform[half:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size].astype(np.float32)
