"""Normal numbers that nobody can foresee, or that a seed repeats."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray


class GaussianNoise:
    """Draws standard normal numbers, on the host.

    Args:
        seed: None takes the operating system's cryptographic generator.
    """

    def __init__(self, seed: int | None) -> None:
        self._seed = seed

    def draw(self, shapes: Sequence[tf.TensorShape], step: Any) -> list[Any]:
        """Returns a float32 tensor of each shape.

        Args:
            shapes: Known ones.
            step: Whose noise it is, an integer scalar: of a seed, each has its own.
        """
        sizes = [math.prod(shape) for shape in shapes]
        numbers = tf.numpy_function(self._draw, [step, np.int64(sum(sizes))], tf.float32)
        numbers.set_shape([sum(sizes)])
        parts = tf.split(numbers, sizes)
        return [tf.reshape(part, shape) for part, shape in zip(parts, shapes, strict=True)]

    def _draw(self, step: np.ndarray, size: np.ndarray) -> NDArray[np.float32]:
        if self._seed is None:
            return normal_numbers(int(size))
        random = np.random.Generator(np.random.Philox(key=[self._seed, int(step)]))
        return random.standard_normal(int(size), np.float32)


def normal_numbers(size: int) -> NDArray[np.float32]:
    """Returns standard normal numbers, `[size]`, by Box and Muller's method from `os.urandom`."""
    half = -(-size // 2)
    words = np.frombuffer(os.urandom(16 * half), np.uint64)
    # 53 bits, the middle of each interval: never 0, of which there is no logarithm.
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log(uniform[:half])), 2 * np.pi * uniform[half:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size].astype(np.float32)
