"""The metrics that a model was compiled with."""

from __future__ import annotations

from typing import Any

import keras


def has_metrics(model: keras.Model) -> bool:
    """Tells whether a model's metrics can be asked: not before they have seen a target.

    Leans on `Trainer._compile_metrics`.
    """
    metrics = getattr(model, "_compile_metrics", None)
    return metrics is None or metrics.built


def flat_metrics(model: keras.Model) -> list[keras.metrics.Metric]:
    """Returns a built model's metrics one by one: what `compile` was given is one object that holds several."""
    found: list[keras.metrics.Metric] = []
    for metric in model.metrics:
        found += getattr(metric, "metrics", None) or [metric]
    return found


def asked_metrics(model: keras.Model) -> list[Any]:
    """Returns the metrics that `compile` was given, by name or as objects, one by one.

    Leans on `Trainer._compile_metrics`, and on its `_user_metrics` and `_user_weighted_metrics`.
    """
    asked = model._compile_metrics
    if asked is None:
        return []
    return [
        m for m in keras.tree.flatten([asked._user_metrics, asked._user_weighted_metrics]) if m is not None
    ]


def resets_by_variables(model: keras.Model) -> bool:
    """Says whether a model's metrics begin anew by their variables alone: a `reset_state` of one's own may do more."""
    resets = [type(metric).reset_state for metric in flat_metrics(model)]
    return type(model).reset_metrics is keras.Model.reset_metrics and all(
        reset.__module__.startswith("keras.") for reset in resets
    )


def flatten_logs(model: keras.Model, logs: dict[str, Any]) -> Any:
    """Returns what `keras.Model.evaluate` does without `return_dict`. Leans on `Trainer._flatten_metrics_in_order`."""
    return model._flatten_metrics_in_order(logs)
