"""TensorFlow's dataset operations that `tf.data.Dataset` has no method for, or a slower one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf


def apply_operation(
    operation: Callable[..., Any], dataset: tf.data.Dataset, spec: Any, **arguments: Any
) -> tf.data.Dataset:
    """Returns what a raw operation makes of a dataset.

    Args:
        operation: One of `tf.raw_ops`, with a single dataset as input.
        dataset: That input.
        spec: Nest of `TensorSpec`s: of the result's elements.
        arguments: What else the operation takes.
    """
    flat = tf.nest.flatten(spec)
    variant = operation(
        input_dataset=tf.data.experimental.to_variant(dataset),
        output_types=[s.dtype for s in flat],
        output_shapes=[s.shape for s in flat],
        **arguments,
    )
    return tf.data.experimental.from_variant(variant, spec)
