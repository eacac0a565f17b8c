"""The first examples of a source, with which a model is built, and whether they are what it takes."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tfdist import keras_internals
from tfdist.data.read_errors import readable_faults
from tfdist.data.sources.batched import BatchedSource
from tfdist.data.sources.source import Source, StreamSource
from tfdist.errors import ConfigError


def read_first_batch(model: keras.Model, source: Source, *, strategy: str, num_replicas: int) -> Any:
    """Returns a batch of two examples, or as many as the model's fixed batch has.

    Raises:
        ConfigError: If the model's batch is fixed and would be divided.
    """
    inputs = keras_internals.known_inputs(model)
    fixed = next((x.shape[0] for x in inputs if x.shape and x.shape[0] is not None), None)
    if fixed is not None and (strategy == "ps" or num_replicas > 1):
        raise ConfigError(
            f"the model {model.name!r} has a fixed batch of {fixed} examples, and under {strategy} batches are shared "
            "out: leave its batch size open, or choose one_device."
        )
    with readable_faults():
        return source.sample_batch(fixed or 2)


# Tensors of which no rows can be taken, and what makes them plain ones.
_NO_ROWS = (
    (tf.SparseTensorSpec, "tf.SparseTensor", "tf.sparse.to_dense(x)"),
    (tf.RaggedTensorSpec, "tf.RaggedTensor", "x.to_tensor(shape=[LENGTH])"),
)


def check_elements(model: keras.Model, source: Source, *, shares: bool) -> None:
    """Makes sure that a dataset's elements are the examples, or batches, that they are taken for, as their shapes tell.

    Raises:
        ConfigError: If they are not, or cannot be shared by replicas.
    """
    if not isinstance(source, (StreamSource, BatchedSource)):
        return
    element = source.dataset.element_spec
    for kind, name, dense in _NO_ROWS:
        if shares and any(isinstance(spec, kind) for spec in tf.nest.flatten(element)):
            raise ConfigError(
                f"an element of the dataset holds a {name}, which replicas cannot share out: make it dense where it is "
                f"read, as by dataset.map(lambda x, y: ({dense}, y)), or choose one_device."
            )
    shapes = [tuple(x.shape[1:]) for x in keras_internals.known_inputs(model)]
    parts = element if isinstance(element, tuple) else (element,)
    found = [spec.shape for spec in tf.nest.flatten(parts) if isinstance(spec, tf.TensorSpec)]
    x = [spec.shape for spec in tf.nest.flatten(parts[0]) if isinstance(spec, tf.TensorSpec)]
    if any(shape.rank is None for shape in found):
        return
    if isinstance(source, BatchedSource):
        are_examples = any(shape.rank == 0 for shape in found) or (
            len(x) == len(shapes) > 0
            and all(tuple(own) == asked and None not in asked for own, asked in zip(x, shapes, strict=True))
        )
        if are_examples:
            raise ConfigError(
                f"an element of the dataset is one example (x has shape {tuple(x[0])}), and must be a batch where no "
                "batch_size is given, as in Keras: pass batch_size=32, or dataset.batch(32)."
            )
        return
    if len(x) == len(shapes):
        are_batches = any(own.rank > len(asked) for own, asked in zip(x, shapes, strict=True))
    else:
        # Of a model that takes anything: `batch` leaves the first axis of each part open.
        are_batches = len(found) > 1 and all(shape.rank and shape[0] is None for shape in found)
    if are_batches:
        taken = f", and the model takes {shapes[0]}" if len(x) == len(shapes) else ""
        raise ConfigError(
            f"an element of the dataset is a batch (x has shape {tuple(x[0])}{taken}), and must be one example: pass "
            "dataset.unbatch(), or leave batch_size out: each of its batches is one step's then."
        )
