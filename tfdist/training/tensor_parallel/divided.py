"""Which layers of a model are divided in blocks, and along which axis each of their weights is."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import keras

from tfdist import keras_internals
from tfdist.data.order import part_slice
from tfdist.errors import ConfigError
from tfdist.keras_internals import LayerCall
from tfdist.layers.blocks import Kind, wanted_kind
from tfdist.training.tensor_parallel.by_parts import (
    acts_by_parts,
    is_divisible,
    maps_by_parts,
    updates_by_parts,
)

# A smaller table costs more to bring together than it takes.
_LEAST_TABLE_BYTES = 1 << 20
# Keras's names for the metric of labels among logits.
_ACCURACY = ("accuracy", "acc", "sparse_categorical_accuracy")


@dataclasses.dataclass
class DividedLayers:
    """The layers that are divided.

    Attributes:
        num_blocks: Into so many each.
        kinds: How each is, by the layer's id; `drops` a layer between two that drops some of the features.
        axes: Along which each of their weights is divided, by the weight's id; others every process has whole.
        tensors: The `id` of each symbolic tensor of which each process has a part, along its last axis.
        has_vocabulary: Whether the model's output is one of these.
    """

    num_blocks: int = 1
    kinds: dict[int, str] = dataclasses.field(default_factory=dict)
    axes: dict[int, int] = dataclasses.field(default_factory=dict)
    tensors: set[int] = dataclasses.field(default_factory=set)
    has_vocabulary: bool = False

    def part(self, variable: keras.Variable, block: int) -> tuple[slice, ...] | None:
        """Returns what a process has of a weight; None: all."""
        axis = self.axes.get(id(variable))
        if axis is None:
            return None
        return (*axis * [slice(None)], slice(*part_slice(variable.shape[axis], block, self.num_blocks)))

    def share(self, variable: keras.Variable) -> float:
        """Returns the share of a weight that one process has."""
        return 1 / self.num_blocks if id(variable) in self.axes else 1.0

    def follow(self, slot: keras.Variable, weight: keras.Variable) -> None:
        """Lets what an optimizer keeps for a weight be divided as that is."""
        if id(weight) in self.axes and slot.shape == weight.shape:
            self.axes[id(slot)] = self.axes[id(weight)]

    def describe(self) -> str:
        """Returns what is divided, in words; "" for nothing."""
        if self.num_blocks == 1:
            return ""
        names = {"columns": "kernels by columns", "rows": "by rows", "heads": "attentions by heads"}
        names["vocabulary"] = "tables by their rows"
        counts = collections.Counter(self.kinds.values())
        found = [f"{counts[kind]} {name}" for kind, name in names.items() if counts[kind]]
        return f"{self.num_blocks} blocks: {', '.join(found)}"

    def add(self, layer: keras.Layer, kind: str, axes: Sequence[tuple[keras.Variable, int]]) -> None:
        """Divides a layer."""
        self.kinds[id(layer)] = kind
        self.axes.update((id(variable), axis) for variable, axis in axes)


def find_divided(model: keras.Model, calls: Sequence[LayerCall], num_blocks: int) -> DividedLayers:
    """Returns what is divided of a model's layers: all that can be without an exchange of its own.

    Raises:
        ConfigError: If nothing is, or not what must be, or the optimizer looks at a weight as a whole.
    """
    if num_blocks == 1:
        return DividedLayers()
    found = _Finder(model, calls, num_blocks).find()
    for layer in keras_internals.find_layers(model, keras.Layer):
        kind = wanted_kind(layer)
        if kind is not None and found.kinds.get(id(layer)) != kind:
            raise ConfigError(
                f"tensor_parallel={num_blocks}, and {layer.name!r} cannot be divided by its {kind}: {_RULES[kind]}; "
                "change that, or make it a stock layer, which every process has whole."
            )
    if not found.axes:
        raise ConfigError(
            f"tensor_parallel={num_blocks}, and no layer of the model can be divided: two Dense layers with only what "
            "treats each unit for itself between them can, MultiHeadAttention, and a vocabulary's Dense or "
            "ReversibleEmbedding at the end; leave it out, or divide by layers (--num_stages)."
        )
    check_compiled(model, found)
    return found


def check_compiled(model: keras.Model, found: DividedLayers) -> None:
    """Makes sure that what a model was compiled with can do with parts.

    Raises:
        ConfigError: If it cannot.
    """
    if found.num_blocks == 1:
        return
    if found.has_vocabulary and not _takes_parts_of_logits(model):
        raise ConfigError(
            "the model was compiled anew, with a loss or metrics that need all logits, and its vocabulary is divided "
            "already: compile it so before it is first trained or evaluated."
        )
    if model.optimizer is not None and not updates_by_parts(model.optimizer):
        raise ConfigError(
            f"tensor_parallel={found.num_blocks} with {type(model.optimizer).__name__}, as it is set here, looks at "
            "a weight as a whole, and each process has a part: choose Adam, SGD or another that does not, and "
            "global_clipnorm in place of clipnorm."
        )


_RULES: dict[Kind, str] = {
    "columns": "what it makes must go to one RowDense, through what treats each unit for itself, or be the model's "
    "logits for SparseCategoricalCrossentropy(from_logits=True), with no other metric than accuracy",
    "rows": "what it takes must come from a ColumnDense, through what treats each unit for itself",
    "heads": "it must have that many heads, inputs of three axes, and only its output taken",
    "vocabulary": "called in reverse it must make the model's only output, for "
    "SparseCategoricalCrossentropy(from_logits=True), with no other metric than accuracy, and without mask_zero",
}


class _Finder:
    def __init__(self, model: keras.Model, calls: Sequence[LayerCall], num_blocks: int) -> None:
        self._model = model
        self._calls = calls
        self._found = DividedLayers(num_blocks)
        self._producers = {id(tensor): call for call in calls for tensor in call.outputs}
        self._consumers: dict[int, list[LayerCall]] = {}
        for call in calls:
            for tensor in call.inputs:
                self._consumers.setdefault(id(tensor), []).append(call)
        self._num_calls = collections.Counter(id(call.operation) for call in calls)
        self._outputs = {id(tensor) for tensor in model.outputs}

    def find(self) -> DividedLayers:
        for call in self._calls:
            if self._can_be_rows(call):
                self._divide_pair(call)
            elif type(call.operation) is keras.layers.MultiHeadAttention:
                self._divide_heads(call.operation)
            elif type(call.operation) is keras.layers.Embedding:
                self._divide_table(call)
        self._divide_vocabulary()
        return self._found

    def _is_free(self, layer: keras.Layer, kind: Kind) -> bool:
        """Tells whether a layer is not divided yet, and may be so."""
        return id(layer) not in self._found.kinds and wanted_kind(layer) in (None, kind)

    def _is_dense(self, call: LayerCall, kind: Kind) -> bool:
        layer = call.operation
        return (
            type(layer) is keras.layers.Dense
            and self._is_free(layer, kind)
            and self._num_calls[id(layer)] == 1
            and layer.activity_regularizer is None
            and keras_internals.is_plain(layer)
        )

    def _can_be_rows(self, call: LayerCall) -> bool:
        layer = call.operation
        return (
            self._is_dense(call, "rows")
            and layer.kernel.shape[0] >= self._found.num_blocks
            and is_divisible(layer.kernel, 0)
        )

    def _can_be_columns(self, call: LayerCall) -> bool:
        if not self._is_dense(call, "columns"):
            return False
        layer = call.operation
        return (
            layer.units >= self._found.num_blocks
            and is_divisible(layer.kernel, 1)
            and (layer.bias is None or is_divisible(layer.bias, 0))
            and (layer.activation is None or maps_by_parts(layer.activation, shape=(2, 8), axis=1))
        )

    def _divide_pair(self, last: LayerCall) -> None:
        """Divides a kernel by rows, if all that it takes comes from kernels that are divided by columns."""
        region: dict[int, Any] = {}
        columns: list[LayerCall] = []
        between: list[LayerCall] = []
        waiting = list(last.inputs)
        while waiting:
            tensor = waiting.pop()
            if id(tensor) in region:
                continue
            region[id(tensor)] = tensor
            call = self._producers.get(id(tensor))
            if call is None or id(tensor) in self._outputs:
                return
            if self._can_be_columns(call):
                columns.append(call)
            elif self._drops(call) or acts_by_parts(call):
                between.append(call)
                waiting.extend(call.inputs)
            else:
                return
        inside = {id(call) for call in (*between, last)}
        if not columns or any(id(user) not in inside for key in region for user in self._consumers[key]):
            return
        for call in columns:
            self._add_columns(call)
        for call in filter(self._drops, between):
            self._found.add(call.operation, "drops", [])
        self._found.add(last.operation, "rows", [(last.operation.kernel, 0)])
        self._found.tensors |= region.keys()

    def _drops(self, call: LayerCall) -> bool:
        layer = call.operation
        is_dropout = type(layer) is keras.layers.Dropout and layer.noise_shape is None and layer.rate > 0
        return is_dropout and self._num_calls[id(layer)] == 1

    def _add_columns(self, call: LayerCall) -> None:
        layer = call.operation
        bias = [] if layer.bias is None else [(layer.bias, 0)]
        self._found.add(layer, "columns", [(layer.kernel, 1), *bias])

    def _divide_heads(self, layer: keras.layers.MultiHeadAttention) -> None:
        if not self._is_free(layer, "heads") or layer.num_heads < self._found.num_blocks:
            return
        calls = [call for call in self._calls if call.operation is layer]
        shapes = [tensor.shape for call in calls for tensor in call.inputs]
        if layer.activity_regularizer is not None or any(len(call.outputs) > 1 for call in calls):
            return
        if any(len(shape) != 3 for shape in shapes):
            return
        projections, _ = keras_internals.attention_parts(layer)
        axes = [(dense.kernel, 1) for dense in projections]
        axes += [(dense.bias, 0) for dense in projections if dense.bias is not None]
        axes.append((layer.output_dense.kernel, 0))
        if all(map(keras_internals.is_plain, [*projections, layer.output_dense])) and all(
            is_divisible(*axis) for axis in axes
        ):
            self._found.add(layer, "heads", axes)

    def _divide_table(self, call: LayerCall) -> None:
        layer = call.operation
        num_bytes = 4 * math.prod(layer.embeddings.shape)
        if (
            num_bytes >= _LEAST_TABLE_BYTES
            and layer.input_dim >= self._found.num_blocks
            and not layer.mask_zero
            and layer.activity_regularizer is None
            and keras_internals.is_plain(layer)
            and is_divisible(layer.embeddings, 0)
        ):
            self._found.add(layer, "vocabulary", [(layer.embeddings, 0)])

    def _divide_vocabulary(self) -> None:
        """Divides the model's last layer, where it makes logits of which the loss can do with parts."""
        if len(self._model.outputs) != 1 or not _takes_parts_of_logits(self._model):
            return
        output = self._model.outputs[0]
        call = self._producers.get(id(output))
        if call is None or id(output) in self._consumers or len(output.shape) < 2:
            return
        layer = call.operation
        if self._can_be_columns(call):
            self._add_columns(call)
        elif type(layer) is keras.layers.ReversibleEmbedding and self._is_vocabulary(call):
            axes = [(layer.embeddings, 0)]
            if not layer.tie_weights:
                axes.append((layer.reverse_embeddings, 1))
            self._found.add(layer, "vocabulary", axes)
        else:
            return
        self._found.tensors.add(id(output))
        self._found.has_vocabulary = True

    def _is_vocabulary(self, last: LayerCall) -> bool:
        """Tells whether a table's call is its only one in reverse, and it can be divided."""
        layer = last.operation
        backwards = [c for c in self._calls if c.operation is layer and c.options.get("reverse")]
        return (
            backwards == [last]
            and self._is_free(layer, "vocabulary")
            and layer.input_dim >= self._found.num_blocks
            and not layer.mask_zero
            and layer.activity_regularizer is None
            and keras_internals.is_plain(layer)
            and is_divisible(layer.embeddings, 0)
        )


def _takes_parts_of_logits(model: keras.Model) -> bool:
    loss: Any = getattr(model, "loss", None)
    return (
        type(loss) is keras.losses.SparseCategoricalCrossentropy
        and loss.from_logits
        and keras_internals.loss_axis(loss) == -1
        and all(
            type(metric) is keras.metrics.SparseCategoricalAccuracy or metric in _ACCURACY
            for metric in keras_internals.asked_metrics(model)
        )
    )
