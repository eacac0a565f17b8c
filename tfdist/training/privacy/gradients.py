"""What a replica adds to the sum of gradients in private training, in place of its gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tfdist import keras_internals
from tfdist.errors import ConfigError
from tfdist.training.privacy.noise import GaussianNoise
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

    Args:
        model: Built.
        mechanism: What is done.

    Raises:
        ConfigError: If the model cannot be trained so.
    """

    def __init__(self, model: keras.Model, mechanism: Mechanism) -> None:
        self.mechanism = mechanism
        self._clipped = ClippedGradients(
            model, clip_norm=mechanism.clip_norm, micro_batch_size=mechanism.micro_batch_size
        )
        self._noise = GaussianNoise(mechanism.noise_seed)
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
        drawn = iter(self._noise.draw(shapes, step))
        return [
            None if value is None else value + stddev * tf.cast(next(drawn), value.dtype) for value in sums
        ]
