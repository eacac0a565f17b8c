"""What `fit`, `evaluate` and `predict` are given as data, read as Keras reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from tfdist import keras_internals
from tfdist.data import ArraySource, BatchedSource, Source, build_source
from tfdist.errors import ConfigError

_BATCH_SIZE = 32  # Keras's


def read_data(
    model: keras.Model,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    batch_size: int | None,
    class_weight: Mapping[int, float] | None = None,
) -> tuple[Source, int]:
    """Brings data to one form.

    Args:
        model: Tells a tuple of its inputs from `(x, y)`.
        x: As `Run.fit` takes it.
        y: Of arrays.
        sample_weight: Of arrays.
        batch_size: As `Run.fit` takes it: None says that a `tf.data.Dataset` is one of batches.
        class_weight: Class → weight.

    Returns:
        The source, and the examples of a step.

    Raises:
        ConfigError: If one of the arguments does not go with another.
    """
    if x is None:
        raise ConfigError("x is None: pass arrays, a dataset, or anything else that keras.Model.fit takes.")
    if y is not None:
        data = (x, y)
    elif isinstance(x, tuple):
        data = (list(x),) if _are_inputs(model, x) else x
    else:
        data = x
    is_dataset = isinstance(x, tf.data.Dataset) or keras_internals.is_grain_dataset(x)
    source = build_source(
        data,
        class_weight=class_weight,
        sample_weight=sample_weight,
        batched=is_dataset and batch_size is None,
    )
    if y is not None and not isinstance(source, ArraySource):
        raise ConfigError(f"y beside x of type {type(x).__name__}: let it yield (x, y), and leave y out.")
    if not isinstance(source, BatchedSource):
        return source, _BATCH_SIZE if batch_size is None else batch_size
    if batch_size is not None:
        raise ConfigError(
            f"batch_size={batch_size} with x of type {type(x).__name__}, which yields batches: leave it out; each "
            "of its batches is one step's."
        )
    return source, source.batch_size


def _are_inputs(model: keras.Model, x: tuple[Any, ...]) -> bool:
    """Tells whether a tuple without y is one of a model's inputs, as Keras takes it, and not `(x, y)`."""
    return len(x) > 1 and len(x) == len(keras_internals.known_inputs(model)) == len(tf.nest.flatten(x))


def epoch_ends(x: Any) -> list[keras.callbacks.Callback]:
    """Returns what tells a `PyDataset` that an epoch begins or ends, as Keras tells it."""
    if not isinstance(x, keras.utils.PyDataset):
        return []
    return [
        keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: x.on_epoch_begin(),
            on_epoch_end=lambda epoch, logs: x.on_epoch_end(),
        )
    ]
