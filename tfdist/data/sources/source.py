"""What `fit` accepts as data, brought to one form: arrays, an indexed object, a stream, an own pipeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist.data.sources.batched import BatchedSource, build_batched, yields_batches
from tfdist.data.sources.indexed import IndexedSource, build_indexed, is_indexed
from tfdist.data.sources.sparse_rows import SparseRows, is_sparse
from tfdist.data.sources.tfds import TfdsSplit, load_arrays, load_split, parse_split
from tfdist.errors import ConfigError

DatasetFn = Callable[[tf.distribute.InputContext], tf.data.Dataset]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ArraySource:
    """Examples in memory, any of which can be taken at once.

    Attributes:
        tensors: Nest as Keras's `train_step` takes it, `x` alone as itself; each `[num_examples, …]`, on the host.
    """

    tensors: Any

    @property
    def num_examples(self) -> int:
        """Examples in one pass."""
        return int(tf.nest.flatten(self.tensors)[0].shape[0])

    def sample_batch(self, size: int) -> Any:
        """Returns the first examples, to build a model with."""
        return tf.nest.map_structure(lambda t: t[:size], self.tensors)

    def take(self, indices: tf.Tensor) -> Any:
        """Returns the examples at `indices` (`[n]` int64)."""
        return take(self.tensors, indices)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StreamSource:
    """Examples that come one after the other.

    Attributes:
        dataset: Of single examples.
        num_examples: Examples in one pass, None where the dataset does not know.
        num_files: Files that it reads, None where that is not known.
    """

    dataset: tf.data.Dataset
    num_examples: int | None
    num_files: int | None = None

    def sample_batch(self, size: int) -> Any:
        """Returns the first examples, to build a model with."""
        return next(iter(self.dataset.take(size).batch(size)))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SelfShardedSource:
    """A pipeline that shards itself.

    Attributes:
        local_dataset: `InputContext → Dataset` of one replica's batches.
    """

    local_dataset: DatasetFn
    num_examples: None = None

    def sample_batch(self, size: int) -> Any:
        """Returns the start of the first batch, to build a model with."""
        batch = next(iter(self.local_dataset(tf.distribute.InputContext())))
        return tf.nest.map_structure(lambda t: t[:size], batch)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ShardedSource:
    """One worker's own part of a stream; the parts may be of different lengths.

    Attributes:
        dataset: Of this worker's examples.
        stream: All examples.
    """

    dataset: tf.data.Dataset
    stream: StreamSource
    num_examples: None = None

    def sample_batch(self, size: int) -> Any:
        """Returns the stream's first examples, on each worker the same, to build a model with."""
        return self.stream.sample_batch(size)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ServedSource:
    """A stream whose examples other processes prepare, and hand to whichever worker asks next.

    Attributes:
        stream: All examples, as they are prepared.
        num_readers: Workers that share them.
        serve: Has a dataset prepared elsewhere, and returns what this worker gets of its elements. Every reader must
            call it as often; each call starts afresh.
    """

    stream: StreamSource
    num_readers: int
    serve: Callable[[tf.data.Dataset], tf.data.Dataset]
    num_examples: None = None

    def sample_batch(self, size: int) -> Any:
        """Returns the stream's first examples, on each worker the same, to build a model with."""
        return self.stream.sample_batch(size)


Source = (
    ArraySource
    | IndexedSource
    | StreamSource
    | BatchedSource
    | ShardedSource
    | ServedSource
    | SelfShardedSource
)


def has_varying_shapes(source: Source) -> bool:
    """Says whether a stream's examples are of several shapes, as sentences are."""
    stream = getattr(source, "stream", source)
    if not isinstance(stream, (StreamSource, BatchedSource)):
        return False
    first = int(isinstance(stream, BatchedSource))
    specs = tf.nest.flatten(stream.dataset.element_spec)
    return not all(isinstance(s, tf.TensorSpec) and s.shape[first:].is_fully_defined() for s in specs)


def take(tensors: Any, indices: tf.Tensor) -> Any:
    """Returns the examples at `indices` (`[n]` int64) of a nest of `[num_examples, …]` tensors."""
    return tf.nest.map_structure(lambda t: tf.gather(t, indices), tensors)


def build_source(
    data: Any,
    *,
    class_weight: Mapping[int, float] | None = None,
    sample_weight: Any = None,
    batched: bool = False,
) -> Source:
    """Brings what a user passes to `fit` to one form.

    Args:
        data: Arrays (`x`, `(x, y)` or `(x, y, sample_weight)`, each an array or a nest of arrays with examples
            along the first axis; also lists of numbers, data frames, and SciPy's sparse matrices, whose rows are made
            dense batch by batch), a `tf.data.Dataset` of examples, a
            `TfdsSplit` or "tfds:NAME/SPLIT", an object with `__len__` and `__getitem__` that yields examples, or a
            callable `InputContext → Dataset` of per-replica batches; or what yields batches, as `build_batched` takes
            it.
        class_weight: Class → weight of its examples.
        sample_weight: `[num_examples]` weights, for arrays.
        batched: Whether a dataset is one of batches.

    Raises:
        ConfigError: If arrays differ in length, are empty, or weights do not fit the data.
    """
    if isinstance(data, Source):
        source: Source = data
    elif batched or yields_batches(data):
        source = build_batched(data)
    elif isinstance(data, tf.data.Dataset):
        count = int(data.cardinality())
        source = StreamSource(dataset=data, num_examples=count if count >= 0 else None)
    elif _is_split(data):
        source = _from_split(data if isinstance(data, TfdsSplit) else parse_split(data))
    elif _is_read_by_number(data):
        source = build_indexed(data)
    elif callable(data):
        source = SelfShardedSource(local_dataset=data)
    elif any(map(is_sparse, tf.nest.flatten(data))):
        source = build_indexed(SparseRows(data))
    else:
        source = _from_arrays(data)
    return _weigh(source, class_weight, sample_weight)


def are_arrays(data: Any) -> bool:
    """Tells whether data are arrays, or nests of them, and nothing that yields examples or batches by itself."""
    is_one = isinstance(data, (Source, tf.data.Dataset)) or _is_split(data) or yields_batches(data)
    return not (is_one or _is_read_by_number(data) or callable(data))


def _is_split(data: Any) -> bool:
    return isinstance(data, TfdsSplit) or (isinstance(data, str) and data.startswith("tfds:"))


def _is_read_by_number(data: Any) -> bool:
    return is_indexed(data) and not is_sparse(data)


def hold_out(source: Source, fraction: float) -> tuple[ArraySource, ArraySource]:
    """Divides arrays, in their own order.

    Args:
        source: Arrays.
        fraction: Share of the examples, from the end, that goes into the second part; as Keras's `validation_split`.

    Returns:
        The rest, and the part held out.

    Raises:
        ConfigError: If the source is no arrays, or a part would be empty.
    """
    if not isinstance(source, ArraySource):
        raise ConfigError("validation_split needs arrays; pass validation_data for any other data.")
    at = int(source.num_examples * (1.0 - fraction))
    if not 0 < at < source.num_examples:
        raise ConfigError(
            f"validation_split={fraction} of {source.num_examples} examples leaves one part empty; "
            "choose a share between 0 and 1 that leaves some on both sides."
        )
    first = tf.nest.map_structure(lambda t: t[:at], source.tensors)
    return ArraySource(tensors=first), ArraySource(
        tensors=tf.nest.map_structure(lambda t: t[at:], source.tensors)
    )


def _from_split(split: TfdsSplit) -> Source:
    loaded, num_files = load_split(split)
    if not isinstance(loaded, tf.data.Dataset):
        return loaded
    arrays = load_arrays(loaded)
    if arrays is not None:
        return _from_arrays(arrays)
    return StreamSource(dataset=loaded, num_examples=int(loaded.cardinality()), num_files=num_files)


def _from_arrays(data: Any) -> ArraySource:
    data = tuple(data) if isinstance(data, tuple) else (data,)
    while len(data) > 1 and data[-1] is None:
        data = data[:-1]
    if len(data) > 3:
        raise ConfigError(
            f"data is a tuple of {len(data)}; it must be (x,), (x, y) or (x, y, sample_weight). "
            "Several inputs go into a list or a dict: ([a, b], y)."
        )
    data = tuple(_lists_as_arrays(part) for part in data)
    with tf.device("CPU:0"):
        tensors = tf.nest.map_structure(lambda a: tf.convert_to_tensor(_plain(a)), data)
    tensors = keras.utils.pack_x_y_sample_weight(*tensors)
    sizes = [t.shape[0] if t.shape.rank else None for t in tf.nest.flatten(tensors)]
    if not sizes or None in sizes or len(set(sizes)) > 1:
        raise ConfigError(
            f"arrays have first axes of {', '.join(map(str, sizes))} examples; they must all be the same."
        )
    if sizes[0] == 0:
        raise ConfigError("the data holds no examples; pass at least one.")
    return ArraySource(tensors=tensors)


def _lists_as_arrays(data: Any) -> Any:
    """Makes an array of a list of numbers or texts, or of lists of them; a list of arrays is several inputs."""
    if isinstance(data, Mapping):
        return {name: _lists_as_arrays(part) for name, part in data.items()}
    if not isinstance(data, list):
        return data
    if not all(isinstance(leaf, (bool, int, float, str, bytes)) for leaf in tf.nest.flatten(data)):
        return [_lists_as_arrays(part) for part in data]
    try:
        return np.asarray(data)
    except ValueError:
        raise ConfigError(
            "a list of data holds lists of different lengths, which make no array: pad them to one length."
        ) from None


def _plain(array: Any) -> Any:
    if isinstance(array, tf.RaggedTensor):
        raise ConfigError(
            "the data holds a tf.RaggedTensor, whose rows are of many lengths: bring them to one, as x.to_tensor() "
            "does, or pass a dataset: tf.data.Dataset.from_tensor_slices((x, y))."
        )
    if isinstance(array, tf.SparseTensor):
        raise ConfigError(
            "the data holds a tf.SparseTensor: pass SciPy's (scipy.sparse.csr_matrix), whose rows are made dense batch "
            "by batch, or tf.sparse.to_dense(x)."
        )
    if hasattr(array, "to_numpy"):
        array = array.to_numpy()
    # Keras computes in float32; NumPy's default of float64 would double the copies.
    if isinstance(array, np.ndarray) and array.dtype == np.float64:
        return array.astype(np.float32)
    return array


def _weigh(source: Source, class_weight: Mapping[int, float] | None, sample_weight: Any) -> Source:
    if class_weight is None and sample_weight is None:
        return source
    if class_weight is not None and sample_weight is not None:
        raise ConfigError("class_weight and sample_weight were both given; pass one of them.")
    if sample_weight is not None:
        if not isinstance(source, ArraySource):
            raise ConfigError("sample_weight goes with arrays; let a dataset yield (x, y, sample_weight).")
        return _from_arrays((*keras.utils.unpack_x_y_sample_weight(source.tensors)[:2], sample_weight))
    assert class_weight is not None
    return _weigh_classes(source, class_weight)


def _weigh_classes(source: Source, class_weight: Mapping[Any, float]) -> Source:
    def weigh(*batch: Any) -> Any:
        if len(batch) != 2 or not tf.is_tensor(batch[1]):
            raise ConfigError("class_weight needs data of the form (x, y) with a single y.")
        return *batch, class_weights(batch[1], class_weight)

    def weigh_one(*example: Any) -> Any:
        rows = tf.nest.map_structure(lambda t: t[None], example)
        return tf.nest.map_structure(lambda t: t[0], weigh(*rows))

    if isinstance(source, ArraySource):
        tensors = source.tensors
        return ArraySource(tensors=weigh(*tensors) if isinstance(tensors, tuple) else weigh(tensors))
    if isinstance(source, IndexedSource):
        return dataclasses.replace(source, map_batch=_compose(source.map_batch, weigh))
    if isinstance(source, BatchedSource):
        return source.map(weigh)
    if isinstance(source, SelfShardedSource):
        build = source.local_dataset
        return SelfShardedSource(local_dataset=lambda context: build(context).map(weigh))
    if isinstance(source, ServedSource):
        stream = dataclasses.replace(source.stream, dataset=source.stream.dataset.map(weigh_one))
        return dataclasses.replace(source, stream=stream)
    return dataclasses.replace(source, dataset=source.dataset.map(weigh_one))


def _compose(first: Callable[..., Any] | None, then: Callable[..., Any]) -> Callable[..., Any]:
    return then if first is None else lambda *batch: then(*first(*batch))


def class_weights(y: tf.Tensor, class_weight: Mapping[Any, float]) -> tf.Tensor:
    """Returns each example's weight, `[n]` float32, as Keras's `class_weight_to_sample_weights` does of arrays.

    A soft label is rounded to its class, half to even; a row of several is of the class that is largest in it; a class
    that is not named weighs 1.

    Args:
        y: `[n]`, `[n, 1]` or `[n, classes]`.
        class_weight: Class → weight; a key of any type that equals a whole number.

    Raises:
        ConfigError: If `y` has another shape.
    """
    if y.shape.rank not in (1, 2):
        raise ConfigError(
            f"class_weight with y of shape {tuple(y.shape)}: an example has one class; pass sample_weight instead."
        )
    if y.shape.rank == 2:
        y = tf.argmax(y, -1) if y.shape[-1] != 1 else y[:, 0]
    classes = tf.cast(tf.round(tf.cast(y, tf.float64)), tf.int64)
    named = {int(label): weight for label, weight in class_weight.items() if label == int(label)}
    if not named:
        return tf.ones_like(classes, tf.float32)
    labels, weights = tf.constant(list(named), tf.int64), tf.constant(list(named.values()), tf.float32)
    is_of = tf.equal(classes[:, None], labels)
    return tf.where(tf.reduce_any(is_of, 1), tf.gather(weights, tf.argmax(tf.cast(is_of, tf.int32), 1)), 1.0)
