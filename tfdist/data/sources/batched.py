"""Batches that somebody else makes, as Keras takes them: a batched dataset, a generator, a `PyDataset`, and so on."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist import keras_internals
from tfdist.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class BatchedSource:
    """Global batches, of any sizes: each is one step's.

    Attributes:
        dataset: Of batches.
        num_batches: In one pass; None where only the data's end will tell.
        reorder: Returns the dataset in the order that a seed stands for; None: its own is kept, as Keras does.
        peeked: The first batch, where looking at the dataset would take it away.
    """

    dataset: tf.data.Dataset
    num_batches: int | None
    reorder: Callable[[int], tf.data.Dataset] | None = None
    peeked: Any = None
    num_examples: None = None

    @functools.cached_property
    def first_batch(self) -> Any:
        """The first batch."""
        return next(iter(self.dataset)) if self.peeked is None else self.peeked

    @property
    def batch_size(self) -> int:
        """Examples in the first batch."""
        return int(tf.nest.flatten(self.first_batch)[0].shape[0])

    def sample_batch(self, size: int) -> Any:
        """Returns the start of the first batch, to build a model with."""
        return tf.nest.map_structure(
            lambda t: t if isinstance(t, tf.SparseTensor) else t[:size], self.first_batch
        )

    def map(self, function: Callable[..., Any]) -> BatchedSource:
        """Returns the batches that a TensorFlow function makes of these, of a tuple's parts one by one."""
        peeked, reorder = self.peeked, self.reorder
        if peeked is not None:
            peeked = function(*peeked) if isinstance(peeked, tuple) else function(peeked)
        return dataclasses.replace(
            self,
            dataset=self.dataset.map(function),
            peeked=peeked,
            reorder=None if reorder is None else lambda seed: reorder(seed).map(function),
        )


def yields_batches(data: Any) -> bool:
    """Tells whether data yield batches by what they are; of a dataset nobody knows."""
    return isinstance(data, (keras.utils.PyDataset, Iterator)) or keras_internals.is_torch_loader(data)


def build_batched(data: Any) -> BatchedSource:
    """Brings what yields batches to one form.

    Args:
        data: A batched `tf.data.Dataset`, a generator, a `keras.utils.PyDataset`, a PyTorch `DataLoader` or a grain
            dataset; a batch is `x`, `(x, y)` or `(x, y, sample_weight)`.

    Returns:
        The source. A generator is read once: what a pass has left the next one reads.

    Raises:
        ConfigError: If there is no batch.
    """
    if isinstance(data, tf.data.Dataset):
        count = int(data.cardinality())
        return BatchedSource(dataset=data, num_batches=count if count >= 0 else None)
    if isinstance(data, keras.utils.PyDataset):
        return _from_py_dataset(data)
    if isinstance(data, Iterator):
        return _from_generator(data)
    dataset, num_batches = keras_internals.adapt_batches(data)
    return BatchedSource(dataset=dataset, num_batches=num_batches)


def _from_generator(data: Iterator[Any]) -> BatchedSource:
    first = [_without_none(batch) for batch in itertools.islice(data, keras_internals.NUM_BATCHES_LOOKED_AT)]
    if not first:
        raise ConfigError("the generator yields no batch; let it yield at least one.")
    rest = itertools.chain(first, map(_without_none, data))
    spec = keras_internals.batch_spec(first)
    peeked = tf.nest.map_structure(lambda s, part: tf.convert_to_tensor(part, s.dtype), spec, first[0])
    dataset = tf.data.Dataset.from_generator(lambda: rest, output_signature=spec)
    return BatchedSource(dataset=dataset, num_batches=None, peeked=peeked)


def _from_py_dataset(data: keras.utils.PyDataset) -> BatchedSource:
    num_batches, read_batch = data.num_batches, keras_internals.batch_reader(data)
    num_seen = keras_internals.NUM_BATCHES_LOOKED_AT
    first = [_without_none(read_batch(place)) for place in range(min(num_seen, num_batches or num_seen))]
    if num_batches == 0:
        raise ConfigError(f"the {type(data).__name__} has no batches; let its __len__ be at least 1.")
    spec = keras_internals.batch_spec(first)
    flat = tf.nest.flatten(spec)

    def read(place: np.ndarray) -> list[np.ndarray]:
        parts = tf.nest.flatten(_without_none(read_batch(int(place))))
        return [np.asarray(part, s.dtype.as_numpy_dtype) for part, s in zip(parts, flat, strict=True)]

    def read_in_graph(place: tf.Tensor) -> Any:
        parts = tf.numpy_function(read, [place], [s.dtype for s in flat])
        for part, s in zip(parts, flat, strict=True):
            part.set_shape(s.shape)
        return tf.nest.pack_sequence_as(spec, parts)

    def read_all(places: tf.data.Dataset) -> tf.data.Dataset:
        # By as many threads as it has asked for, and in order.
        return places.map(read_in_graph, num_parallel_calls=max(1, data.workers), deterministic=True)

    if num_batches is None:
        return BatchedSource(dataset=read_all(tf.data.Dataset.counter()), num_batches=None)
    places = tf.data.Dataset.range(num_batches)
    return BatchedSource(
        dataset=read_all(places),
        num_batches=num_batches,
        reorder=lambda seed: read_all(places.shuffle(num_batches, seed=seed)),
    )


def _without_none(batch: Any) -> Any:
    """Leaves out targets and weights that are None, which no tensor stands for."""
    while isinstance(batch, tuple) and len(batch) > 1 and batch[-1] is None:
        batch = batch[:-1]
    return batch
