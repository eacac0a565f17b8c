"""What `fit`, `evaluate` and `predict` are given as data, read as Keras reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfdist import keras_internals
from tfdist.config.privacy_options import PrivacyOptions
from tfdist.config.ps_options import PsOptions
from tfdist.config.sync_options import SyncOptions
from tfdist.data.sources.batched import BatchedSource
from tfdist.data.sources.source import Source, are_arrays, build_source, hold_out
from tfdist.errors import ConfigError
from tfdist.training.checkpoint.store import Checkpoints

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


# Wide: one field for each argument of `Run.fit`.
@dataclasses.dataclass(frozen=True, kw_only=True)
class FitArguments:
    """The arguments of `Run.fit`, which says what they mean."""

    model: keras.Model
    x: Any
    y: Any
    batch_size: int | None
    epochs: int
    verbose: int | str
    callbacks: Any
    validation_split: float
    validation_data: Any
    shuffle: bool
    class_weight: dict[int, float] | None
    sample_weight: Any
    initial_epoch: int
    steps_per_epoch: int | None
    validation_steps: int | None
    validation_batch_size: int | None
    validation_freq: int | Sequence[int]
    checkpoints: Checkpoints | None
    on_nan: str
    max_loss_spike: float | None
    drop_remainder: bool
    shard: str
    data_service: str | None
    steps_per_loop: int | None
    jit_compile: str | None
    sync: str | SyncOptions
    ps: str | PsOptions
    privacy: PrivacyOptions | None

    @property
    def sync_options(self) -> SyncOptions:
        """What crosses between workers, checked."""
        return SyncOptions(sync=self.sync) if isinstance(self.sync, str) else self.sync

    @property
    def ps_options(self) -> PsOptions:
        """What parameter servers' workers do together, checked."""
        options = PsOptions(ps_mode=self.ps) if isinstance(self.ps, str) else self.ps
        if self.steps_per_loop is None:
            return options
        return dataclasses.replace(options, steps_per_loop=self.steps_per_loop)


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


def read_fit_data(given: FitArguments) -> FitData:
    """Brings all that `fit` is given as data to one form.

    Raises:
        ConfigError: If one of the arguments does not go with another.
    """
    x, y, sample_weight = given.x, given.y, given.sample_weight
    validation_data = given.validation_data
    if given.validation_split and validation_data is None:
        held = build_source(x if y is None else (x, y), sample_weight=sample_weight)
        x, validation_data = hold_out(held, given.validation_split)
        y = sample_weight = None
    source, size = read_data(
        given.model, x, y, sample_weight, batch_size=given.batch_size, class_weight=given.class_weight
    )
    if isinstance(source, BatchedSource):
        size = source.batch_size  # here alone, as their first one is read for it
    validation, validation_size = None, 0
    if validation_data is not None:
        is_tuple = isinstance(validation_data, (tuple, list))  # of a list, too, Keras makes (x, y)
        parts = keras.utils.unpack_x_y_sample_weight(validation_data) if is_tuple else (validation_data,)
        validation, validation_size = read_data(
            given.model, *parts, batch_size=given.validation_batch_size or given.batch_size
        )
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
