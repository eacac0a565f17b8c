"""The loop of `pipeline`: a model's layers in stages, through which the parts of each batch go one after the other."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist import keras_internals
from tfdist.cluster.heartbeat import Heartbeat
from tfdist.cluster.spec import Cluster
from tfdist.config.pipeline_options import PipelineOptions
from tfdist.data.batches import local_batches
from tfdist.data.segment import Segment
from tfdist.data.sources.source import Source
from tfdist.runtime.strategies import StagedStrategy
from tfdist.training.checkpoint.owners import Holding, Owners, set_owners
from tfdist.training.metrics import metric_results
from tfdist.training.model_loop import Loop
from tfdist.training.pipeline.build import Place, build_stage, divide
from tfdist.training.pipeline.grid import Grid
from tfdist.training.pipeline.links import open_links
from tfdist.training.pipeline.parted_metrics import PartedMetrics
from tfdist.training.pipeline.passes import Passes
from tfdist.training.pipeline.stage import MicroBatch
from tfdist.training.plan import BatchPlan, FinishedStep
from tfdist.training.step.finite_check import GRADIENTS, LOSS, SOUND, SPIKE


# Wide: the model, its division, and each thing that is done with its parts.
class PipelineLoop(Loop):
    """Runs epochs, evaluation and prediction of a model whose layers lie in several processes.

    Args:
        strategy: The run's.
        model: Compiled, made within the strategy's scope.
        cluster: With this process's task.
        options: How it is divided.
        heartbeat: Is told of each step.
        batch: A small batch of the data.

    Raises:
        ConfigError: If the model cannot be divided.
    """

    step_secs: float | None = None

    def __init__(
        self,
        *,
        strategy: StagedStrategy,
        model: keras.Model,
        cluster: Cluster,
        options: PipelineOptions,
        heartbeat: Heartbeat,
        batch: Any,
    ) -> None:
        super().__init__()
        self._model = model
        self._heartbeat = heartbeat
        layout = options.layout(cluster.num_workers)
        self._num_micro_batches = layout.num_micro_batches
        self._grid = grid = Grid(strategy, cluster, layout)
        self.num_readers = len(grid.tasks)  # Each stage reads all of the data.
        self._division = divide(model, batch, options=options, layout=layout)
        self._stage, places = build_stage(
            model,
            batch,
            self._division,
            grid.stage,
            recompute=options.recompute,
            group=grid.blocks,
            block=grid.block,
        )
        self._shared = self._division.shared_weights(model)
        variables = keras_internals.all_variables(model, keras_internals.find_optimizers(model))
        holdings = {key: _holding(grid, place) for key, place in places.items()}
        owners = Owners(variables, holdings, rank=grid.rank, broadcast=grid.broadcast, meet=grid.meet)
        set_owners(model, owners)
        self._passes = Passes(
            self._stage,
            (grid.stage, grid.num_stages),
            open_links(grid),
            options.pipeline_schedule,
            grid.sum_copies,
        )
        self._metrics = PartedMetrics(model, batch, grid)
        self._idle_share = 0.0

    def describe(self) -> str:
        """Returns a line that tells how the model is divided."""
        return self._division.describe()

    def measures(self) -> dict[str, Any]:
        """Returns the share of the epoch in which stages had nothing to do, the mean over them."""
        return {"idle_share": round(self._idle_share, 4)}

    def train_epoch(self, source: Source, plan: BatchPlan) -> Iterator[FinishedStep]:
        """Trains over the plan's steps, yielding once a step, with the logs where `plan.wants_logs`."""
        self._model.reset_metrics()
        if plan.metrics:
            self._metrics.set_state(plan.metrics)
        self.input_wait.begin_epoch()
        self._passes.waited_secs = 0.0
        begun, step = time.perf_counter(), plan.first_step
        for micros, wait_secs in self._batches("train", source, plan):
            fault, loss = self._train(micros, plan)
            self.input_wait.end_step(wait_secs, counts=True)
            yield FinishedStep(
                step=step,
                logs=self._logs() if plan.wants_logs(step) else None,
                is_boundary=plan.is_boundary(step),
                fault=fault,
                loss=loss,
            )
            step += 1
            if plan.is_stopped():
                break
        secs = time.perf_counter() - begun
        self._stage.average_statistics(self._grid)
        self.epoch_logs = self._logs()
        all_secs, idle_share, size = self.all_reduce_sum([secs, self._passes.waited_secs / secs, 1.0])
        self._idle_share = idle_share / size
        num_steps = step - plan.first_step
        self.step_secs = all_secs / size / num_steps if num_steps else None

    def _train(self, micros: Sequence[MicroBatch], plan: BatchPlan) -> tuple[int, float]:
        """Makes a step; returns what was wrong with it, and its loss where that was asked for."""
        stage = self._stage
        if plan.loss_limit is not None:
            stage.remember()
        losses = self._passes.train(micros)
        for weight in self._shared:
            self._sum_stages(weight)
        stage.gradients.sum_copies(self._grid)
        clips = getattr(self._model.optimizer, "global_clipnorm", None) is not None
        if plan.loss_limit is None and not clips:
            stage.update()
            return SOUND, 0.0
        own_loss = 0.0 if self._grid.block else math.fsum(share * float(loss) for share, loss in losses)
        # The copies' gradients are the same now.
        sums = stage.gradients.sum_up() if self._grid.copy == 0 else (0.0, 0.0)
        total, squares, loss = self.all_reduce_sum([*sums, own_loss])
        fault = SOUND
        if plan.loss_limit is not None:
            if not math.isfinite(loss):
                fault = LOSS
            elif loss > plan.loss_limit():
                fault = SPIKE
            elif not math.isfinite(total):
                fault = GRADIENTS
        stage.update(is_sound=fault == SOUND, norm=float(np.sqrt(squares)))
        return fault, loss

    def _sum_stages(self, weight: keras.Variable) -> None:
        """Adds up the gradients by a weight that several stages have, over these and their copies."""
        own = self._stage.gradients.of(weight)
        part = keras_internals.own_part(weight) or ...
        value = np.zeros(keras_internals.whole_shape(weight), np.float32)
        # Blocks of a stage have parts of it, or all of them the same.
        if own is not None and (part is not ... or self._grid.block == 0):
            value[part] = own.numpy()
        summed = self._grid.sum_all(value.reshape(-1)).reshape(value.shape)
        if own is not None:
            own.assign(summed[part])

    def evaluate(self, source: Source, plan: BatchPlan) -> dict[str, Any]:
        """Returns the metrics over the plan's steps."""
        self._model.reset_metrics()
        for micros, _ in self._batches("test", source, plan):
            self._passes.test(micros)
            self._heartbeat.beat()
        return self._logs()

    def predict(self, source: Source, plan: BatchPlan) -> Any:
        """Returns the outputs as arrays in the data's order, on every process."""
        found: list[Any] = []
        for micros, _ in self._batches("predict", source, plan):
            found.append(self._passes.predict(micros))
            self._heartbeat.beat()
        sizes = np.array([len(outputs[0]) if outputs else 0 for outputs in found])
        own = [np.concatenate(parts) for parts in zip(*filter(None, found), strict=True)]
        return self._stage.end.pack(_interleave(self._grid.from_last([sizes, *own])))

    def snapshot_metrics(self) -> list[Any]:
        """Returns the metrics' state, which the last stage has; every process must call it."""
        self._stage.average_statistics(self._grid)
        return self._metrics.state()

    def broadcast(self, content: bytes, *, source: int = 0) -> bytes:
        """Returns the bytes of the process with that number on every process."""
        return self._grid.broadcast(content, source=source)

    def all_reduce_sum(self, values: list[float]) -> list[float]:
        """Returns the sums over all processes."""
        return self._grid.sum_all(np.array(values, np.float64)).tolist()

    def meet(self) -> None:
        """Returns once every process has called it, and needs nothing of the others for what came before."""
        self._grid.meet()

    def _logs(self) -> dict[str, Any]:
        return metric_results(self._model, self._metrics.state())

    def _batches(
        self, kind: str, source: Source, plan: BatchPlan
    ) -> Iterator[tuple[list[MicroBatch], float]]:
        """Yields each batch's micro-batches, and how long it was waited for, in seconds."""
        for segment in self._segments(source, plan):
            iterator = self._position.open(segment, source, plan, kind=kind)
            num_steps = 0
            while segment.num_steps is None or num_steps < segment.num_steps:
                start = time.perf_counter()
                try:
                    parts, size = segment.split(next(iterator))
                except (StopIteration, tf.errors.OutOfRangeError):
                    break
                wait_secs = time.perf_counter() - start
                yield self._micro_batches(parts, int(size)), wait_secs
                num_steps += 1
            self._position.keep(segment, iterator, kind=kind)

    def _micro_batches(self, parts: Sequence[Any], size: int) -> list[MicroBatch]:
        """Returns this copy's, without those that a short batch at the end leaves empty; the first, if all are."""
        first = self._grid.copy * self._num_micro_batches
        counts = [int(tf.nest.flatten(part)[0].shape[0]) for part in parts]
        found = [
            MicroBatch(first + place, count, count / size, part)
            for place, (count, part) in enumerate(zip(counts, parts, strict=True))
        ]
        return [micro for micro in found if micro.num_examples] or found[:1]

    def _segments(self, source: Source, plan: BatchPlan) -> Sequence[Segment]:
        # Micro-batches are shared out as replicas' parts are.
        first, count = self._grid.copy * self._num_micro_batches, self._num_micro_batches
        share = plan.share(self._grid.num_copies * count, range(first, first + count))
        return local_batches(source, share)


def _holding(grid: Grid, place: Place) -> Holding:
    num_parts = 1 if place.axis is None else grid.num_blocks
    return Holding(
        [grid.rank_of(stage=place.stage, block=block) for block in range(num_parts)], place.axis or 0
    )


def _interleave(parts: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """Returns each output whole: of each batch the copies have parts, in their order.

    Args:
        parts: Of each copy: of each batch its examples, then its outputs.
    """
    ends = [np.cumsum(sizes) for sizes, *_ in parts]
    # Who has had no example has no outputs either.
    num_outputs = max(len(outputs) for _, *outputs in parts)
    return [
        np.concatenate(
            [
                outputs[place][end[batch] - sizes[batch] : end[batch]]
                for batch in range(len(ends[0]))
                for (sizes, *outputs), end in zip(parts, ends, strict=True)
                if sizes[batch]
            ]
        )
        for place in range(num_outputs)
    ]
