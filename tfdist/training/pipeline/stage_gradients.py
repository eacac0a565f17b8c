"""What a stage has learnt of a batch's micro-batches: sums of gradients, and the update that follows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist import keras_internals
from tfdist.collectives.communicator import join, split
from tfdist.optimizers.one_pass import in_one_pass
from tfdist.training.pipeline.grid import Grid
from tfdist.training.pipeline.stage_layers import StageLayers
from tfdist.training.step.finite_check import run_if

# By the place of their weight; a graph takes no other keys than text.
Rows = Mapping[str, tf.IndexedSlices]


class StageGradients:
    """Sums a stage's gradients, and updates its weights.

    Rows of a table are lined up, and not added up: Keras's optimizers treat a row that occurs twice in their own way.
    """

    def __init__(self, layers: StageLayers, optimizer: keras.optimizers.Optimizer | None) -> None:
        self._layers = layers
        self._optimizer = optimizer
        self._sums = [tf.Variable(tf.zeros(v.shape, v.dtype), trainable=False) for v in layers.weights]
        self._rows: dict[int, list[tf.IndexedSlices]] = {}
        self._is_new = True
        options = {"autograph": False, "reduce_retracing": True}
        self._add_fn = tf.function(self.add, **options)
        self._sum_fn = tf.function(self._sum_up, **options)
        self._apply_fn = tf.function(self._apply, **options)

    def is_first(self) -> bool:
        """Returns whether the next gradients are a batch's first, and takes them for made."""
        is_first, self._is_new = self._is_new, False
        return is_first

    def add(self, gradients: Sequence[Any], is_first: Any) -> list[Any]:
        """Adds each weight's gradient to its sum, in a graph; returns those that are rows, for `keep`.

        A batch's first take the place of the last batch's sums: zeros would be memory again.
        """
        rows: list[Any] = []
        for weight, total, gradient in zip(self._layers.weights, self._sums, gradients, strict=True):
            is_rows = isinstance(gradient, tf.IndexedSlices) and id(weight) not in self._layers.shared
            rows.append(gradient if is_rows else None)
            if gradient is not None and not is_rows:
                _add_to(total, tf.convert_to_tensor(gradient), is_first)
        return rows

    def add_now(self, gradients: Sequence[Any]) -> None:
        """Adds gradients, outside of a graph."""
        self.keep(self._add_fn(list(gradients), tf.constant(self.is_first())))

    def end_batch(self) -> None:
        """Takes a batch without gradients, as a copy's may be, for one of zeros."""
        if self.is_first():
            for total in self._sums:
                total.assign(tf.zeros(total.shape, total.dtype))

    def keep(self, rows: Sequence[Any]) -> None:
        """Keeps what `add` returned."""
        for place, part in enumerate(rows):
            if part is not None:
                self._rows.setdefault(place, []).append(part)

    def sum_copies(self, grid: Grid) -> None:
        """Adds them up over the stage's copies; those of weights that several stages have are sums already."""
        if grid.num_copies == 1:
            return
        if self._layers.has_tables:
            self._gather_rows(grid)
        pairs = zip(self._layers.weights, self._sums, strict=True)
        own = [total for weight, total in pairs if id(weight) not in self._layers.shared]
        if own:
            summed = split(grid.sum_copies(join(own)), own)
            for total, value in zip(own, summed, strict=True):
                total.assign(value)

    def sum_up(self) -> tuple[float, float]:
        """Returns the sum, which is finite if all of them are, and that of their squares.

        Of a weight that several processes have, the first of them counts it.
        """
        total, squares = self._sum_fn(self._joined()).numpy()
        return float(total), float(squares)

    def of(self, variable: keras.Variable) -> tf.Variable | None:
        """Returns where the gradients by a weight are summed; None if it is none of this stage's."""
        pairs = zip(self._layers.weights, self._sums, strict=True)
        return next((total for weight, total in pairs if weight is variable), None)

    def apply(self, *, is_sound: bool, norm: float) -> None:
        """Applies the sums, if they are sound; the next gradients begin new ones.

        `norm` is that of the gradients by all weights of the model.
        """
        self._apply_fn(tf.constant(is_sound), tf.constant(norm), self._joined())
        self._rows.clear()
        self._is_new = True

    def _joined(self) -> Rows:
        return {
            str(place): tf.IndexedSlices(
                tf.concat([part.values for part in parts], 0),
                tf.concat([part.indices for part in parts], 0),
                parts[0].dense_shape,
            )
            for place, parts in self._rows.items()
        }

    def _gather_rows(self, grid: Grid) -> None:
        """Lines up the rows of all copies, in their order."""
        rows = self._joined()
        counts = np.zeros([grid.num_copies, len(self._sums)], np.int32)
        for name, part in rows.items():
            counts[grid.copy, int(name)] = part.indices.shape[0]
        counts = grid.sum_copies(tf.constant(counts)).numpy()
        self._rows.clear()
        for place in map(int, np.flatnonzero(counts.sum(axis=0))):
            before, after = int(counts[: grid.copy, place].sum()), int(counts[grid.copy + 1 :, place].sum())
            shape = list(self._sums[place].shape)
            own = rows.get(str(place))
            values = tf.zeros([0, *shape[1:]]) if own is None else own.values
            indices = tf.zeros([0], tf.int64) if own is None else tf.cast(own.indices, tf.int64)
            # Each adds its own to the zeros of the others.
            values = grid.sum_copies(tf.pad(values, [[before, after], *([0, 0] for _ in shape[1:])]))
            indices = grid.sum_copies(tf.pad(indices, [[before, after]]))
            self._rows[place] = [tf.IndexedSlices(values, indices, tf.constant(shape, tf.int64))]

    def _gradients(self, rows: Rows) -> list[Any]:
        return [rows.get(str(place), total.read_value()) for place, total in enumerate(self._sums)]

    def _sum_up(self, rows: Rows) -> Any:
        counted = {id(v) for v in self._layers.summed}
        pairs = zip(self._layers.weights, self._gradients(rows), strict=True)
        found = [(weight, gradient) for weight, gradient in pairs if id(weight) in counted]
        values = [g.values if isinstance(g, tf.IndexedSlices) else g for _, g in found]
        totals = [tf.reduce_sum(tf.cast(value, tf.float32)) for value in values]
        steps = getattr(self._optimizer, "gradient_accumulation_steps", None)
        gradients = [gradient for _, gradient in found]
        if steps:
            # It clips the mean over several batches.
            before = keras_internals.accumulators(self._optimizer)
            gradients = [(before[id(weight)] + gradient) / steps for weight, gradient in found]
        return tf.stack([tf.add_n([tf.constant(0.0), *totals]), keras_internals.square_norm(gradients)])

    def _apply(self, is_sound: Any, norm: Any, rows: Rows) -> None:
        optimizer, weights = self._optimizer, self._layers.weights
        assert optimizer is not None

        def apply() -> None:
            with keras_internals.updating_only(optimizer, weights, norm=norm):
                in_one_pass(optimizer, optimizer.apply)(self._gradients(rows), weights)

        run_if(is_sound, apply)


def _add_to(total: tf.Variable, gradient: Any, is_first: Any) -> None:
    tf.cond(is_first, lambda: total.assign(gradient), lambda: total.assign_add(gradient))
