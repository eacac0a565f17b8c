"""What Keras assigns inside a step, captured instead of written."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras

from tfdist import keras_internals


class CapturingScope(keras.StatelessScope):
    """A stateless scope that counts how often each variable was assigned.

    Args:
        state_mapping: Variables and the values that they have at first.
        outer: The scope around it, whose values hold where this one has none.
        written: Variables whose assignments are not captured but made: whoever assigns one and then asks for its
            gradient, or lets an optimizer go on with it, needs the variable itself.
    """

    def __init__(
        self,
        state_mapping: list[tuple[keras.Variable, Any]],
        *,
        outer: CapturingScope | None = None,
        written: Iterable[keras.Variable] = (),
    ) -> None:
        # Layers leave their losses (`add_loss`, activity regularizers) with the scope that they are called in.
        super().__init__(state_mapping=state_mapping, collect_losses=True)
        self.num_updates: dict[int, int] = {}
        self._outer = outer
        self._written_ids = {id(variable) for variable in written}

    def add_update(self, update: tuple[keras.Variable, Any]) -> None:
        """Captures one assignment."""
        if id(update[0]) in self._written_ids:
            keras_internals.native(update[0]).assign(update[1])
            return
        key = id(update[0])
        self.num_updates[key] = self.num_updates.get(key, 0) + 1
        super().add_update(update)

    def get_current_value(self, variable: keras.Variable) -> Any:
        """Returns the captured value, or the variable itself: regularizers ask for all of them here."""
        value = super().get_current_value(variable)
        if value is None and self._outer is not None:
            return self._outer.get_current_value(variable)
        return keras_internals.native(variable) if value is None else value
