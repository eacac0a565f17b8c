"""The loop of `pipeline`: a model's layers in stages, through which the parts of each batch go one after the other."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist import keras_internals
from tfdist.cluster.heartbeat import Heartbeat
from tfdist.cluster.spec import Cluster, split_address
from tfdist.config.pipeline_options import PipelineOptions
from tfdist.data import Segment, Source, local_batches
from tfdist.runtime.strategies import StagedStrategy, wait_for_workers
from tfdist.training.checkpoint.input_position import InputPosition, KeptIterators
from tfdist.training.checkpoint.owners import Owners, set_owners
from tfdist.training.metrics import metric_results
from tfdist.training.monitoring.input_wait import InputWait
from tfdist.training.pipeline.build import build_stage, divide
from tfdist.training.pipeline.links import open_links
from tfdist.training.pipeline.passes import Passes
from tfdist.training.pipeline.stage import MicroBatch
from tfdist.training.plan import BatchPlan, FinishedStep
from tfdist.training.step.finite_check import GRADIENTS, LOSS, SOUND, SPIKE
from tfdist.training.step.replicas import Replicas


class PipelineLoop:
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

    num_replicas = 1

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
        tasks = cluster.tasks
        assert cluster.task is not None
        self._strategy = strategy
        self._model = model
        self._heartbeat = heartbeat
        self._replicas = Replicas(strategy.workers)
        self._num_micro_batches = options.num_micro_batches
        self._num_stages = len(tasks)
        self._rank = tasks.index(cluster.task)
        self._division = divide(model, batch, options=options, num_stages=self._num_stages)
        self._stage, owners = build_stage(model, batch, self._division, self._rank)
        self._shared = self._division.shared_weights(model)
        variables = keras_internals.all_variables(model, keras_internals.find_optimizers(model))
        set_owners(model, Owners(variables, owners, rank=self._rank, broadcast=self.broadcast))
        links = open_links(
            rank=self._rank,
            num_stages=self._num_stages,
            peers=[str(task) for task in tasks],
            hosts=[split_address(cluster.address(task))[0] for task in tasks],
            broadcast=lambda content, source: self.broadcast(content, source=source),
        )
        self._passes = Passes(self._stage, (self._rank, self._num_stages), links, options.pipeline_schedule)
        self.input_wait = InputWait()
        self.epoch_logs: dict[str, Any] = {}
        self._position = InputPosition()
        self._between_tests = KeptIterators()
        self.step_secs: float | None = None
        self._idle_share = 0.0

    @property
    def num_readers(self) -> int:
        """Processes that read the data: each stage reads all of them."""
        return self._num_stages

    def describe(self) -> str:
        """Returns a line that tells how the model is divided."""
        return self._division.describe()

    def measures(self) -> dict[str, Any]:
        """Returns the share of the epoch in which stages had nothing to do, the mean over them."""
        return {"idle_share": round(self._idle_share, 4)}

    def shard_source_of(self, source: Source, shard: str) -> Source:
        """Returns the source: all stages see the same batches."""
        del shard
        return source

    def start(self) -> None:
        """Prepares for training."""
        self.release()

    def release(self) -> None:
        """Lets go of the data."""
        self._position.forget()
        self._between_tests.forget()

    def train_epoch(self, source: Source, plan: BatchPlan) -> Iterator[FinishedStep]:
        """Trains over the plan's steps, yielding once a step, with the logs where `plan.wants_logs`."""
        self._model.reset_metrics()
        if plan.metrics and self._stage.is_last:
            for variable, value in zip(self._model.metrics_variables, plan.metrics, strict=True):
                variable.assign(value)
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
        self.epoch_logs = self._logs()
        all_secs, idle_share = self.all_reduce_sum([secs, self._passes.waited_secs / secs])
        self._idle_share = idle_share / self._num_stages
        num_steps = step - plan.first_step
        self.step_secs = all_secs / self._num_stages / num_steps if num_steps else None

    def _train(self, micros: Sequence[MicroBatch], plan: BatchPlan) -> tuple[int, float]:
        """Makes a step; returns what was wrong with it, and its loss where that was asked for."""
        stage = self._stage
        losses = self._passes.train(micros)
        for weight in self._shared:
            own = stage.gradient_of(weight)
            value = np.zeros(weight.shape, np.float32) if own is None else own.numpy()
            summed = self._replicas.sum_first(value.reshape(-1)).reshape(weight.shape)
            if own is not None:
                own.assign(summed)
        clips = getattr(self._model.optimizer, "global_clipnorm", None) is not None
        if plan.loss_limit is None and not clips:
            stage.update(is_sound=True, norm=0.0)
            return SOUND, 0.0
        own_loss = math.fsum(share * float(loss) for share, loss in losses)
        total, squares, loss = self.all_reduce_sum([*stage.sum_up(), own_loss])
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
            found += [keras.tree.map_structure(lambda t: t.numpy(), o) for o in self._passes.predict(micros)]
            self._heartbeat.beat()
        outputs = keras.tree.map_structure(lambda *parts: np.concatenate(parts), *found) if found else ()
        return self._stage.pack(self._from_last(outputs))

    def snapshot_metrics(self) -> list[Any]:
        """Returns the metrics' state, which the last stage has; every process must call it."""
        return self._from_last([variable.numpy() for variable in self._model.metrics_variables])

    def snapshot_sync(self) -> dict[str, np.ndarray]:
        """Returns nothing: a checkpoint holds the model alone."""
        return {}

    def restore_sync(self, arrays: dict[str, np.ndarray]) -> None:
        """Has nothing to take."""

    def snapshot_input(self) -> bytes:
        """Returns where the stream stands that is trained on."""
        return self._position.save()

    def broadcast(self, content: bytes, *, source: int = 0) -> bytes:
        """Returns the bytes of the process with that number on every process."""
        return self._replicas.broadcast(content, is_source=self._rank == source)

    def all_reduce_sum(self, values: list[float]) -> list[float]:
        """Returns the sums over all processes."""
        return self._replicas.sum_first(np.array(values, np.float64)).tolist()

    def meet(self) -> None:
        """Returns once every process has called it, and needs nothing of the others for what came before."""
        wait_for_workers(self._strategy)

    @property
    def metric_origins(self) -> list[np.ndarray]:
        """Is for clusters that change in mid-training, which these do not."""
        raise NotImplementedError

    def own_metrics(self) -> list[Any]:
        """Is for clusters that change in mid-training, which these do not."""
        raise NotImplementedError

    def _logs(self) -> dict[str, Any]:
        return metric_results(self._model, self.snapshot_metrics())

    def _from_last(self, value: Any) -> Any:
        """Returns the last stage's nest of arrays on every process."""
        last = self._num_stages - 1
        buffer = io.BytesIO()
        if self._rank == last:
            flat = keras.tree.flatten(value)
            np.savez(buffer, *flat)
        content = self.broadcast(buffer.getvalue(), source=last)
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return [arrays[name] for name in arrays.files]

    def _batches(
        self, kind: str, source: Source, plan: BatchPlan
    ) -> Iterator[tuple[list[MicroBatch], float]]:
        """Yields each batch's micro-batches, and how long it was waited for, in seconds."""
        for segment in self._segments(source, plan):
            iterator = self._open(kind, segment, source, plan)
            num_steps = 0
            while segment.num_steps is None or num_steps < segment.num_steps:
                start = time.perf_counter()
                try:
                    parts, size = segment.split(next(iterator))
                except (StopIteration, tf.errors.OutOfRangeError):
                    break
                wait_secs = time.perf_counter() - start
                yield list(_micro_batches(parts, int(size))), wait_secs
                num_steps += 1
            (self._position if kind == "train" else self._between_tests).keep(segment, iterator)

    def _open(self, kind: str, segment: Segment, source: Source, plan: BatchPlan) -> Iterator[Any]:
        if kind == "train":
            return self._position.open(segment, source, plan)
        return self._between_tests.take(segment) or segment.open()

    def _segments(self, source: Source, plan: BatchPlan) -> Sequence[Segment]:
        # Micro-batches are shared out as replicas' parts are.
        return local_batches(
            source,
            lap=plan.place.lap,
            seed=plan.seed,
            shuffle=plan.shuffle,
            global_batch_size=plan.global_batch_size,
            num_replicas=self._num_micro_batches,
            replica_ids=range(self._num_micro_batches),
            first_step=plan.first_in_pass,
            num_steps=plan.end_in_pass,
            drop_remainder=plan.drop_remainder,
            num_epochs_after=plan.num_epochs_after,
        )


def _micro_batches(parts: Sequence[Any], size: int) -> Iterator[MicroBatch]:
    for number, part in enumerate(parts):
        count = int(tf.nest.flatten(part)[0].shape[0])
        if count:  # a short batch at the end may have too few for all
            yield MicroBatch(number, count, count / size, part)
