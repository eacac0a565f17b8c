"""One stage of a model: forward and backward passes of micro-batches, whose gradients are summed for one update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tfdist import keras_internals
from tfdist.collectives.communicator import join, split
from tfdist.training.pipeline.cut import StagePlan
from tfdist.training.pipeline.grid import Grid
from tfdist.training.pipeline.layer_graph import LayerGraph
from tfdist.training.pipeline.stage_end import StageEnd
from tfdist.training.pipeline.stage_gradients import StageGradients
from tfdist.training.pipeline.stage_layers import StageLayers
from tfdist.training.tensor_parallel.own_blocks import OwnBlocks


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
    """A forward pass whose backward pass is to come: on a tape, or to be made again."""

    own: Sequence[Any]
    received: Sequence[Any]
    tape: tf.GradientTape | None = None
    sources: Sequence[Any] = ()
    targets: Sequence[Any] = ()


# Wide: five passes have a graph each.
class Stage:
    """Makes a stage's passes and updates.

    Args:
        model: The whole one, made within `keras_internals.deferring_variables`; this stage's weights get their values.
        graph: The model's.
        plans: Of all stages.
        index: Which of them this is.
        recompute: Whether what a stage's layers make is forgotten, and made again for the backward pass.
        blocks: What this process has of layers that are divided; None: all of them.

    Attributes:
        layers: Its layers.
        gradients: Of its weights, summed so far.
        end: What comes behind the model's last layer.
        is_last: Whether that is here.
    """

    def __init__(
        self,
        model: keras.Model,
        graph: LayerGraph,
        plans: Sequence[StagePlan],
        index: int,
        *,
        recompute: bool = False,
        blocks: OwnBlocks | None = None,
    ) -> None:
        blocks = blocks or OwnBlocks()
        self.layers = StageLayers(model, graph, plans, index, blocks)
        self.gradients = StageGradients(self.layers, model.optimizer)
        self.is_last = index == len(plans) - 1
        # Keras weighs the loss of each output by the static size of a batch, and blocks exchange what has one shape.
        by_size = (self.is_last and keras_internals.has_loss_by_output(model)) or blocks.group.size > 1
        options = {"autograph": False, "reduce_retracing": not by_size}
        vocabulary = blocks.vocabulary(model) if self.is_last else None
        self.end = StageEnd(model, self.layers.outputs, vocabulary, options)
        self._recompute = recompute
        self._waiting: dict[int, _Waiting] = {}
        self._streams = _RandomStreams(self.layers.seeds)
        self._before: list[tuple[tf.Variable, Any]] = []
        self._forward_fn = tf.function(self._forward, **options)
        self._again_fn = tf.function(self._forward_again_and_backward, **options)
        self._loss_fn = tf.function(self._forward_and_backward, **options)
        self._test_fn = tf.function(self._test, **options)
        self._predict_fn = tf.function(self._predict, **options)

    def forward(
        self, micro: MicroBatch, received: Sequence[Any], side_loss: Any
    ) -> tuple[Sequence[Any], Any]:
        """Makes a forward pass, of any stage but the last.

        Args:
            micro: The micro-batch.
            received: From the stage before, as `layers.inputs`.
            side_loss: What the layers of the stages before add to the loss, scalar.

        Returns:
            What goes on, as `layers.outputs`, and the side loss with this stage's.
        """
        own, number = self.layers.own_inputs(micro.part), tf.constant(micro.number)
        if self._recompute:
            outputs, own_loss, seeds = self._forward_fn(number, own, list(received))
            waiting = _Waiting(own, received)
        else:
            sources = [*_floating(received), *map(keras_internals.native, self.layers.weights)]
            with tf.GradientTape() as tape:
                tape.watch(sources)
                outputs, own_loss, seeds = self._forward_fn(number, own, list(received))
            waiting = _Waiting((), received, tape, sources, [*_floating(outputs), own_loss])
        self._streams.keep(seeds)
        self._waiting[micro.number] = waiting
        return outputs, side_loss + own_loss

    def backward(self, micro: MicroBatch, gradients: Sequence[Any]) -> list[Any]:
        """Makes the backward pass that belongs to a forward one; returns the gradients by the floating inputs.

        `gradients` are those of the loss by the floating outputs, from the next stage, weighted by the share.
        """
        waiting, share = self._waiting.pop(micro.number), tf.constant(micro.share)
        if waiting.tape is None:
            found, rows = self._again_fn(
                tf.constant(micro.number),
                share,
                list(waiting.own),
                list(waiting.received),
                list(gradients),
                tf.constant(self.gradients.is_first()),
            )
            self.gradients.keep(rows)
            return list(found)
        found = waiting.tape.gradient(waiting.targets, waiting.sources, output_gradients=[*gradients, share])
        num_inputs = len(found) - len(self.layers.weights)
        self.gradients.add_now(found[num_inputs:])
        return _present(found[:num_inputs], waiting.sources)

    def forward_and_backward(
        self, micro: MicroBatch, received: Sequence[Any], side_loss: Any, totals: Any
    ) -> tuple[list[Any], Any]:
        """Makes both passes of the last stage, where one follows the other; see `forward`.

        `totals` is what `count` returns of the batch. Returns the gradients by the floating inputs, and the loss.
        """
        gradients, loss, seeds, rows = self._loss_fn(
            tf.constant(micro.number),
            tf.constant(micro.share),
            micro.part,
            list(received),
            side_loss,
            totals,
            tf.constant(self.gradients.is_first()),
        )
        self.gradients.keep(rows)
        self._streams.keep(seeds)
        return gradients, loss

    def test(self, micro: MicroBatch, received: Sequence[Any], side_loss: Any, totals: Any) -> None:
        """Updates the metrics, in the last stage."""
        self._test_fn(tf.constant(micro.share), micro.part, list(received), side_loss, totals)

    def count(self, micros: Sequence[MicroBatch]) -> Any:
        """Returns what the loss of a part of a batch must know of the whole one, in the last stage."""
        return self.end.count([micro.part for micro in micros], [micro.num_examples for micro in micros])

    def predict(self, micro: MicroBatch, received: Sequence[Any]) -> tuple[Sequence[Any], Any]:
        """Returns what goes on, or the outputs, when nobody learns, and what this stage adds to the loss."""
        return self._predict_fn(self.layers.own_inputs(micro.part), list(received))

    def remember(self) -> None:
        """Keeps what a step changes besides the weights, for `update` to bring back if something was wrong."""
        side = [*self.layers.statistics, *(self.end.variables if self.is_last else ())]
        self._before = [(own, tf.identity(own)) for own in map(keras_internals.native, side)]

    def update(self, *, is_sound: bool = True, norm: float = 0.0) -> None:
        """Ends a step; of one that is not sound nothing is changed, and what was remembered comes back.

        `norm` is that of the gradients by all weights of the model.
        """
        self.gradients.apply(is_sound=is_sound, norm=norm)
        if is_sound:
            self._streams.move()
        else:
            for variable, value in self._before:
                variable.assign(value)
        self._streams.forget()
        self._before = []

    def average_statistics(self, grid: Grid) -> None:
        """Makes what the stage's copies have seen for themselves, as moving averages, the mean over them."""
        natives = map(keras_internals.native, self.layers.statistics)
        floating = [variable for variable in natives if variable.dtype.is_floating]
        if grid.num_copies == 1 or not floating:
            return
        means = (
            grid.sum_copies(join([tf.cast(variable, tf.float32) for variable in floating])) / grid.num_copies
        )
        for variable, mean in zip(floating, split(means, floating), strict=True):
            variable.assign(tf.cast(mean, variable.dtype))

    def _forward(self, number: Any, own: Sequence[Any], received: Sequence[Any]) -> Any:
        return self.layers.run(number, own, received, training=True)

    def _predict(self, own: Sequence[Any], received: Sequence[Any]) -> Any:
        outputs, side_loss, _ = self.layers.run(0, own, received, training=False)
        return self.end.whole(outputs), side_loss

    def _forward_again_and_backward(
        self,
        number: Any,
        share: Any,
        own: Sequence[Any],
        received: Sequence[Any],
        gradients: Sequence[Any],
        is_first: Any,
    ) -> Any:
        floating = _floating(received)
        sources = [*floating, *map(keras_internals.native, self.layers.weights)]
        with tf.GradientTape() as tape:
            tape.watch(floating)
            outputs, own_loss, _ = self.layers.run(number, own, received, training=True, is_again=True)
        found = tape.gradient([*_floating(outputs), own_loss], sources, output_gradients=[*gradients, share])
        rows = self.gradients.add(found[len(floating) :], is_first)
        return _present(found[: len(floating)], floating), rows

    def _forward_and_backward(
        self,
        number: Any,
        share: Any,
        part: Any,
        received: Sequence[Any],
        side_loss: Any,
        totals: Any,
        is_first: Any,
    ) -> Any:
        floating = _floating(received)
        sources = [*floating, *map(keras_internals.native, self.layers.weights)]
        with tf.GradientTape() as tape:
            tape.watch(floating)
            own = self.layers.own_inputs(part)
            outputs, own_loss, seeds = self.layers.run(number, own, received, training=True)
            seen = self.end.see(part, outputs)
            loss = own_loss + self.end.loss(seen, share=share, totals=totals)
            weighted = loss * share
        found = tape.gradient(weighted, sources)
        rows = self.gradients.add(found[len(floating) :], is_first)
        total = loss + side_loss
        self.end.note(seen, total)
        return _present(found[: len(floating)], floating), total, seeds, rows

    def _test(self, share: Any, part: Any, received: Sequence[Any], side_loss: Any, totals: Any) -> None:
        outputs, own_loss, _ = self.layers.run(0, self.layers.own_inputs(part), received, training=False)
        seen = self.end.see(part, outputs)
        self.end.note(seen, own_loss + side_loss + self.end.loss(seen, share=share, totals=totals))


class _RandomStreams:
    """The states of layers' generators, which go on once a step, by what its first micro-batch has drawn."""

    def __init__(self, seeds: Sequence[Any]) -> None:
        self._seeds = seeds
        self._next: Sequence[Any] | None = None
        self._draws: Sequence[Any] | None = None

    def keep(self, after: Sequence[Any]) -> None:
        """Takes the states after a micro-batch."""
        if self._next is None:
            self._next = after

    def move(self) -> None:
        """Lets the streams go on; a copy without examples goes on as the others do."""
        if self._next is not None:
            self._draws = [after - seed.value for after, seed in zip(self._next, self._seeds, strict=True)]
        for seed, count in zip(self._seeds, self._draws or (), strict=False):
            seed.assign(seed.value + count)

    def forget(self) -> None:
        """Ends the step."""
        self._next = None


def _floating(values: Sequence[Any]) -> list[Any]:
    return [value for value in values if value.dtype.is_floating]


def _present(gradients: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """Puts zeros where the loss does not depend on a value."""
    pairs = zip(gradients, values, strict=False)
    return [tf.zeros_like(value) if g is None else tf.convert_to_tensor(g) for g, value in pairs]
