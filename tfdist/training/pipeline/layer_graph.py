"""A functional model as a line of layer calls: what each costs, and what would cross a cut between two of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfdist import keras_internals
from tfdist.errors import ConfigError

# Their time is that of what they repeat, as often as the data say.
_LOOPS = ("While", "StatelessWhile")


class LayerGraph:
    """The calls of a model's layers, in an order in which they can be made.

    Args:
        model: Functional or `Sequential`, built.
        x: A batch's inputs, by which shapes that the model leaves open are known.

    Attributes:
        calls: The calls.
        flops: Floating-point operations of each call's forward pass, for one example.
        output_bytes: Of each call's outputs, for one example.
        divided: The `id` of each tensor of which a process has a part, which no cut may lie behind.

    Raises:
        ConfigError: If the model is neither.
    """

    def __init__(self, model: keras.Model, x: Any) -> None:
        calls = keras_internals.layer_calls(model)
        if calls is None:
            raise ConfigError(
                f"strategy 'pipeline' with {type(model).__name__}, whose layers are called by code of its own: make it "
                "a functional keras.Model(inputs, outputs) or a keras.Sequential, or choose another strategy."
            )
        self.calls = calls
        self.divided: set[int] = set()
        self._model_outputs = list(model.outputs)
        self._shapes: dict[int, tuple[int, ...]] = {}
        self.flops, self._batch_size = self._count(model, x)
        self.output_bytes = [sum(self.num_bytes(tensor) for tensor in call.outputs) for call in calls]

    def _count(self, model: keras.Model, x: Any) -> tuple[list[float], int]:
        """Traces the model once: what TensorFlow would compute says what it costs."""
        flops: list[float] = []

        def trace(*inputs: Any) -> Any:
            graph = tf.compat.v1.get_default_graph()
            values = {id(tensor): value for tensor, value in zip(model.inputs, inputs, strict=True)}
            for call in self.calls:
                before = len(graph.get_operations())
                call.run(values)
                made = graph.get_operations()[before:]
                flops.append(sum(map(_flops_of, made)))
                if any(op.type in _LOOPS for op in made):
                    flops[-1] += (
                        2 * _num_weights(call.operation) * math.prod(self._shape(call.inputs[0], values)[:-1])
                    )
                for tensor in call.outputs:
                    self._shapes[id(tensor)] = self._shape(tensor, values)
            return []

        flat = keras_internals.standard_inputs(model, keras.tree.map_structure(tf.convert_to_tensor, x))
        specs = [
            tf.TensorSpec(value.shape, tensor.dtype) for value, tensor in zip(flat, model.inputs, strict=True)
        ]
        tf.function(trace, autograph=False).get_concrete_function(*specs)
        size = flat[0].shape[0]
        return [count / size for count in flops], size

    @staticmethod
    def _shape(tensor: keras.KerasTensor, values: Mapping[int, Any]) -> tuple[int, ...]:
        # A dimension that nobody knows counts as one.
        return tuple(size or 1 for size in values[id(tensor)].shape)

    def num_bytes(self, tensor: keras.KerasTensor) -> float:
        """Returns the bytes of a call's output for one example."""
        size = keras.backend.standardize_dtype(tensor.dtype)
        return math.prod(self._shapes[id(tensor)]) / self._batch_size * tf.as_dtype(size).size

    def crossing(self, place: int) -> list[keras.KerasTensor]:
        """Returns what must be brought over a cut before the call with that number, in the order of their making."""
        needed = {id(tensor) for call in self.calls[place:] for tensor in call.inputs}
        needed |= {id(tensor) for tensor in self._model_outputs}
        made = [tensor for call in self.calls[:place] for tensor in call.outputs]
        return [tensor for tensor in made if id(tensor) in needed]

    def obstacle(self, place: int) -> str:
        """Returns why the model cannot be cut before the call with that number, or ""."""
        for tensor in self.crossing(place):
            if id(tensor) in self.divided:
                return f"{tensor.name!r} lies in blocks in several processes"
            if any(size is None for size in tensor.shape[1:]):
                return f"{tensor.name!r} has an axis of unknown length; give it in keras.Input"
        return ""


def variables_of(operations: Sequence[Any]) -> list[keras.Variable]:
    """Returns the variables of some layers and operations, each once, in order."""
    found = {id(v): v for operation in operations for v in getattr(operation, "variables", ())}
    return list(found.values())


def _num_weights(operation: Any) -> int:
    return sum(math.prod(variable.shape) for variable in getattr(operation, "weights", ()))


def _flops_of(op: tf.Operation) -> float:
    """Returns the floating-point operations of an operation in a graph: two for each product, else one a number."""
    shapes = [
        tuple(size or 1 for size in tensor.shape) if tensor.shape.rank is not None else ()
        for tensor in op.inputs
    ]
    made = sum(math.prod(size or 1 for size in t.shape) for t in op.outputs if t.shape.rank is not None)
    if op.type == "MatMul":
        return 2.0 * made * shapes[0][0 if op.get_attr("transpose_a") else 1]
    if op.type.startswith("BatchMatMul"):
        return 2.0 * made * shapes[0][-2 if op.get_attr("adj_x") else -1]
    if op.type in ("Conv2D", "Conv3D"):
        return 2.0 * made * math.prod(shapes[1][:-1])
    if op.type == "DepthwiseConv2dNative":
        return 2.0 * made * math.prod(shapes[1][:2])
    if op.type == "Einsum":
        labels = op.get_attr("equation").decode().split("->")[0].split(",")
        sizes = {
            label: size
            for names, shape in zip(labels, shapes, strict=True)
            if "." not in names
            for label, size in zip(names, shape, strict=True)
        }
        return 2.0 * math.prod(sizes.values())
    # What moves numbers, or makes a weight's first value, which it has already when the model runs.
    is_free = op.type in ("Const", "Identity", "Reshape", "Shape", "ReadVariableOp") or "Random" in op.type
    return 0.0 if is_free else float(made)
