"""Iterators of `tf.data`, and Keras's adapters of batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras.src.trainers import data_adapters
from keras.src.trainers.data_adapters import data_adapter_utils
from keras.src.trainers.data_adapters.py_dataset_adapter import PyDatasetAdapter

# Of a generator or `PyDataset` Keras looks at so many batches, to see which axes vary.
NUM_BATCHES_LOOKED_AT: int = data_adapter_utils.NUM_BATCHES_FOR_TENSOR_SPEC
# Of `ExternalStatePolicy`: saving says no, rather than leave something out.
_FAIL_ON_EXTERNAL_STATE = 2


def save_iterator(iterator: Any) -> bytes:
    """Returns where a `tf.data` iterator stands, with what its buffers hold.

    Leans on `OwnedIterator._iterator_resource`; the public `tf.train.Checkpoint` takes the same way to a file.

    Raises:
        OpError: `tf.errors.OpError` if a part of the pipeline cannot be saved.
    """
    state = tf.raw_ops.SerializeIterator(
        resource_handle=iterator._iterator_resource, external_state_policy=_FAIL_ON_EXTERNAL_STATE
    )
    return tf.io.serialize_tensor(state).numpy()


def stop_data_server(server: Any) -> None:
    """Stops a server of a tf.data service at once; its public end is that of the process, or of the last reference.

    Leans on `DispatchServer._stop` and `WorkerServer._stop`.
    """
    server._stop()


def restore_iterator(iterator: Any, content: bytes) -> None:
    """Brings a fresh iterator over the same pipeline to where `save_iterator` found another.

    Leans on `OwnedIterator._iterator_resource`.

    Raises:
        OpError: `tf.errors.OpError` if the pipeline is another one.
    """
    tf.raw_ops.DeserializeIterator(
        resource_handle=iterator._iterator_resource, serialized=tf.io.parse_tensor(content, tf.variant)
    )


def batch_spec(batches: Sequence[Any]) -> Any:
    """Returns the nest of `tf.TypeSpec` that batches have in common, axes in which they differ left open.

    Leans on `data_adapter_utils.get_tensor_spec`.
    """
    return data_adapter_utils.get_tensor_spec(batches)


def batch_reader(data: keras.utils.PyDataset) -> Callable[[int], Any]:
    """Returns what reads a batch by its number, as Keras would hand it to `train_step`.

    Leans on `PyDatasetAdapter._standardize_batch`.
    """
    adapter = PyDatasetAdapter(data)
    return lambda place: adapter._standardize_batch(data[place])


def is_torch_loader(data: Any) -> bool:
    """Tells whether data are a PyTorch `DataLoader`, without PyTorch. Leans on `data_adapters.is_torch_dataloader`."""
    return bool(data_adapters.is_torch_dataloader(data))


def is_grain_dataset(data: Any) -> bool:
    """Tells whether data are grain's, without grain. Leans on `data_adapters.is_grain_dataset`."""
    return bool(data_adapters.is_grain_dataset(data))


def adapt_batches(data: Any) -> tuple[tf.data.Dataset, int | None]:
    """Returns what Keras makes of data that yield batches, and how many they are. Leans on `get_data_adapter`."""
    adapter = data_adapters.get_data_adapter(data)
    return adapter.get_tf_dataset(), adapter.num_batches
