"""Metric state as plain values: summed over replicas or workers, and turned into logs without touching variables.

Each replica or worker accumulates its own examples; sums of states are the state of the union, so even an
AUC counts every example once.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist import keras_internals


def add_states(total: Sequence[Any], added: Sequence[Any]) -> list[Any]:
    """Returns a state to which other examples have added something."""
    return [a + b for a, b in zip(total, added, strict=True)]


def metric_results(model: keras.Model, state: Sequence[Any]) -> dict[str, float]:
    """Returns a model's logs (`loss`, `accuracy`, …) for a state: an array for each of `model.metrics_variables`."""
    if not keras_internals.has_metrics(model):
        return {}
    results = _results_function(model)([tf.convert_to_tensor(value) for value in state])
    return {name: _as_number(value) for name, value in results.items()}


def select_logs(
    metrics: dict[str, float], returned: Sequence[str] | None, extra: dict[str, Any]
) -> dict[str, float]:
    """Returns the logs that Keras would report: a step of the model's own decides on their names.

    Args:
        metrics: Metric results over all examples.
        returned: Names that the step returned; None where it returned no dict.
        extra: The last batch's value of those that are no metrics.
    """
    if returned is None or set(returned) == set(metrics):
        return metrics
    numbers = {name: float(value) for name, value in extra.items()}
    return {name: (metrics | numbers)[name] for name in returned if name in metrics or name in numbers}


def _results_function(model: keras.Model) -> Any:
    """Returns the model's results as one compiled function: op by op they would cost more than a small step."""
    variables = model.metrics_variables
    key = tuple(id(v) for v in variables)
    known = _functions.get(model)
    if known is None or known[0] != key:
        # What is remembered of a model must not keep it.
        reference = weakref.ref(model)

        def results(state: list[tf.Tensor]) -> dict[str, Any]:
            model = reference()
            assert model is not None
            with keras.StatelessScope(state_mapping=list(zip(variables, state, strict=True))):
                return dict(model.get_metrics_result())

        known = (key, tf.function(results, autograph=False))
        _functions[model] = known
    return known[1]


# compile() makes new metrics: the key says for which the function stands.
_functions: weakref.WeakKeyDictionary[keras.Model, tuple[Any, Any]] = weakref.WeakKeyDictionary()


def _as_number(value: Any) -> Any:
    array = keras.ops.convert_to_numpy(value)
    return float(array) if array.ndim == 0 else array


def single_numbers(name: str, value: Any) -> dict[str, float]:
    """Returns a log's numbers by name: one of several with its place behind it, `f1_score_0` for a class."""
    numbers = np.ravel(np.asarray(value, np.float64))
    if np.ndim(value) == 0:
        return {name: float(numbers[0])}
    return {f"{name}_{i}": float(number) for i, number in enumerate(numbers)}


def scalar_logs(logs: Any, metric_names: set[str]) -> dict[str, tf.Tensor]:
    """Returns what a `train_step` reports beside its metrics: scalar tensors by name."""
    if not isinstance(logs, dict):
        return {}
    return {
        name: value
        for name, value in logs.items()
        if name not in metric_names and tf.is_tensor(value) and value.shape.rank == 0
    }


def returned_names(logs: Any) -> list[str] | None:
    """Returns the names of a step's logs, None where it returned no dict."""
    return list(logs) if isinstance(logs, dict) else None
