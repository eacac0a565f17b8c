"""The loss that a model was compiled with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras.src.losses import loss as keras_loss

reduce_weighted_values = keras_loss.reduce_weighted_values
LossCorrection = Callable[[Any, Any, Any, str | None], Any]


def has_loss_by_output(model: keras.Model) -> bool:
    """Tells whether a built model logs the loss of each output: these means weigh batches by their static size."""
    loss = getattr(model, "_compile_loss", None)
    return loss is not None and len(loss.metrics) > 0


def loss_axis(loss: keras.losses.Loss) -> int:
    """Returns the axis of the classes in a cross-entropy's outputs. Leans on `LossFunctionWrapper._fn_kwargs`."""
    return loss._fn_kwargs.get("axis", -1)


def compiled_loss(model: keras.Model) -> Callable[..., Any]:
    """Returns the loss that a model was compiled with, `(y, y_pred, sample_weight) → scalar`, without its layers' own.

    Leans on `Trainer._compile_loss`.
    """
    return model._compile_loss


def loss_tracker(model: keras.Model) -> keras.metrics.Mean:
    """Returns the metric that is logged as `loss`. Leans on `Trainer._loss_tracker`."""
    return model._loss_tracker
