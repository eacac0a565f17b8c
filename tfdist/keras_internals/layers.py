"""Layers, their calls, and what they hand on."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
from keras.src.models.functional import Functional

from tfdist.keras_internals.attributes import holding


@contextlib.contextmanager
def watching_outputs(model: keras.Model, look: Callable[[Any, Any], None]) -> Iterator[None]:
    """Shows what every layer of a model returns, and every operation between layers, the innermost first.

    Leans on `Layer._flatten_layers`, and on `Operation.__call__` looking `call` up in the instance.

    Args:
        model: Built.
        look: `(layer or operation, its outputs)`, called after each call.
    """
    found: dict[int, Any] = {}
    for layer in model._flatten_layers():
        for operation in (layer, *getattr(layer, "operations", ())):
            found[id(operation)] = operation

    def watch(operation: Any, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            outputs = call(*args, **kwargs)
            look(operation, outputs)
            return outputs

        return watched

    with contextlib.ExitStack() as watching:
        for operation in found.values():
            watching.enter_context(holding(operation, call=watch(operation, operation.call)))
        yield


def replace_call(operation: Any, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Puts what `make` returns of a layer's `call` in its place. Leans on Keras calling what it finds in `__dict__`.

    Args:
        operation: The layer, built.
        make: `(the call of the layer's class) → another`, with the same arguments; an earlier one is gone.
    """
    # Straight into __dict__: Keras's __setattr__ would track the value.
    operation.__dict__["call"] = make(functools.partial(type(operation).call, operation))


def attention_parts(layer: keras.layers.MultiHeadAttention) -> tuple[list[Any], keras.layers.Dropout]:
    """Returns the projections of a built attention layer to its heads, and what drops scores of theirs.

    Leans on `MultiHeadAttention._gate_dense`, `._use_gate` and `._dropout_layer`.
    """
    projections = [layer.query_dense, layer.key_dense, layer.value_dense]
    return [*projections, *([layer._gate_dense] if layer._use_gate else [])], layer._dropout_layer


def is_plain(layer: keras.Layer) -> bool:
    """Tells whether a layer's weights are those that it was built with: not quantized, without LoRA."""
    return not getattr(layer, "lora_enabled", False) and layer.dtype_policy.quantization_mode is None


def keep_mask(source: Any, target: Any) -> Any:
    """Returns a tensor with the mask that another carries by the side. Leans on `_keras_mask`."""
    mask = getattr(source, "_keras_mask", None)
    if mask is not None:
        target._keras_mask = mask
    return target


def find_layers(model: keras.Model, kind: type) -> list[Any]:
    """Returns the model's layers of a class, however deep they are nested.

    Leans on `Layer._flatten_layers`.
    """
    return [layer for layer in model._flatten_layers() if isinstance(layer, kind)]


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """A call of a layer, or of an operation between layers, in a functional model's graph.

    Attributes:
        operation: The layer or operation.
        inputs: Symbolic tensors that it takes.
        outputs: Symbolic tensors that it makes.
    """

    operation: Any
    inputs: Sequence[keras.KerasTensor]
    outputs: Sequence[keras.KerasTensor]
    _node: Any

    @property
    def options(self) -> dict[str, Any]:
        """What it was given by name."""
        return dict(self._node.arguments.kwargs)

    def run(self, values: dict[int, Any]) -> None:
        """Makes the call.

        Args:
            values: What stands for each symbolic tensor, by its id; the outputs are added.
        """
        args, kwargs = self._node.arguments.fill_in(values)
        made = keras.tree.flatten(self.operation(*args, **kwargs))
        values.update((id(tensor), value) for tensor, value in zip(self.outputs, made, strict=True))


def layer_calls(model: keras.Model) -> list[LayerCall] | None:
    """Returns the calls of a functional or `Sequential` model in an order in which they can be made; None of others.

    Leans on `Sequential._functional`, `Function._nodes_by_depth`, and on `Node`.
    """
    functional = getattr(model, "_functional", None) or model
    if not isinstance(functional, Functional):
        return None
    depths = sorted(functional._nodes_by_depth, reverse=True)
    nodes = [node for depth in depths for node in functional._nodes_by_depth[depth] if not node.is_input]
    return [LayerCall(n.operation, list(n.input_tensors), list(n.outputs), n) for n in nodes]


def has_mask(tensor: keras.KerasTensor) -> bool:
    """Tells whether a symbolic tensor carries a mask by the side. Leans on `_keras_mask`."""
    return getattr(tensor, "_keras_mask", None) is not None
