"""Examples that a Python object reads one by one at any place, such as a `tfds.data_source` or a PyTorch dataset."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfdist.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class IndexedSource:
    """Examples outside TensorFlow, any of which can be read at once.

    Attributes:
        examples: Has `__len__` and `__getitem__`, and `__getitems__` where it reads several better than one; an
            example is a nest of arrays, all of one shape.
        num_examples: Its length, which must stay what it is.
        spec: Nest as Keras's `train_step` takes it of each part's `TensorSpec` in one example.
        map_batch: TensorFlow function of a batch, of a tuple's parts one by one; None for the identity.
        num_parallel_reads: Batches read at once; more than one only from objects that threads may share.
    """

    examples: Any
    num_examples: int
    spec: Any
    map_batch: Callable[..., Any] | None = None
    num_parallel_reads: int = 1

    def sample_batch(self, size: int) -> Any:
        """Returns the first examples, to build a model with."""
        return self.take(tf.range(min(size, self.num_examples), dtype=tf.int64))

    def take(self, indices: tf.Tensor) -> Any:
        """Returns the examples at `indices` (`[n]` int64)."""
        flat = tf.nest.flatten(self.spec)
        columns = tf.numpy_function(self._read, [indices], [spec.dtype for spec in flat])
        for column, spec in zip(columns, flat, strict=True):
            column.set_shape([indices.shape[0], *spec.shape])
        batch = tf.nest.pack_sequence_as(self.spec, columns)
        if self.map_batch is None:
            return batch
        return self.map_batch(*batch) if isinstance(batch, tuple) else self.map_batch(batch)

    def check_length(self) -> None:
        """Makes sure that the data are as many as ever.

        Raises:
            ConfigError: If they are not.
        """
        if (length := len(self.examples)) != self.num_examples:
            raise ConfigError(
                f"the data source holds {length} examples, and held {self.num_examples} when the run began; its "
                "length must stay the same, since the order of an epoch follows from it: fix the source, or start "
                "another run on what it holds now."
            )

    def _read(self, indices: np.ndarray) -> list[np.ndarray]:
        places = indices.tolist()
        specs = tf.nest.flatten(self.spec)
        if not places:
            return [np.zeros([0, *spec.shape], spec.dtype.as_numpy_dtype) for spec in specs]
        if hasattr(self.examples, "__getitems__"):
            rows = self.examples.__getitems__(places)
        else:
            rows = [self.examples[place] for place in places]
        # A plain tuple needs no flattening, which would cost as much as reading it.
        is_flat = isinstance(self.spec, tuple) and len(self.spec) == len(specs) > 1
        columns = zip(*(rows if is_flat else map(tf.nest.flatten, rows)), strict=True)
        return [_stack(column, spec, places) for column, spec in zip(columns, specs, strict=True)]


def is_indexed(data: Any) -> bool:
    """Tells whether data are an object that reads examples by number; arrays and nests of them are not."""
    if isinstance(data, (str, bytes, tuple, list, Mapping)) or hasattr(data, "to_numpy"):
        return False
    return (
        hasattr(data, "__len__")
        and hasattr(data, "__getitem__")
        and not (hasattr(data, "__array__") or tf.is_tensor(data))
    )


def build_indexed(examples: Any, *, keys: Sequence[str] | None = None) -> IndexedSource:
    """Looks at an object's first example.

    Args:
        examples: As in `IndexedSource`. A `tfds.data_source` yields dicts: its supervised pair is taken.
        keys: Of such a dict, those that make `(x, y)`.

    Raises:
        ConfigError: If there are no examples.
    """
    if len(examples) == 0:
        raise ConfigError("the data source holds no examples; pass at least one.")
    # Asked only of what yields dicts; a data source that TFDS made says which of them it is trained on.
    keys = keys or getattr(getattr(examples, "dataset_info", None), "supervised_keys", None)
    first = examples[0]
    if keys and isinstance(first, Mapping):
        examples = _Chosen(examples, tuple(keys))
        first = examples[0]
    spec = tf.nest.map_structure(_spec, first)
    return IndexedSource(examples=examples, num_examples=len(examples), spec=spec)


class _Chosen:
    """Some entries of each example, as a tuple."""

    def __init__(self, examples: Any, keys: tuple[str, ...]) -> None:
        self._examples = examples
        self._keys = keys
        if hasattr(examples, "__getitems__"):
            self.__getitems__ = self._getitems

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, place: int) -> tuple[Any, ...]:
        example = self._examples[place]
        return tuple(example[key] for key in self._keys)

    def _getitems(self, places: Sequence[int]) -> list[tuple[Any, ...]]:
        return [tuple(example[key] for key in self._keys) for example in self._examples.__getitems__(places)]


def _spec(value: Any) -> tf.TensorSpec:
    array = np.asarray(value)
    # Keras computes in float32; NumPy's default of float64 would double the copies.
    dtype = tf.float32 if array.dtype == np.float64 else tf.as_dtype(array.dtype)
    return tf.TensorSpec(array.shape, dtype)


def _stack(values: Sequence[Any], spec: tf.TensorSpec, places: Sequence[int]) -> np.ndarray:
    if spec.dtype == tf.string:
        return np.array([v.encode() if isinstance(v, str) else v for v in values], dtype=object)
    try:
        stacked = np.array(values, spec.dtype.as_numpy_dtype)
    except ValueError:
        stacked = None
    if stacked is None or stacked.shape[1:] != tuple(spec.shape):
        place, shape = next(
            (place, np.shape(value))
            for place, value in zip(places, values, strict=True)
            if np.shape(value) != tuple(spec.shape)
        )
        raise ValueError(
            f"example {place} has shape {shape}, the first example {tuple(spec.shape)}; examples must all have the "
            "same: bring them to it where they are read."
        )
    return stacked
