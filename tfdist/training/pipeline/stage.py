"""One stage of a model: forward and backward passes of micro-batches, whose gradients are summed for one update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tfdist import keras_internals
from tfdist.training.pipeline.cut import StagePlan
from tfdist.training.pipeline.layer_graph import LayerGraph, variables_of
from tfdist.training.pipeline.loss import MicroBatchLoss
from tfdist.training.step.finite_check import run_if
from tfdist.training.step.replica import SEED_STRIDE


class MicroBatch(NamedTuple):
    """A part of a batch.

    Attributes:
        number: Among all of the batch; it draws what that replica of `multiworker` would.
        num_examples: That it holds.
        share: These by the batch's.
        part: As `train_step` takes it.
    """

    number: int
    num_examples: int
    share: float
    part: Any


class _Waiting(NamedTuple):
    """A forward pass whose backward pass is to come."""

    tape: tf.GradientTape
    sources: Sequence[Any]
    targets: Sequence[Any]


class Stage:
    """The layers of a stage, their weights, and the optimizer as far as it is theirs.

    Args:
        model: The whole one, made within `keras_internals.deferring_variables`; this stage's weights get their values.
        graph: The model's.
        plans: Of all stages.
        index: Which of them this is.

    Attributes:
        is_first: Whether nothing comes from a stage before.
        is_last: Whether the loss is computed here.
        variables: The stage's weights and statistics.
        inputs: What comes from the stage before.
        outputs: What goes to the next.
    """

    def __init__(self, model: keras.Model, graph: LayerGraph, plans: Sequence[StagePlan], index: int) -> None:
        plan = plans[index]
        self._model = model
        self.is_first = index == 0
        self.is_last = index == len(plans) - 1
        self.inputs = graph.crossing(plan.start)
        self.outputs = list(model.outputs) if self.is_last else graph.crossing(plan.stop)
        calls = graph.calls[plan.start : plan.stop]
        made = {id(tensor) for call in calls for tensor in call.outputs}
        taken = {id(tensor) for call in calls for tensor in call.inputs}
        self._places = [place for place, tensor in enumerate(model.inputs) if id(tensor) in taken]
        own_inputs = [model.inputs[place] for place in self._places]
        self._taken = [place for place, tensor in enumerate(self.inputs) if id(tensor) in taken]
        self._layers = keras.Model(
            [*own_inputs, *(self.inputs[place] for place in self._taken)],
            [tensor for tensor in self.outputs if id(tensor) in made],
        )
        # What only passes by, as what a connection skips several stages with.
        known = {id(tensor): place for place, tensor in enumerate(self.inputs)}
        self._passing = [None if id(tensor) in made else known[id(tensor)] for tensor in self.outputs]
        self.variables = variables_of([call.operation for call in calls])
        for variable in self.variables:
            keras_internals.materialize(variable)
        self.weights = [v for v in self.variables if v.trainable]
        before = {id(v) for p in plans[:index] for v in _weights_of(graph, p)}
        # A weight that several stages have counts once, in the first of them.
        self._counted = [v for v in self.weights if id(v) not in before]
        self._seeds = keras_internals.seed_states(self._layers)
        seeds = {id(v) for v in self._seeds}
        self._statistics = [v for v in self.variables if not v.trainable and id(v) not in seeds]
        self._sums = [tf.Variable(tf.zeros(v.shape, v.dtype), trainable=False) for v in self.weights]
        self._rows: dict[int, list[tf.IndexedSlices]] = {}
        others = {id(v) for p in (*plans[:index], *plans[index + 1 :]) for v in _weights_of(graph, p)}
        self._shared = {id(v) for v in self.weights} & others
        self._waiting: dict[int, _Waiting] = {}
        self._next_seeds: Sequence[Any] | None = None
        self._structure = keras_internals.output_structure(model)
        self._loss = MicroBatchLoss(model)
        self._has_counts = True
        self._no_counts = tf.zeros([0])
        # Keras weighs the loss of each output by the static size of a batch.
        by_output = self.is_last and keras_internals.has_loss_by_output(model)
        compiled = {"autograph": False, "reduce_retracing": not by_output}
        self._forward_fn = tf.function(self._forward, **compiled)
        self._loss_fn = tf.function(self._forward_and_backward, **compiled)
        self._test_fn = tf.function(self._test, **compiled)
        self._count_fn = tf.function(self._count, **compiled)
        self._predict_fn = tf.function(self._predict, **compiled)
        self._add_fn = tf.function(self._add, **compiled)
        self._apply_fn = tf.function(self._apply, autograph=False, reduce_retracing=True)
        self._sum_fn = tf.function(self._sum_up, autograph=False, reduce_retracing=True)

    def forward(
        self, micro: MicroBatch, received: Sequence[Any], side_loss: Any
    ) -> tuple[Sequence[Any], Any]:
        """Makes a forward pass, of any stage but the last.

        Args:
            micro: The micro-batch.
            received: From the stage before, as `inputs`.
            side_loss: What the layers of the stages before add to the loss, scalar.

        Returns:
            What goes on, as `outputs`, and the side loss with this stage's.
        """
        own = self._own_inputs(micro.part)
        floating = [value for value in received if value.dtype.is_floating]
        with tf.GradientTape() as tape:
            tape.watch(floating)
            outputs, own_loss, seeds = self._forward_fn(tf.constant(micro.number), own, list(received))
        self._keep_seeds(micro, seeds)
        targets = [value for value in outputs if value.dtype.is_floating]
        self._waiting[micro.number] = _Waiting(
            tape, [*floating, *map(keras_internals.native, self.weights)], [*targets, own_loss]
        )
        return outputs, side_loss + own_loss

    def backward(self, micro: MicroBatch, gradients: Sequence[Any]) -> list[Any]:
        """Makes the backward pass that belongs to a forward one.

        Args:
            micro: The micro-batch.
            gradients: Of the loss by the floating outputs, from the next stage, weighted by the share.

        Returns:
            Of the loss by the floating inputs.
        """
        waiting = self._waiting.pop(micro.number)
        found = waiting.tape.gradient(
            waiting.targets, waiting.sources, output_gradients=[*gradients, tf.constant(micro.share)]
        )
        num_inputs = len(found) - len(self.weights)
        self._keep_rows(self._add_fn(found[num_inputs:]))
        return _present(found[:num_inputs], waiting.sources)

    def forward_and_backward(
        self, micro: MicroBatch, received: Sequence[Any], side_loss: Any, totals: Any
    ) -> tuple[list[Any], Any]:
        """Makes both passes of the last stage, where one follows the other.

        Args:
            micro: The micro-batch.
            received: As for `forward`.
            side_loss: As for `forward`.
            totals: What `count` returns of the batch.

        Returns:
            The gradients of the loss by the floating inputs, and the loss.
        """
        gradients, loss, seeds, rows = self._loss_fn(
            tf.constant(micro.number), tf.constant(micro.share), micro.part, list(received), side_loss, totals
        )
        self._keep_rows(rows)
        self._keep_seeds(micro, seeds)
        return gradients, loss

    def test(self, micro: MicroBatch, received: Sequence[Any], side_loss: Any, totals: Any) -> None:
        """Updates the metrics, in the last stage."""
        self._test_fn(tf.constant(micro.share), micro.part, list(received), side_loss, totals)

    def count(self, micros: Sequence[MicroBatch]) -> Any:
        """Returns what the loss of a part of a batch must know of the whole one, in the last stage."""
        if self._has_counts:
            counts = [self._count_fn(micro.part, self._shapes_of(micro)) for micro in micros]
            self._has_counts = counts[0].shape[0] > 0
            return tf.add_n(counts)
        return self._no_counts

    def predict(self, micro: MicroBatch, received: Sequence[Any]) -> tuple[Sequence[Any], Any]:
        """Returns what goes on, or the outputs, when nobody learns, and what this stage adds to the loss."""
        return self._predict_fn(self._own_inputs(micro.part), list(received))

    def pack(self, outputs: Sequence[Any]) -> Any:
        """Returns the last stage's outputs as the model does."""
        return keras.tree.pack_sequence_as(self._structure, list(outputs))

    def sum_up(self) -> tuple[float, float]:
        """Returns of this stage's gradients the sum, which is finite if all of them are, and that of their squares.

        Of a weight that several stages have, the first of them counts it.
        """
        total, squares = self._sum_fn(self._joined_rows()).numpy()
        return float(total), float(squares)

    def gradient_of(self, variable: keras.Variable) -> tf.Variable | None:
        """Returns where the gradients by a weight are summed; None if it is none of this stage's."""
        pairs = zip(self.weights, self._sums, strict=True)
        return next((total for weight, total in pairs if weight is variable), None)

    def update(self, *, is_sound: bool, norm: float) -> None:
        """Applies the sums and begins new ones.

        Args:
            is_sound: Else nothing is changed.
            norm: Of the gradients by all weights of the model.
        """
        self._apply_fn(
            tf.constant(is_sound), tf.constant(norm), list(self._next_seeds or ()), self._joined_rows()
        )
        self._next_seeds = None
        self._rows.clear()

    def _own_inputs(self, part: Any) -> list[Any]:
        x = keras_internals.standard_inputs(self._model, keras.utils.unpack_x_y_sample_weight(part)[0])
        return [x[place] for place in self._places]

    def _run(
        self, number: Any, own: Sequence[Any], received: Sequence[Any], *, training: bool
    ) -> tuple[list[Any], Any, list[Any]]:
        """Runs the layers; returns the outputs, what the layers add to the loss, and the seeds' next states."""
        shift = tf.cast(number, tf.int64) * tf.constant([SEED_STRIDE, 0], tf.int64)
        shifted = [
            (seed, tf.cast(tf.math.floormod(tf.cast(seed.value, tf.int64) + shift, 2**32), seed.dtype))
            for seed in self._seeds
        ]
        with keras.StatelessScope(state_mapping=shifted, collect_losses=True) as scope:
            made = self._layers([*own, *(received[place] for place in self._taken)], training=training)
            losses = [keras.ops.sum(loss) for loss in scope.losses]
            losses += [keras.ops.sum(v.regularizer(v)) for v in self._counted if v.regularizer is not None]
        if training:
            for variable in self._statistics:
                if (value := scope.get_current_value(variable)) is not None:
                    variable.assign(value)
        # Of a random stream the place in it goes on, and the stream stays.
        seeds = [tf.stack([s.value[0], scope.get_current_value(s)[1]]) for s in self._seeds]
        fresh: Iterator[Any] = iter(keras.tree.flatten(made))
        outputs = [next(fresh) if place is None else tf.identity(received[place]) for place in self._passing]
        return outputs, tf.add_n([tf.constant(0.0), *(tf.cast(loss, tf.float32) for loss in losses)]), seeds

    def _forward(self, number: Any, own: Sequence[Any], received: Sequence[Any]) -> Any:
        return self._run(number, own, received, training=True)

    def _predict(self, own: Sequence[Any], received: Sequence[Any]) -> Any:
        outputs, side_loss, _ = self._run(0, own, received, training=False)
        return outputs, side_loss

    def _forward_and_backward(
        self, number: Any, share: Any, part: Any, received: Sequence[Any], side_loss: Any, totals: Any
    ) -> Any:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(part)
        floating = [value for value in received if value.dtype.is_floating]
        weights = [keras_internals.native(v) for v in self.weights]
        with tf.GradientTape() as tape:
            tape.watch(floating)
            outputs, own_loss, seeds = self._run(number, self._own_inputs(part), received, training=True)
            y_pred = self.pack(outputs)
            loss = own_loss + self._loss.compute(y, y_pred, sample_weight, share=share, totals=totals)
            weighted = loss * share
        found = tape.gradient(weighted, [*floating, *weights])
        rows = self._add(found[len(floating) :])
        total = loss + side_loss
        keras_internals.loss_tracker(self._model).update_state(total, sample_weight=_num_rows(x))
        self._model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
        return _present(found[: len(floating)], floating), total, seeds, rows

    def _test(self, share: Any, part: Any, received: Sequence[Any], side_loss: Any, totals: Any) -> None:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(part)
        outputs, own_loss, _ = self._run(0, self._own_inputs(part), received, training=False)
        y_pred = self.pack(outputs)
        total = own_loss + side_loss
        total += self._loss.compute(y, y_pred, sample_weight, share=share, totals=totals)
        keras_internals.loss_tracker(self._model).update_state(total, sample_weight=_num_rows(x))
        self._model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def _count(self, part: Any, y_pred: Sequence[Any]) -> Any:
        _, y, sample_weight = keras.utils.unpack_x_y_sample_weight(part)
        return self._loss.count(y, self.pack(y_pred), sample_weight)

    def _shapes_of(self, micro: MicroBatch) -> list[Any]:
        return [
            tf.zeros([micro.num_examples, *(size or 1 for size in t.shape[1:])], t.dtype)
            for t in self.outputs
        ]

    def _add(self, gradients: Sequence[Any]) -> list[Any]:
        """Adds gradients to the sums; returns those that are rows of a table, which optimizers treat as such."""
        rows: list[Any] = []
        for weight, total, gradient in zip(self.weights, self._sums, gradients, strict=True):
            is_rows = isinstance(gradient, tf.IndexedSlices) and id(weight) not in self._shared
            rows.append(gradient if is_rows else None)
            if gradient is not None and not is_rows:
                total.assign_add(tf.convert_to_tensor(gradient))
        return rows

    def _keep_rows(self, rows: Sequence[Any]) -> None:
        for place, part in enumerate(rows):
            if part is not None:
                self._rows.setdefault(place, []).append(part)

    def _joined_rows(self) -> dict[str, tf.IndexedSlices]:
        """Returns the rows of all micro-batches, one behind the other, by the place of their weight."""
        return {
            str(place): tf.IndexedSlices(
                tf.concat([part.values for part in parts], 0),
                tf.concat([part.indices for part in parts], 0),
                parts[0].dense_shape,
            )
            for place, parts in self._rows.items()
        }

    def _gradients(self, rows: Mapping[str, tf.IndexedSlices]) -> list[Any]:
        return [rows.get(str(place), total.read_value()) for place, total in enumerate(self._sums)]

    def _sum_up(self, rows: Mapping[str, tf.IndexedSlices]) -> Any:
        counted = {id(v) for v in self._counted}
        pairs = zip(self.weights, self._gradients(rows), strict=True)
        gradients = [gradient for weight, gradient in pairs if id(weight) in counted]
        values = [g.values if isinstance(g, tf.IndexedSlices) else g for g in gradients]
        totals = [tf.reduce_sum(tf.cast(value, tf.float32)) for value in values]
        optimizer = self._model.optimizer
        if optimizer.gradient_accumulation_steps:
            # It clips the mean over several batches.
            before = keras_internals.accumulators(optimizer)
            weights = [weight for weight in self.weights if id(weight) in counted]
            gradients = [
                (before[id(weight)] + gradient) / optimizer.gradient_accumulation_steps
                for weight, gradient in zip(weights, gradients, strict=True)
            ]
        return tf.stack([tf.add_n([tf.constant(0.0), *totals]), keras_internals.square_norm(gradients)])

    def _apply(
        self, is_sound: Any, norm: Any, seeds: Sequence[Any], rows: Mapping[str, tf.IndexedSlices]
    ) -> None:
        optimizer = self._model.optimizer

        def apply() -> None:
            with keras_internals.updating_only(optimizer, self.weights, norm=norm):
                optimizer.apply(self._gradients(rows), self.weights)

        run_if(is_sound, apply)
        for variable, value in zip(self._seeds if seeds else (), seeds, strict=True):
            variable.assign(value)
        for total in self._sums:
            total.assign(tf.zeros_like(total))

    def _keep_seeds(self, micro: MicroBatch, seeds: Sequence[Any]) -> None:
        if self._next_seeds is None:
            self._next_seeds = seeds


def _weights_of(graph: LayerGraph, plan: StagePlan) -> list[keras.Variable]:
    calls = graph.calls[plan.start : plan.stop]
    return [v for v in variables_of([call.operation for call in calls]) if v.trainable]


def _present(gradients: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """Puts zeros where the loss does not depend on a value."""
    pairs = zip(gradients, values, strict=False)
    return [tf.zeros_like(value) if g is None else tf.convert_to_tensor(g) for g, value in pairs]


def _num_rows(x: Any) -> Any:
    return tf.shape(keras.tree.flatten(x)[0])[0]
