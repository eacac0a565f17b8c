"""Metrics over examples that are shared out: which of their states add up, and how the parts become one.

A state is what it starts from and what each part of the examples has added to it. A variable's `aggregation` says how
parts are joined: all added up, their mean, or the first replica's alone. The state of some metrics of one's own is none
of these, a maximum say: they must see all examples of a batch together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist import keras_internals
from tfdist.training.capturing import CapturingScope


def find_whole(model: keras.Model, batch: Any) -> list[keras.metrics.Metric]:
    """Finds a model's own metrics whose state over two parts of some examples is not what both parts add to it.

    Keras's own add up, and are not tried. The batch is of two examples, as `train_step` takes them.
    """
    if not keras_internals.has_metrics(model):
        return []
    own = [m for m in keras_internals.flat_metrics(model) if not type(m).__module__.startswith("keras.")]
    if not own:
        return []
    count = int(tf.nest.flatten(batch)[0].shape[0])
    first, second = (tf.nest.map_structure(lambda t, i=i: t[i : i + 1], batch) for i in (0, count - 1))
    start = start_state(model)
    try:
        one, other = _after(model, first, start), _after(model, second, start)
        both = _after(model, second, one)
    except Exception:  # noqa: BLE001 - a test_step that cannot run by itself: together is right for every metric
        return own
    wrong = set()
    for variable, s, a, b, ab in zip(model.metrics_variables, start, one, other, both, strict=True):
        # From infinity, where a minimum starts, there is no difference.
        adds_up = np.all(np.isfinite(s)) and np.allclose(ab - s, (a - s) + (b - s), rtol=1e-3, atol=1e-5)
        if not adds_up:
            wrong.add(id(variable))
    return [metric for metric in own if wrong & {id(v) for v in metric.variables}]


def start_state(model: keras.Model) -> list[np.ndarray]:
    """Returns what `model.reset_metrics()` gives each of `model.metrics_variables`, which stay as they are."""
    scope = CapturingScope([])
    with scope:
        model.reset_metrics()
    return [np.asarray(scope.get_current_value(v)) for v in model.metrics_variables]


def part_origin(start: np.ndarray, aggregation: str) -> np.ndarray:
    """Returns what parts of a state are counted from: the start where they are added up, else nothing.

    A maximum, say, may start at -1e9 or at minus infinity, from which no difference could be taken.
    """
    return start if aggregation == "sum" else np.zeros_like(start)


def aggregation_of(variable: keras.Variable) -> str:
    """Returns `sum`, `mean` or `only_first_replica`."""
    return str(variable.aggregation) if variable.aggregation != "none" else "sum"


def weigh_part(change: Any, aggregation: str, *, is_first: Any, num_parts: int) -> Any:
    """Returns what a part's change from `part_origin` counts for in the sum over all parts; see `aggregation_of`."""
    if aggregation == "mean":
        return change / tf.cast(num_parts, change.dtype)
    if aggregation == "only_first_replica":
        return tf.where(is_first, change, tf.zeros_like(change))
    return change


def _after(model: keras.Model, batch: Any, state: Sequence[np.ndarray]) -> list[np.ndarray]:
    scope = CapturingScope(list(zip(model.metrics_variables, map(tf.convert_to_tensor, state), strict=True)))
    with scope:
        model.test_step(batch)
    return [np.asarray(scope.get_current_value(v)) for v in model.metrics_variables]
