"""What the chief and a worker tell each other about a closure, in few tensors: each is a message of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfdist import keras_internals


class PackedFunction:
    """A function whose results come back as one tensor of bytes, where their sizes are known.

    Args:
        body: Takes and returns nests of tensors.

    Attributes:
        function: What a worker is to run.
    """

    def __init__(self, body: Callable[..., Any]) -> None:
        self._body = body
        self._specs: Any = None
        self.function: Any = tf.function(self._run, autograph=False)

    def _run(self, *args: Any) -> Any:
        results = self._body(*args)
        tensors = tf.nest.flatten(results)
        if not all(isinstance(t, tf.Tensor) and _is_plain(t) for t in tensors):
            self._specs = None
            return results
        specs = [tf.TensorSpec(t.shape, t.dtype) for t in tensors]
        self._specs = tf.nest.pack_sequence_as(results, specs)
        return tf.concat([_to_bytes(t) for t in tensors], 0)

    def unpack(self, message: Any) -> Any:
        """Returns what `body` has returned, as NumPy arrays, from what was fetched of `function`."""
        if self._specs is None:
            return message
        content, place = message.tobytes(), 0
        arrays = []
        for spec in tf.nest.flatten(self._specs):
            dtype = np.dtype(spec.dtype.as_numpy_dtype)
            count = spec.shape.num_elements()
            arrays.append(np.frombuffer(content, dtype, count, place).reshape(spec.shape))
            place += count * dtype.itemsize
        return tf.nest.pack_sequence_as(self._specs, arrays)


class Scheduled(NamedTuple):
    """A closure on its way.

    Attributes:
        value: TensorFlow's.
        closure: What was scheduled.
    """

    value: Any
    closure: PackedFunction

    @property
    def has_ended(self) -> bool:
        """Whether its result, or its error, is there."""
        return keras_internals.is_available(self.value)


def pack_batches(batches: list[Any]) -> Any:
    """Returns batches as one nest of tensors that are longer by an axis, if they are plain tensors of equal shapes."""
    flat = [tf.nest.flatten(batch) for batch in batches]
    is_plain = all(isinstance(t, tf.Tensor) for tensors in flat for t in tensors)
    # The last batch is short, and accumulates with the one before; sentences are of any length.
    if (
        len(batches) == 1
        or not is_plain
        or any(len({t.shape for t in same}) > 1 for same in zip(*flat, strict=True))
    ):
        return {"each": batches}
    return {"stacked": tf.nest.map_structure(lambda *parts: tf.stack(parts), *batches)}


def unpack_batch(packed: Any, place: int) -> Any:
    """Returns one of the batches that `pack_batches` has packed."""
    if "each" in packed:
        return packed["each"][place]
    return tf.nest.map_structure(lambda tensor: tensor[place], packed["stacked"])


def _is_plain(tensor: tf.Tensor) -> bool:
    dtype = tensor.dtype
    return tensor.shape.is_fully_defined() and (dtype.is_floating or dtype.is_integer or dtype.is_bool)


def _to_bytes(tensor: tf.Tensor) -> tf.Tensor:
    if tensor.dtype.is_bool:
        tensor = tf.cast(tensor, tf.uint8)
    return tf.reshape(tf.bitcast(tensor, tf.uint8), [-1])
