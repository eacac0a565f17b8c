"""What `fit`, `evaluate` and `predict` are given as data, read as Keras reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from tfdist import keras_internals
from tfdist.data.sources.batched import BatchedSource
from tfdist.data.sources.source import Source, are_arrays, build_source, hold_out
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
        The source, and the examples of a step, which says nothing of data that yield batches.

    Raises:
        ConfigError: If one of the arguments does not go with another.
    """
    if x is None:
        raise ConfigError("x is None: pass arrays, a dataset, or anything else that keras.Model.fit takes.")
    if y is not None:
        if not are_arrays(x):
            raise ConfigError(f"y beside x of type {type(x).__name__}: let it yield (x, y), and leave y out.")
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
    if isinstance(source, BatchedSource) and batch_size is not None:
        raise ConfigError(
            f"batch_size={batch_size} with x of type {type(x).__name__}, which yields batches: leave it out; each "
            "of its batches is one step's."
        )
    return source, _BATCH_SIZE if batch_size is None else batch_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitData:
    """What `fit` trains and validates on.

    Attributes:
        source: To train on.
        batch_size: Examples of a step.
        validation: To validate on, or None.
        validation_batch_size: Of it; 0 without one.
    """

    source: Source
    batch_size: int
    validation: Source | None
    validation_batch_size: int


def read_fit_data(
    model: keras.Model,
    train: tuple[Any, Any, Any],
    *,
    batch_size: int | None,
    class_weight: Mapping[int, float] | None,
    validation_split: float,
    validation_data: Any,
    validation_batch_size: int | None,
) -> FitData:
    """Brings all that `fit` is given as data to one form.

    Args:
        model: As for `read_data`.
        train: `x`, `y` and `sample_weight`.
        batch_size: As for `read_data`.
        class_weight: Class → weight.
        validation_split: Share of the arrays to hold out, where there is no `validation_data`.
        validation_data: `(x, y)`, `(x, y, sample_weight)` or anything else that `x` may be; None: nothing.
        validation_batch_size: None: `batch_size`.

    Raises:
        ConfigError: If one of the arguments does not go with another.
    """
    x, y, sample_weight = train
    if validation_split and validation_data is None:
        held = build_source(x if y is None else (x, y), sample_weight=sample_weight)
        x, validation_data = hold_out(held, validation_split)
        y = sample_weight = None
    source, size = read_data(model, x, y, sample_weight, batch_size=batch_size, class_weight=class_weight)
    if isinstance(source, BatchedSource):
        size = source.batch_size  # here alone, as their first one is read for it
    validation, validation_size = None, 0
    if validation_data is not None:
        is_tuple = isinstance(validation_data, (tuple, list))  # of a list, too, Keras makes (x, y)
        parts = keras.utils.unpack_x_y_sample_weight(validation_data) if is_tuple else (validation_data,)
        validation, validation_size = read_data(model, *parts, batch_size=validation_batch_size or batch_size)
    return FitData(
        source=source, batch_size=size, validation=validation, validation_batch_size=validation_size
    )


def _are_inputs(model: keras.Model, x: tuple[Any, ...]) -> bool:
    """Tells whether a tuple without y is one of a model's inputs, as Keras takes it, and not `(x, y)`."""
    return len(x) > 1 and len(x) == len(keras_internals.known_inputs(model)) == len(tf.nest.flatten(x))


def epoch_ends(x: Any) -> list[keras.callbacks.Callback]:
    """Returns what tells a `PyDataset` that an epoch begins or ends, as Keras tells it."""
    if not isinstance(x, keras.utils.PyDataset):
        return []
    return [
        keras.callbacks.LambdaCallback(
            on_train_begin=lambda logs: x.on_epoch_end(),  # as Keras does
            on_epoch_begin=lambda epoch, logs: x.on_epoch_begin(),
            on_epoch_end=lambda epoch, logs: x.on_epoch_end(),
        )
    ]
