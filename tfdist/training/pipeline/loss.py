"""Keras's loss of a micro-batch, made such that their mean over a batch, by their examples, is the batch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tfdist import keras_internals
from tfdist.training.step.replica_context import own_divisor


class MicroBatchLoss:
    """The loss that a model was compiled with.

    Keras divides by what it is given; where that is not a number of examples (valid elements under a mask, a sum of
    weights) the count of the whole batch must be known before a micro-batch's gradient can be. It depends on the
    targets alone.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model = model

    def count(self, y: Any, y_pred: Any, sample_weight: Any) -> Any:
        """Returns by what Keras divides parts of the loss, `[parts]` float32, mostly none; `y_pred` gives shapes."""
        counts: list[Any] = []

        def note(values: Any, sample_weight: Any, mask: Any, reduction: str | None) -> Any:
            if (own := own_divisor(sample_weight, mask, reduction)) is not None:
                counts.append(own)

        self._call(note, y, y_pred, sample_weight)
        return tf.stack(counts) if counts else tf.zeros([0])

    def compute(self, y: Any, y_pred: Any, sample_weight: Any, *, share: Any, totals: Any) -> Any:
        """Returns the loss, float32 scalar.

        `share` is the micro-batch's examples by the batch's, `totals` the sums of `count` over the batch.
        """
        rest = iter(range(totals.shape[0]))

        def correct(values: Any, sample_weight: Any, mask: Any, reduction: str | None) -> Any:
            if reduction == "sum":
                return 1.0 / share
            own = own_divisor(sample_weight, mask, reduction)
            return None if own is None else tf.math.divide_no_nan(own, totals[next(rest)]) / share

        return tf.cast(self._call(correct, y, y_pred, sample_weight), tf.float32)

    def _call(self, correction: Callable[..., Any], y: Any, y_pred: Any, sample_weight: Any) -> Any:
        with keras_internals.ReplicaBinding(loss_correction=correction):
            return keras_internals.compiled_loss(self._model)(y, y_pred, sample_weight)
