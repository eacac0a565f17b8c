"""The state of a model's metrics, which the last stages of its copies have parts of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from tfdist.errors import ConfigError
from tfdist.training.metric_parts import aggregation_of, find_whole, part_origin, start_state, weigh_part
from tfdist.training.pipeline.grid import Grid


class PartedMetrics:
    """Brings the parts together, and shares a state out; whether parts add up two examples tell, `batch`.

    Raises:
        ConfigError: If a metric's parts do not add up, and there are several.
    """

    def __init__(self, model: keras.Model, batch: Any, grid: Grid) -> None:
        self._model = model
        self._grid = grid
        if grid.num_copies > 1 and (whole := find_whole(model, batch)):
            raise ConfigError(
                f"the metric {whole[0].name!r} must see all examples of a batch, and each of the {grid.num_copies} "
                "copies of the model has some: leave it out, or take one copy (as many stages as there are workers)."
            )
        self._start = start_state(model)
        self._kinds = [aggregation_of(v) for v in model.metrics_variables]
        self._origins = [part_origin(s, kind) for s, kind in zip(self._start, self._kinds, strict=True)]

    def state(self) -> list[np.ndarray]:
        """Returns the state over the examples of all copies; every process must call it."""
        own = [variable.numpy() for variable in self._model.metrics_variables]
        total = list(self._origins)
        for copy, state in enumerate(self._grid.from_last(own)):
            for place, (value, origin, kind) in enumerate(
                zip(state, self._origins, self._kinds, strict=True)
            ):
                part = weigh_part(value - origin, kind, is_first=copy == 0, num_parts=self._grid.num_copies)
                total[place] = total[place] + np.asarray(part)
        return total

    def set_state(self, state: Sequence[Any]) -> None:
        """Gives the last stages a state: the first copy's where parts are added up, the others what they start from."""
        parts = zip(self._model.metrics_variables, state, self._start, self._kinds, strict=True)
        for variable, value, start, kind in parts:
            variable.assign(value if self._grid.copy == 0 or kind != "sum" else start)
