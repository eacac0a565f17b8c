"""One process's blocks of a model's layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from tfdist.keras_internals import LayerCall
from tfdist.training.tensor_parallel.calls import divide_call, divide_dropout
from tfdist.training.tensor_parallel.divided import DividedLayers
from tfdist.training.tensor_parallel.group import BlockGroup
from tfdist.training.tensor_parallel.vocabulary import DividedVocabulary


class OwnBlocks:
    """What a process has of the layers that are divided; by default all.

    Args:
        layers: The divided ones.
        group: The processes that have the other blocks.
        block: Which this is.

    Attributes:
        group: They.
        block: It.
    """

    def __init__(
        self, layers: DividedLayers | None = None, group: BlockGroup | None = None, block: int = 0
    ) -> None:
        self._layers = layers or DividedLayers()
        self.group = group or BlockGroup(1)
        self.block = block

    def part(self, variable: keras.Variable) -> tuple[slice, ...] | None:
        """Returns what is here of a variable; None: all."""
        return self._layers.part(variable, self.block)

    def divide_calls(self, calls: Sequence[LayerCall]) -> None:
        """Makes the divided layers among those that are called compute their blocks."""
        layers: dict[int, Any] = {id(call.operation): call for call in calls}
        for key, call in layers.items():
            kind = self._layers.kinds.get(key)
            if kind == "drops":
                divide_dropout(call.operation, call.outputs[0].shape[-1], self.group, self.block)
            elif kind is not None:
                divide_call(call.operation, kind, self.group, self.block)

    def vocabulary(self, model: keras.Model) -> DividedVocabulary | None:
        """Returns what a model's outputs are parts of; None: they are whole."""
        if not self._layers.has_vocabulary:
            return None
        ignored = getattr(model.loss, "ignore_class", None)
        return DividedVocabulary(model.outputs[0].shape[-1], self.group, self.block, ignored)
