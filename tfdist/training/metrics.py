"""Metric state as plain values: summed over replicas or workers, and turned into logs without touching variables.

Each replica or worker accumulates its own examples; sums of states are the state of the union, so even an
AUC counts every example once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np


def zero_state(model: keras.Model) -> list[Any]:
    """Returns zeros in the shapes and dtypes of `model.metrics_variables`."""
    return [np.zeros(v.shape, v.dtype) for v in model.metrics_variables]


def add_states(total: Sequence[Any], state: Sequence[Any]) -> list[Any]:
    """Returns the state of the union of two disjoint sets of examples."""
    return [a + b for a, b in zip(total, state, strict=True)]


def metric_results(model: keras.Model, state: Sequence[Any]) -> dict[str, float]:
    """Returns the model's logs (`loss`, `accuracy`, …) for a metric state.

    Args:
        model: A built model.
        state: One array for each of `model.metrics_variables`.
    """
    mapping = list(zip(model.metrics_variables, state, strict=True))
    with keras.StatelessScope(state_mapping=mapping):
        results = model.get_metrics_result()
    return {name: _as_number(value) for name, value in results.items()}


def _as_number(value: Any) -> Any:
    array = keras.ops.convert_to_numpy(value)
    return float(array) if array.ndim == 0 else array
