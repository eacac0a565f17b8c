"""From a whole model that has no memory yet to the stage that this process runs."""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras

from tfdist import keras_internals
from tfdist.config.pipeline_options import Layout, PipelineOptions
from tfdist.errors import ConfigError
from tfdist.training.pipeline.cut import Cutter, StagePlan, count_slots
from tfdist.training.pipeline.layer_graph import LayerGraph, variables_of
from tfdist.training.pipeline.stage import Stage
from tfdist.training.tensor_parallel.divided import DividedLayers, check_compiled, find_divided
from tfdist.training.tensor_parallel.group import ProcessGroup
from tfdist.training.tensor_parallel.own_blocks import OwnBlocks

_USUAL_MICRO_BATCH = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Division:
    """A model that is divided into stages.

    Attributes:
        graph: The model's.
        plans: Of the stages.
        holders: The stages that have a variable of the layers, by its id.
        blocks: The layers that are divided in blocks.
    """

    graph: LayerGraph
    plans: Sequence[StagePlan]
    holders: dict[int, list[int]]
    blocks: DividedLayers

    def name(self, plan: StagePlan) -> str:
        """Returns a stage's first and last layer."""
        calls = self.graph.calls[plan.start : plan.stop]
        # What stands between layers has names that nobody gave.
        names = [c.operation.name for c in calls if isinstance(c.operation, keras.Layer)]
        names = names or [c.operation.name for c in calls]
        return f"{names[0]} … {names[-1]}"

    def describe(self) -> str:
        """Returns a line that tells of the stages."""
        work = sum(plan.flops for plan in self.plans)
        stages = []
        for plan in self.plans:
            weights, share = (
                f"{plan.weight_bytes / 1e6:,.1f} MB of weights",
                f"{plan.flops / work:.0%} of the work",
            )
            stages.append(f"{self.name(plan)} ({weights}, {share})")
        parts = [f"{len(stages)} stages: {'; '.join(stages)}"] if len(stages) > 1 else []
        return "; ".join([*parts, *filter(None, [self.blocks.describe()])])

    def shared_weights(self, model: keras.Model) -> list[keras.Variable]:
        """Returns the weights that several stages have, whose gradients they add up."""
        return [v for v in model.trainable_variables if len(self.holders[id(v)]) > 1]


# A division holds tensors of its model, and these the layers: as long as the model lives.
_divisions: weakref.WeakKeyDictionary[keras.Model, Division] = weakref.WeakKeyDictionary()


def divide(
    model: keras.Model,
    batch: Any,
    *,
    options: PipelineOptions,
    layout: Layout,
    micro_batch_size: int = _USUAL_MICRO_BATCH,
) -> Division:
    """Divides a compiled model, functional or `Sequential`.

    What a stage holds of activations is estimated for micro-batches of `micro_batch_size` examples.

    Raises:
        ConfigError: If it cannot be divided so.
    """
    _check_model(model)
    if (known := _divisions.get(model)) is not None:  # compiled anew: its weights are where they are
        check_compiled(model, known.blocks)
        return known
    num_stages = layout.num_stages
    with keras_internals.deferring_variables():  # a trace reads what has no value yet
        graph = LayerGraph(model, keras.utils.unpack_x_y_sample_weight(batch)[0])
    blocks = find_divided(model, graph.calls, layout.num_blocks)
    graph.divided = blocks.tensors
    if any(map(keras_internals.has_mask, model.outputs)):
        raise ConfigError(
            "the model's output carries a mask, by which its loss would be divided: leave mask_zero out, and weigh "
            "what counts by sample_weight, or choose another strategy."
        )
    cutter = Cutter(
        graph,
        slots_per_weight=count_slots(model.optimizer),
        micro_batch_size=micro_batch_size,
        num_micro_batches=layout.num_micro_batches,
        share=blocks.share,
    )
    if options.cut is not None:
        if len(options.cut_layers) != num_stages - 1:
            raise ConfigError(
                f"cut={options.cut!r} with {num_stages} stages: name {num_stages - 1} layers, one for each stage but "
                "the first."
            )
        plans = cutter.cut_before(options.cut_layers)
    else:
        gigabytes = options.stage_memory_gb
        plans = cutter.cut(num_stages, most_bytes=math.inf if gigabytes is None else 1e9 * gigabytes)
    holders: dict[int, list[int]] = {}
    for stage, plan in enumerate(plans):
        for variable in variables_of([call.operation for call in graph.calls[plan.start : plan.stop]]):
            holders.setdefault(id(variable), []).append(stage)
            if not variable.trainable and len(holders[id(variable)]) > 1:
                raise ConfigError(
                    f"{variable.path!r} would be changed in two stages, {stage + 1} the second: begin "
                    "a stage elsewhere (--cut), so that all calls of this layer are in one."
                )
    _divisions[model] = Division(graph=graph, plans=plans, holders=holders, blocks=blocks)
    return _divisions[model]


class Place(NamedTuple):
    """Where a variable's value is.

    Attributes:
        stage: The first that has it.
        axis: Along which it is divided among this stage's blocks; None: each of them has all.
    """

    stage: int
    axis: int | None


def build_stage(
    model: keras.Model,
    batch: Any,
    division: Division,
    index: int,
    *,
    recompute: bool = False,
    group: ProcessGroup | None = None,
    block: int = 0,
) -> tuple[Stage, dict[int, Place]]:
    """Gives this stage's weights, and all that the optimizer keeps for them, their first values.

    Args:
        model: Made within `keras_internals.deferring_variables`.
        batch: A small batch of the data.
        division: Of the model.
        index: Of this stage.
        recompute: As for `Stage`.
        group: The processes that have the blocks of this stage's layers; None: it is one.
        block: Which this process has.

    Returns:
        The stage, and where each variable is that not every process has whole, by its id.
    """
    blocks = division.blocks
    stage = Stage(
        model,
        division.graph,
        division.plans,
        index,
        recompute=recompute,
        blocks=OwnBlocks(blocks, group, block),
    )
    with keras_internals.deferring_variables() as slots:
        keras_internals.build_model(model, batch)
    holders, weight_of = dict(division.holders), {}
    for slot, weight in slots:
        weight_of[id(slot)] = weight
        if id(weight) in holders:
            holders[id(slot)] = holders[id(weight)]
        blocks.follow(slot, weight)
    for variable in keras_internals.all_variables(model, keras_internals.find_optimizers(model)):
        if index in holders.get(id(variable), [index]):
            keras_internals.materialize(variable, beside=weight_of.get(id(variable)))
        else:
            keras_internals.refuse_reading(
                variable, f"{variable.path} is another stage's, and has no value here"
            )
    places = {
        key: Place(stages[0], blocks.axes.get(key))
        for key, stages in holders.items()
        if key in blocks.axes or len(stages) < len(division.plans)
    }
    return stage, places


def _check_model(model: keras.Model) -> None:
    name = type(model).__name__
    if keras_internals.has_own_step(model) or type(model).compute_loss is not keras.Model.compute_loss:
        raise ConfigError(
            f"strategy 'pipeline' with {name}, which has a train_step or compute_loss of its own: only Keras's own can "
            "be divided among stages; choose another strategy."
        )
    if isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer):
        raise ConfigError(
            "strategy 'pipeline' with a loss scale: choose mixed_precision='bfloat16', which needs none."
        )
    if keras.distribution.distribution() is not None:
        raise ConfigError(
            "keras.distribution is set, which does nothing under TensorFlow: leave it out; --strategy=pipeline divides "
            "the model."
        )
