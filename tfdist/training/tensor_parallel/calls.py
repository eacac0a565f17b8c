"""What the layers of a process do in place of their own calls, where they have a part of their weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tfdist import keras_internals
from tfdist.data.order import part_slice
from tfdist.training.tensor_parallel.group import BlockGroup

Call = Callable[..., Any]


def divide_call(layer: Any, kind: str, group: BlockGroup, block: int) -> None:
    """Makes a layer compute its part.

    Args:
        layer: Built, with the parts of its weights.
        kind: As in `DividedLayers.kinds`.
        group: The processes that have the others.
        block: Which this is.
    """
    if kind == "columns":
        keras_internals.replace_call(layer, functools.partial(_entering, group=group))
    elif kind == "rows":
        multiply = functools.partial(_multiply, layer)
        layer.input_spec = None  # It knows the width of the whole.
        keras_internals.replace_call(layer, lambda call: functools.partial(_sum_rows, layer, multiply, group))
    elif kind == "heads":
        _, dropout = keras_internals.attention_parts(layer)
        last = layer.output_dense
        multiply = functools.partial(_multiply_all, last)
        keras_internals.replace_call(last, lambda call: functools.partial(_sum_rows, last, multiply, group))
        place = (layer.num_heads, *part_slice(layer.num_heads, block, group.size))
        keras_internals.replace_call(dropout, functools.partial(_dropping, axis=1, place=place))
        keras_internals.replace_call(layer, functools.partial(_attending, group=group))
    elif kind == "vocabulary":
        own = part_slice(layer.input_dim, block, group.size)
        keras_internals.replace_call(layer, functools.partial(_looking_up, group=group, words=own))


def divide_dropout(layer: Any, size: int, group: BlockGroup, block: int) -> None:
    """Makes a layer drop of its part what it would drop of the whole, whose last axis has that size."""
    place = (size, *part_slice(size, block, group.size))
    keras_internals.replace_call(layer, functools.partial(_dropping, axis=-1, place=place))


def _entering(call: Call, group: BlockGroup) -> Call:
    @functools.wraps(call)
    def entering(inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return call(group.enter(inputs), *args, **kwargs)

    return entering


def _multiply(layer: keras.layers.Dense, inputs: Any) -> Any:
    return keras.ops.matmul(inputs, layer.kernel)


def _multiply_all(layer: keras.layers.EinsumDense, inputs: Any) -> Any:
    return keras.ops.einsum(layer.equation, inputs, layer.kernel)


def _sum_rows(layer: Any, multiply: Call, group: BlockGroup, inputs: Any, training: Any = None) -> Any:
    """Does what `Dense` and `EinsumDense` do; the products are added up before the bias, which all have whole."""
    del training
    outputs = group.sum(multiply(inputs))
    if layer.bias is not None:
        outputs = keras.ops.add(outputs, layer.bias)
    return outputs if layer.activation is None else layer.activation(outputs)


def _attending(call: Call, group: BlockGroup) -> Call:
    @functools.wraps(call)
    def attending(query: Any, value: Any, key: Any = None, **kwargs: Any) -> Any:
        entered: dict[int, Any] = {}

        def enter(x: Any) -> Any:
            # Query, key and value are one tensor in self-attention, and come back as one gradient.
            if x is not None and id(x) not in entered:
                entered[id(x)] = keras_internals.keep_mask(x, group.enter(x))
            return None if x is None else entered[id(x)]

        return call(enter(query), enter(value), key=enter(key), **kwargs)

    return attending


def _dropping(call: Call, axis: int, place: tuple[int, int, int]) -> Call:
    size, start, stop = place

    @functools.wraps(call)
    def dropping(inputs: Any, training: Any = False) -> Any:
        if not training:
            return inputs
        shape = tf.unstack(tf.shape(inputs))
        shape[axis] = size
        kept = call(tf.ones(shape, inputs.dtype), training=training)
        cut: list[Any] = [slice(None)] * len(shape)
        cut[axis] = slice(start, stop)
        return inputs * kept[tuple(cut)]

    return dropping


def _looking_up(call: Call, group: BlockGroup, words: tuple[int, int]) -> Call:
    start, stop = words

    @functools.wraps(call)
    def looking_up(inputs: Any, reverse: bool = False) -> Any:
        if reverse:
            return call(group.enter(inputs), reverse=True)
        ids = tf.cast(inputs, tf.int32)
        # Of other words nothing is looked up: a row that nobody asked for would get a gradient of zeros, by which
        # optimizers that move the rows of a batch move it, too.
        own = tf.where((ids >= start) & (ids < stop))
        rows = call(tf.gather_nd(ids, own) - start)
        shape = tf.concat([tf.shape(ids), tf.shape(rows)[-1:]], 0)
        found = tf.scatter_nd(tf.cast(own, tf.int32), rows, shape)
        return group.sum(tf.ensure_shape(found, [*ids.shape, rows.shape[-1]]))

    return looking_up
