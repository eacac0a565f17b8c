"""What stands for a model in a callback that takes all of its weights and puts them back, as `EarlyStopping` does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from tfdist import keras_internals
from tfdist.training.checkpoint.owners import sharing_state
from tfdist.training.checkpoint.state import state_array


class WholeWeights:
    """A model whose weights lie in several processes; in each of them the callback asks at the same time.

    Args:
        model: It.
        is_chief: Whether this process gets all of them, as checkpoints hold them; others get their own.
    """

    def __init__(self, model: keras.Model, *, is_chief: bool) -> None:
        self.__dict__.update(_model=model, _is_chief=is_chief)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._model, name, value)

    def get_weights(self) -> list[np.ndarray | None]:
        """Returns the weights that this process is to keep, None for the others."""
        with sharing_state(self._model):
            return [
                np.array(state_array(self._model, weight).read())
                if self._is_chief
                else keras_internals.native(weight).numpy()
                if keras_internals.has_memory(weight)
                else None
                for weight in self._model.weights
            ]

    def set_weights(self, weights: Sequence[np.ndarray | None]) -> None:
        """Assigns those that are this process's."""
        for variable, value in zip(self._model.weights, weights, strict=True):
            if keras_internals.has_memory(variable):
                assert value is not None
                native = keras_internals.native(variable)
                is_own = value.shape == tuple(native.shape)
                native.assign(value if is_own else value[keras_internals.own_part(variable)])
