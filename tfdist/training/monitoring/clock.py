"""The clock, read inside a graph, where there is one to read."""

from __future__ import annotations

import contextlib
from typing import Any

import tensorflow as tf

from tfdist import keras_internals


def has_gpu() -> bool:
    """Says whether steps run on a GPU: the host hands them out there, and does not wait for them."""
    return bool(tf.config.list_logical_devices("GPU"))


def on_host() -> contextlib.AbstractContextManager[None]:
    """Keeps what is computed of times on the host: on a GPU it would wait in line behind the step."""
    return tf.device("CPU:0")


def now_after(values: Any) -> tf.Tensor:
    """Reads the clock, in seconds since 1970, float64 scalar, when all values are there, which the host computes.

    It is 0 where TensorFlow must be deterministic, for it refuses to read the clock.
    """
    with on_host(), tf.control_dependencies(tf.nest.flatten(values, expand_composites=True)):
        return tf.constant(0.0, tf.float64) if keras_internals.is_deterministic() else tf.timestamp()


def step_time_after(values: Any) -> tf.Tensor:
    """Reads the clock, as `now_after`, when a step has computed these values.

    It is 0 on a GPU, where the host would have to wait to know.
    """
    if has_gpu():
        with on_host():
            return tf.constant(0.0, tf.float64)
    return now_after(values)
