"""One process's blocks of a model's layers, and what the layers do in place of their own calls to compute them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfdist import keras_internals
from tfdist.data.order import part_slice
from tfdist.keras_internals import LayerCall
from tfdist.training.tensor_parallel.divided import DividedLayers
from tfdist.training.tensor_parallel.group import ProcessGroup
from tfdist.training.tensor_parallel.vocabulary import DividedVocabulary

Call = Callable[..., Any]


class OwnBlocks:
    """What a process has of the layers that are divided; by default all.

    Args:
        layers: The divided ones.
        group: The processes that have the other blocks.
        block: Which this is.
    """

    def __init__(
        self, layers: DividedLayers | None = None, group: ProcessGroup | None = None, block: int = 0
    ) -> None:
        self._layers = layers or DividedLayers()
        self.group = group or ProcessGroup(1)
        self.block = block

    def part(self, variable: keras.Variable) -> tuple[slice, ...] | None:
        """Returns what is here of a variable; None: all."""
        return self._layers.part(variable, self.block)

    def divide_calls(self, calls: Sequence[LayerCall]) -> None:
        """Makes the divided layers among those that are called compute their blocks."""
        layers: dict[int, Any] = {id(call.operation): call for call in calls}
        for key, call in layers.items():
            if key in self._layers.kinds:
                self._divide_call(call, self._layers.kinds[key])

    def _divide_call(self, call: LayerCall, kind: str) -> None:
        layer: Any = call.operation
        replace, group = keras_internals.replace_call, self.group
        if kind == "columns":
            replace(layer, functools.partial(_entering, group=group))
        elif kind == "rows":
            layer.input_spec = None  # It knows the width of the whole.
            self._sum_rows(layer, lambda x: keras.ops.matmul(x, layer.kernel))
        elif kind == "heads":
            _, dropout = keras_internals.attention_parts(layer)
            last = layer.output_dense
            self._sum_rows(last, lambda x: keras.ops.einsum(last.equation, x, last.kernel))
            replace(dropout, functools.partial(_dropping, axis=1, place=self._place(layer.num_heads)))
            replace(layer, functools.partial(_attending, group=group))
        elif kind == "vocabulary":
            replace(layer, functools.partial(_looking_up, group=group, place=self._place(layer.input_dim)))
        elif kind == "drops":
            # Of its part what it would drop of the whole.
            place = self._place(call.outputs[0].shape[-1])
            replace(layer, functools.partial(_dropping, axis=-1, place=place))

    def _sum_rows(self, layer: Any, multiply: Call) -> None:
        keras_internals.replace_call(
            layer, lambda _: functools.partial(_sum_rows, layer, multiply, self.group)
        )

    def _place(self, size: int) -> tuple[int, int, int]:
        """Returns how long an axis of the whole is, and where this block begins and ends on it."""
        return size, *part_slice(size, self.block, self.group.size)

    def vocabulary(self, model: keras.Model) -> DividedVocabulary | None:
        """Returns what a model's outputs are parts of; None: they are whole."""
        if not self._layers.has_vocabulary:
            return None
        ignored = getattr(model.loss, "ignore_class", None)
        return DividedVocabulary(model.outputs[0].shape[-1], self.group, self.block, ignored)


def _entering(call: Call, group: ProcessGroup) -> Call:
    @functools.wraps(call)
    def entering(inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return call(group.enter(inputs), *args, **kwargs)

    return entering


def _sum_rows(layer: Any, multiply: Call, group: ProcessGroup, inputs: Any, training: Any = None) -> Any:
    """Does what `Dense` and `EinsumDense` do; the products are added up before the bias, which all have whole."""
    del training
    outputs = group.sum(multiply(inputs))
    if layer.bias is not None:
        outputs = keras.ops.add(outputs, layer.bias)
    return outputs if layer.activation is None else layer.activation(outputs)


def _attending(call: Call, group: ProcessGroup) -> Call:
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


def _looking_up(call: Call, group: ProcessGroup, place: tuple[int, int, int]) -> Call:
    _, start, stop = place

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
