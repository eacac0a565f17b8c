"""The layers of one stage of a model: what they take, what they make, and which variables are theirs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfdist import keras_internals
from tfdist.training.pipeline.cut import StagePlan
from tfdist.training.pipeline.layer_graph import LayerGraph, variables_of
from tfdist.training.step.replica import SEED_STRIDE
from tfdist.training.tensor_parallel.own_blocks import OwnBlocks


# Wide: sorts of tensors and variables, a list each.
class StageLayers:
    """A stage's layers, whose variables get their values here.

    Args:
        model: The whole one, made within `keras_internals.deferring_variables`.
        graph: The model's.
        plans: Of all stages.
        index: Which of them this is.
        blocks: What this process has of layers that are divided.

    Attributes:
        inputs: What comes from the stage before.
        outputs: What goes to the next; of the last stage the model's.
        weights: What is trained.
        counted: Of these, those that no stage before has: what a sum over the stages takes from here.
        summed: Of these, what a sum over the blocks takes from here, too.
        shared: The `id` of each weight that other stages have, too.
        has_tables: Whether gradients may be rows of a table.
        seeds: States of the random streams.
        statistics: All other variables that are not trained.
    """

    def __init__(
        self, model: keras.Model, graph: LayerGraph, plans: Sequence[StagePlan], index: int, blocks: OwnBlocks
    ) -> None:
        plan = plans[index]
        self._model = model
        self._blocks = blocks
        self.inputs = graph.crossing(plan.start)
        self.outputs = list(model.outputs) if index == len(plans) - 1 else graph.crossing(plan.stop)
        calls = graph.calls[plan.start : plan.stop]
        made = {id(tensor) for call in calls for tensor in call.outputs}
        taken = {id(tensor) for call in calls for tensor in call.inputs}
        self._places = [place for place, tensor in enumerate(model.inputs) if id(tensor) in taken]
        self._taken = [place for place, tensor in enumerate(self.inputs) if id(tensor) in taken]
        self._layers = keras.Model(
            [
                *(model.inputs[place] for place in self._places),
                *(self.inputs[place] for place in self._taken),
            ],
            [tensor for tensor in self.outputs if id(tensor) in made],
        )
        # What only passes by, as what a connection skips several stages with.
        known = {id(tensor): place for place, tensor in enumerate(self.inputs)}
        self._passing = [None if id(tensor) in made else known[id(tensor)] for tensor in self.outputs]
        variables = variables_of([call.operation for call in calls])
        for variable in variables:
            keras_internals.materialize(variable, blocks.part(variable))
        blocks.divide_calls(calls)
        self.weights = [v for v in variables if v.trainable]
        before, after = (
            {id(v) for p in others for v in _weights_of(graph, p)}
            for others in (plans[:index], plans[index + 1 :])
        )
        self.counted = [v for v in self.weights if id(v) not in before]
        self.summed = [
            v for v in self.counted if blocks.block == 0 or keras_internals.own_part(v) is not None
        ]
        self.shared = {id(v) for v in self.weights} & (before | after)
        self.has_tables = any(isinstance(call.operation, keras.layers.Embedding) for call in calls)
        self.seeds = keras_internals.seed_states(self._layers)
        seeds = {id(v) for v in self.seeds}
        self.statistics = [v for v in variables if not v.trainable and id(v) not in seeds]

    def own_inputs(self, part: Any) -> list[Any]:
        """Returns what these layers take themselves of a batch, which is as `train_step` takes it."""
        x = keras_internals.standard_inputs(self._model, keras.utils.unpack_x_y_sample_weight(part)[0])
        return [x[place] for place in self._places]

    def run(
        self,
        number: Any,
        own: Sequence[Any],
        received: Sequence[Any],
        *,
        training: bool,
        is_again: bool = False,
    ) -> tuple[list[Any], Any, list[Any]]:
        """Runs the layers on a micro-batch.

        Args:
            number: Of the micro-batch: it draws what the replica of that number draws.
            own: As `own_inputs` returns it.
            received: As `inputs`.
            training: As for a layer.
            is_again: Whether they have run on it before: statistics stay as they are.

        Returns:
            The outputs, what the layers add to the loss (float32 scalar), and the seeds' next states.
        """
        shift = tf.cast(number, tf.int64) * tf.constant([SEED_STRIDE, 0], tf.int64)
        shifted = [
            (seed, tf.cast(tf.math.floormod(tf.cast(seed.value, tf.int64) + shift, 2**32), seed.dtype))
            for seed in self.seeds
        ]
        with keras.StatelessScope(state_mapping=shifted, collect_losses=True) as scope:
            made = self._layers([*own, *(received[place] for place in self._taken)], training=training)
            losses = [keras.ops.sum(loss) for loss in scope.losses]
            losses += self._penalties()
        if training and not is_again:
            for variable in self.statistics:
                if (value := scope.get_current_value(variable)) is not None:
                    variable.assign(value)
        # Of a random stream the place in it goes on, and the stream stays.
        seeds = [tf.stack([s.value[0], scope.get_current_value(s)[1]]) for s in self.seeds]
        fresh: Iterator[Any] = iter(keras.tree.flatten(made))
        outputs = [next(fresh) if place is None else tf.identity(received[place]) for place in self._passing]
        return outputs, tf.add_n([tf.constant(0.0), *(tf.cast(loss, tf.float32) for loss in losses)]), seeds

    def _penalties(self) -> list[Any]:
        """Returns what the weights' regularizers add to the loss; of a weight in blocks, the sum of all parts."""
        found: dict[bool, list[Any]] = {True: [], False: []}
        for variable in self.counted:
            if variable.regularizer is not None:
                value = tf.cast(keras.ops.sum(variable.regularizer(variable)), tf.float32)
                found[keras_internals.own_part(variable) is None].append(value)
        return [*found[True], *([self._blocks.group.sum(tf.add_n(found[False]))] if found[False] else [])]


def _weights_of(graph: LayerGraph, plan: StagePlan) -> list[keras.Variable]:
    calls = graph.calls[plan.start : plan.stop]
    return [v for v in variables_of([call.operation for call in calls]) if v.trainable]
