"""From a whole model that has no memory yet to the stage that this process runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import keras

from tfdist import keras_internals
from tfdist.config.pipeline_options import PipelineOptions
from tfdist.errors import ConfigError
from tfdist.training.pipeline.cut import Cutter, StagePlan, count_slots
from tfdist.training.pipeline.layer_graph import LayerGraph, variables_of
from tfdist.training.pipeline.stage import Stage

_USUAL_MICRO_BATCH = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Division:
    """A model that is divided into stages.

    Attributes:
        graph: The model's.
        plans: Of the stages.
        holders: The stages that have a variable of the layers, by its id.
    """

    graph: LayerGraph
    plans: Sequence[StagePlan]
    holders: dict[int, list[int]]

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
        return f"{len(stages)} stages: {'; '.join(stages)}"

    def shared_weights(self, model: keras.Model) -> list[keras.Variable]:
        """Returns the weights that several stages have, whose gradients they add up."""
        return [v for v in model.trainable_variables if len(self.holders[id(v)]) > 1]


def divide(
    model: keras.Model,
    batch: Any,
    *,
    options: PipelineOptions,
    num_stages: int,
    micro_batch_size: int = _USUAL_MICRO_BATCH,
) -> Division:
    """Divides a model.

    Args:
        model: Compiled, functional or `Sequential`.
        batch: A small batch of the data.
        options: How.
        num_stages: How many stages.
        micro_batch_size: Examples, by which the activations that a stage holds are estimated.

    Raises:
        ConfigError: If it cannot be divided so.
    """
    _check_model(model)
    with keras_internals.deferring_variables():  # a trace reads what has no value yet
        graph = LayerGraph(model, keras.utils.unpack_x_y_sample_weight(batch)[0])
    if any(map(keras_internals.has_mask, model.outputs)):
        raise ConfigError(
            "the model's output carries a mask, by which its loss would be divided: leave mask_zero out, and weigh "
            "what counts by sample_weight, or choose another strategy."
        )
    cutter = Cutter(
        graph,
        slots_per_weight=count_slots(model.optimizer),
        micro_batch_size=micro_batch_size,
        num_micro_batches=options.num_micro_batches,
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
    return Division(graph=graph, plans=plans, holders=holders)


def build_stage(
    model: keras.Model, batch: Any, division: Division, index: int, *, recompute: bool = False
) -> tuple[Stage, dict[int, int]]:
    """Gives this stage's weights, and all that the optimizer keeps for them, their first values.

    Args:
        model: Made within `keras_internals.deferring_variables`.
        batch: A small batch of the data.
        division: Of the model.
        index: Of this stage.
        recompute: As for `Stage`.

    Returns:
        The stage, and for each variable that not every stage has, by its id, the first stage that has it.
    """
    stage = Stage(model, division.graph, division.plans, index, recompute=recompute)
    with keras_internals.deferring_variables() as slots:
        keras_internals.build_model(model, batch)
    owners = {key: stages[0] for key, stages in division.holders.items() if len(stages) < len(division.plans)}
    has_it = {key for key, stages in division.holders.items() if index in stages}
    for slot, weight in slots:
        if id(weight) in owners:
            owners[id(slot)] = owners[id(weight)]
        if id(weight) in has_it:
            has_it.add(id(slot))
    for variable in keras_internals.all_variables(model, keras_internals.find_optimizers(model)):
        if id(variable) in has_it or id(variable) not in owners:
            keras_internals.materialize(variable)
        else:
            keras_internals.refuse_reading(
                variable, f"{variable.path} is another stage's, and has no value here"
            )
    return stage, owners


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
