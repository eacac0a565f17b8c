"""What comes behind a model's last layer: loss, metrics, predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tfdist import keras_internals
from tfdist.training.pipeline.loss import MicroBatchLoss
from tfdist.training.tensor_parallel.vocabulary import DividedVocabulary


class Seen(NamedTuple):
    """A part of a batch, as Keras's loss and metrics see it.

    Attributes:
        x: As `train_step` takes it.
        y: Targets.
        y_pred: Outputs for the loss, in the model's structure.
        shown: Outputs for the metrics.
        sample_weight: As `train_step` takes it.
    """

    x: Any
    y: Any
    y_pred: Any
    shown: Any
    sample_weight: Any


class StageEnd:
    """Computes a model's loss and metrics of its last layers' outputs.

    Args:
        model: The whole one.
        outputs: Its own, symbolic.
        vocabulary: What divides these among blocks; None: nothing.
        options: Of its graphs.
    """

    def __init__(
        self,
        model: keras.Model,
        outputs: Sequence[Any],
        vocabulary: DividedVocabulary | None,
        options: dict[str, Any],
    ) -> None:
        self._model = model
        self._outputs = outputs
        self._structure = keras_internals.output_structure(model)
        self._loss = MicroBatchLoss(model)
        self._has_counts = True
        self._vocabulary = vocabulary
        self._count_fn = tf.function(self._count, **options)

    @property
    def variables(self) -> Sequence[keras.Variable]:
        """The metrics' state."""
        return list(self._model.metrics_variables)

    def count(self, parts: Sequence[Any], sizes: Sequence[int]) -> Any:
        """Returns what the loss of a part of a batch must know of the whole one, whose parts have these sizes."""
        if not self._has_counts:
            return tf.zeros([0])
        counts = [
            self._count_fn(part, self._like_outputs(size)) for part, size in zip(parts, sizes, strict=True)
        ]
        self._has_counts = counts[0].shape[0] > 0
        return tf.add_n(counts)

    def pack(self, outputs: Sequence[Any]) -> Any:
        """Returns outputs in the model's structure."""
        return keras.tree.pack_sequence_as(self._structure, list(outputs))

    def whole(self, outputs: Sequence[Any]) -> Sequence[Any]:
        """Returns predictions, joined where blocks hold parts of them."""
        return outputs if self._vocabulary is None else list(map(self._vocabulary.whole, outputs))

    def see(self, part: Any, outputs: Sequence[Any]) -> Seen:
        """Returns what the loss and the metrics are to see."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(part)
        if self._vocabulary is None:
            y_pred = self.pack(outputs)
            return Seen(x, y, y_pred, y_pred, sample_weight)
        view = self._vocabulary.view(keras.tree.flatten(y)[0], *outputs)
        labels = keras.tree.pack_sequence_as(y, [view.labels])
        return Seen(x, labels, self.pack([view.loss_logits]), self.pack([view.metric_logits]), sample_weight)

    def loss(self, seen: Seen, *, share: Any, totals: Any) -> Any:
        """Returns the loss that the model was compiled with; see `MicroBatchLoss.compute`."""
        return self._loss.compute(seen.y, seen.y_pred, seen.sample_weight, share=share, totals=totals)

    def note(self, seen: Seen, total: Any) -> None:
        """Updates the metrics, as Keras's own steps do; `total` is the loss with what layers add to it."""
        num_rows = tf.shape(keras.tree.flatten(seen.x)[0])[0]
        keras_internals.loss_tracker(self._model).update_state(total, sample_weight=num_rows)
        self._model.compute_metrics(seen.x, seen.y, seen.shown, sample_weight=seen.sample_weight)

    def _count(self, part: Any, y_pred: Sequence[Any]) -> Any:
        _, y, sample_weight = keras.utils.unpack_x_y_sample_weight(part)
        return self._loss.count(y, self.pack(y_pred), sample_weight)

    def _like_outputs(self, size: int) -> list[Any]:
        shapes = [[size, *(length or 1 for length in t.shape[1:])] for t in self._outputs]
        if self._vocabulary is not None:
            shapes[0][-1] = 2
        return [tf.zeros(shape, t.dtype) for shape, t in zip(shapes, self._outputs, strict=True)]
