"""The loop of `one_device`, `mirrored` and `multiworker`: every replica takes its part of each global batch."""

from __future__ import annotations

import collections
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfdist import keras_internals
from tfdist.cluster.heartbeat import Heartbeat
from tfdist.config.sync_options import SyncOptions
from tfdist.data.batches import local_batches
from tfdist.data.segment import Segment
from tfdist.data.shard import shard_source
from tfdist.data.sources.source import ServedSource, ShardedSource, Source
from tfdist.runtime.strategies import wait_for_workers
from tfdist.training.metric_parts import find_whole
from tfdist.training.metrics import metric_results, select_logs
from tfdist.training.model_loop import Loop
from tfdist.training.monitoring import clock
from tfdist.training.monitoring.step_times import StepTimes
from tfdist.training.plan import BatchPlan, FinishedStep
from tfdist.training.privacy.gradients import Mechanism, PrivateGradients
from tfdist.training.step.compiler import Compiler
from tfdist.training.step.finite_check import SOUND, UNCHECKED
from tfdist.training.step.graphs import StepGraphs
from tfdist.training.step.replica import ReplicaStep
from tfdist.training.step.single_device import SingleDeviceStep
from tfdist.training.sync.build import build_synchronizer
from tfdist.training.sync.synchronizer import Found, Occasion, Synchronizer


# Wide: the loop joins all that a synchronous step has.
class SyncLoop(Loop):
    """Runs epochs, evaluation and prediction of a built model in lock step over all replicas."""

    def __init__(
        self, *, strategy: tf.distribute.Strategy, model: keras.Model, heartbeat: Heartbeat, batch: Any
    ) -> None:
        super().__init__()
        self._heartbeat = heartbeat
        self._strategy = strategy
        self._model = model
        self._alone = not tf.distribute.has_strategy() and strategy is tf.distribute.get_strategy()
        num_local = 1 if self._alone else len(strategy.extended.worker_devices)
        resolver = strategy.cluster_resolver
        offset = 0
        if not self._alone and resolver is not None and resolver.task_id is not None:
            offset = _worker_index(resolver) * num_local
        self.num_replicas = strategy.num_replicas_in_sync
        self.num_readers = self._num_workers = self.num_replicas // num_local
        self.replica_ids = list(range(offset, offset + num_local))
        optimizers = keras_internals.find_optimizers(model)
        self._fixed_sizes = keras_internals.has_loss_by_output(model)
        self._step: ReplicaStep | SingleDeviceStep = (
            SingleDeviceStep(model)
            if self._alone
            else ReplicaStep(
                strategy=strategy,
                model=model,
                optimizers=optimizers,
                first_replica=offset,
                whole_metrics=find_whole(model, batch) if self.num_replicas > 1 else (),
            )
        )
        self._compiler = Compiler(
            model=model,
            step=self._step,
            replicas=(self.num_replicas, num_local),
            all_reduce_sum=self.all_reduce_sum,
        )
        self._graphs = StepGraphs(
            model=model, step=self._step, compiler=self._compiler, first_local=self._first_local
        )
        self._has_gpu = clock.has_gpu()
        self._times = StepTimes(
            num_workers=self._num_workers,
            rank=self.replica_ids[0] // num_local,
            is_ahead=self._has_gpu,
        )
        self._is_inside_loop = False
        self._steps_per_loop = 1
        self._synchronizer = Synchronizer()
        self._mechanism: Mechanism | None = None

    def configure(self, options: SyncOptions, mechanism: Mechanism | None = None) -> str:
        """Says how the next epochs' replicas share what they learn; returns a line on what carries it, or "".

        Raises:
            ConfigError: If this model's or this strategy's cannot be.
        """
        if mechanism != self._mechanism:
            self._step.private = None if mechanism is None else PrivateGradients(self._model, mechanism)
            self._mechanism = mechanism
            self._graphs.forget()
        if isinstance(self._step, SingleDeviceStep) or self._num_workers == 1:
            return ""
        if self._synchronizer.options == options:
            return ""
        self._synchronizer = build_synchronizer(
            options,
            model=self._model,
            step=self._step,
            rank=self._times.rank,
            num_workers=self._num_workers,
            all_reduce_sum=self.all_reduce_sum,
        )
        self._graphs.forget()
        return self._synchronizer.reason

    def choose_compiler(self, jit_compile: str | None, source: Source, global_batch_size: int) -> str:
        """Says whether XLA compiles the steps from now on; see `Compiler.choose`."""
        return self._compiler.choose(jit_compile, source, global_batch_size)

    def start(self) -> None:
        """Prepares the replicas for training: equal weights are TensorFlow's, different random streams ours."""
        self._step.spread_seeds()
        super().start()
        self._steps_per_loop = 1
        self._synchronizer.start()

    def train_epoch(self, source: Source, plan: BatchPlan) -> Iterator[FinishedStep]:
        """Trains over the plan's steps, yielding once a step, with the logs where `plan.wants_logs`."""
        self._step.metrics.reset()
        self.input_wait.begin_epoch()
        if plan.metrics:
            self._step.metrics.set_state(plan.metrics)
        self._times.begin_epoch()
        self._synchronizer.begin_epoch()
        extra: dict[str, Any] = {}
        is_due = False
        for step, made in enumerate(self._all_made(source, plan), start=plan.first_step):
            own = made.logs
            start = time.perf_counter()
            fault, loss = made.verdict.numpy()
            batch_at, ready_at, exchanged_at = made.moments.numpy()
            compute_secs = time.perf_counter() - start if self._has_gpu else max(ready_at - batch_at, 0.0)
            self._times.end_step(compute_secs, exchanged_at - ready_at, counts=not made.is_traced)
            extra = own if fault == SOUND else extra
            # What falls due inside a loop waits for its end: those after it are done already.
            is_due = plan.is_boundary(step) or is_due
            is_boundary = is_due and made.is_last_begun
            is_due = is_due and not is_boundary
            self._waits_for_boundary = is_due
            is_last = plan.num_steps is not None and step == plan.num_steps - 1
            occasion = Occasion(is_boundary or is_last, is_boundary or plan.is_saved, plan.loss_limit)
            found = self._synchronizer.after_step(Found(step, int(fault), float(loss)), occasion)
            yield FinishedStep(
                step=step,
                first_step=found.step,
                logs=self._logs("train", extra) if plan.wants_logs(step) else None,
                is_boundary=is_boundary,
                fault=found.fault,
                loss=found.loss,
            )
            if plan.is_stopped():
                break
        self._synchronizer.end_epoch(is_saved=plan.is_saved)
        self._step.average_statistics()
        self.epoch_logs = self._logs("train", extra)
        self._times.end_epoch(self.input_wait, self.all_reduce_sum)
        if plan.steps_per_loop is None and self._steps_per_loop == 1:
            self._steps_per_loop = self._times.loop_size(
                plan.num_epochs_after * (plan.num_steps or 0),
                is_traced=not (self._alone and self._compiler.is_on),
            )

    def _all_made(self, source: Source, plan: BatchPlan) -> Iterator[_Made]:
        """Yields what each step has made; on a GPU after the next one was handed out, where nobody looks in between."""
        self._waits_for_boundary = False
        held: _Made | None = None
        for step, (logs, verdict, moments) in enumerate(self._each("train", source, plan), plan.first_step):
            made = _Made(logs, verdict, moments, self._graphs.is_traced, not self._is_inside_loop)
            if held is not None:
                yield held._replace(is_last_begun=False)
            held = made
            # What the step before has brought up waits for this one.
            if not self._runs_ahead(source, plan) or plan.is_watched(step) or self._waits_for_boundary:
                yield held
                held = None
        if held is not None:
            yield held

    def _runs_ahead(self, source: Source, plan: BatchPlan) -> bool:
        if not self._has_gpu or plan.steps_per_loop == 1 or self._model.run_eagerly:
            return False
        return not self._ends_alone(source) and self._synchronizer.shares_each_step

    @property
    def step_secs(self) -> float | None:
        """How long a step took in the last epoch, alike on all workers; None where nobody knows."""
        return self._times.step_secs

    def measures(self) -> dict[str, Any]:
        """Returns where the epoch's time went, what crossed between workers, and the steps of a call, if several."""
        size = self._graphs.longest_loop
        loops = {"steps_per_loop": size} if size > 1 else {}
        return self._times.summary() | self._synchronizer.measures() | loops

    def evaluate(self, source: Source, plan: BatchPlan) -> dict[str, Any]:
        """Returns the metrics over the plan's steps."""
        self._step.metrics.reset()
        # The last batch's, as in Keras: only metrics gather over batches.
        extra = collections.deque(self._each("test", source, plan), maxlen=1)
        return self._logs("test", extra[0] if extra else {})

    def snapshot_metrics(self) -> list[Any]:
        """Averages what replicas keep for themselves, and returns the metrics' state; every process must call it."""
        self._step.average_statistics()
        return self._step.metrics.state()

    def snapshot_sync(self) -> dict[str, np.ndarray]:
        """Returns what a checkpoint must hold of the way in which workers share, by name."""
        return self._synchronizer.state()

    def restore_sync(self, arrays: dict[str, np.ndarray]) -> None:
        """Takes what `snapshot_sync` returned."""
        self._synchronizer.set_state(arrays)

    def broadcast(self, content: bytes, *, source: int = 0) -> bytes:
        """Returns the bytes of the process with that number on every process."""
        if isinstance(self._step, SingleDeviceStep) or self.num_replicas == len(self.replica_ids):
            return content
        is_source = self.replica_ids[0] // len(self.replica_ids) == source
        return self._step.replicas.broadcast(content, is_source=is_source)

    @property
    def metric_origins(self) -> list[np.ndarray]:
        """What the processes' parts of the metrics' state are counted from."""
        return self._step.metrics.origins

    def own_metrics(self) -> list[Any]:
        """Returns this process's part of the metrics' state, from its origin."""
        return self._step.metrics.own()

    def all_reduce_sum(self, values: list[float]) -> list[float]:
        """Returns the sums over all processes."""
        if isinstance(self._step, SingleDeviceStep) or self.num_replicas == len(self.replica_ids):
            return values
        return self._step.replicas.sum_first(np.array(values, np.float64)).tolist()

    def meet(self) -> None:
        """Returns once every process has called it, and needs nothing of the others for what came before."""
        wait_for_workers(self._strategy)

    def predict(self, source: Source, plan: BatchPlan) -> Any:
        """Returns the outputs as arrays in the data's order, on every process."""
        # As they come: a GPU has no room for all of them.
        batches = [tf.nest.map_structure(lambda t: t.numpy(), b) for b in self._each("predict", source, plan)]
        return tf.nest.map_structure(lambda *parts: np.concatenate(parts), *batches)

    def _logs(self, kind: str, extra: dict[str, Any]) -> dict[str, Any]:
        if extra and kind == "train" and self._synchronizer.is_local:
            # Each worker has its share of the mean.
            extra = dict(
                zip(extra, self.all_reduce_sum([float(value) for value in extra.values()]), strict=True)
            )
        results = metric_results(self._model, self._step.metrics.state())
        return select_logs(results, self._step.returned.get(kind), extra)

    def _each(self, kind: str, source: Source, plan: BatchPlan) -> Iterator[Any]:
        step = plan.first_step
        verdict = tf.constant(UNCHECKED)
        ends_alone = self._ends_alone(source)
        for segment in self._segments(source, plan):
            iterator = self._position.open(segment, source, plan, kind=kind)
            if ends_alone and not self._all_go_on(next(iterator)[1], plan):
                return
            steps = 0
            while segment.num_steps is None or steps < segment.num_steps:
                left = None if segment.num_steps is None else segment.num_steps - steps
                size = self._loop_size(source, plan, step, left) if kind == "train" else 1
                steps_of_call = self._graphs.get(
                    kind,
                    segment,
                    size,
                    source=type(source),
                    is_part=ends_alone,
                    mode=self._synchronizer.mode() if kind == "train" else None,
                )
                limits = self._limits(source, plan, verdict) if kind == "train" else ()
                self._times.begin_call()
                try:
                    loop = steps_of_call(iterator, *limits)
                except tf.errors.OutOfRangeError:
                    break
                except tf.errors.OpError as error:
                    if step > plan.first_step or not (
                        self._graphs.is_traced and self._compiler.gives_up(error)
                    ):
                        raise
                    # A batch was read, and nothing changed: from the start, without XLA.
                    yield from self._each(kind, source, plan)
                    return
                for place, (outputs, num_more, wait_secs) in enumerate(loop, start=1):
                    steps += 1
                    step += 1
                    self._is_inside_loop = place < size
                    own = tf.nest.map_structure(self._first_local, outputs)
                    if kind == "train":
                        verdict = own[1]
                        is_timed = not (keras_internals.is_deterministic() or self._graphs.is_traced)
                        self.input_wait.end_step(float(wait_secs), counts=is_timed)
                    else:
                        self._heartbeat.beat()
                    yield own
                    if num_more is not None and self._ends(int(self._first_local(num_more)), plan):
                        return
            self._position.keep(segment, iterator, kind=kind)

    def _limits(self, source: Source, plan: BatchPlan, verdict: Any) -> tuple[Any, ...]:
        """Returns the largest loss that the next steps may have; where the host runs ahead, the last verdict too."""
        if plan.loss_limit is None:
            return ()
        limit = tf.constant(plan.loss_limit(), tf.float32)
        return (limit, verdict) if self._runs_ahead(source, plan) else (limit,)

    def _loop_size(self, source: Source, plan: BatchPlan, step: int, left: int | None) -> int:
        """Returns how many steps, from zero-based `step` on, are one call: all of a loop, or one.

        `left` are the steps of this shape that are still to come; None: only the data's end will tell.
        """
        size = plan.steps_per_loop or self._steps_per_loop
        # Where the data may end inside a loop, nobody would hear of the steps before.
        if left is None or left < size or self._ends_alone(source) or self._model.run_eagerly:
            return 1
        # Every other way has a word to say between two steps.
        if not self._synchronizer.shares_each_step:
            return 1
        return 1 if any(plan.is_watched(inner) for inner in range(step, step + size - 1)) else size

    def _all_go_on(self, has_any: Any, plan: BatchPlan) -> bool:
        (num_more,) = self.all_reduce_sum([float(has_any)])
        return not self._ends(int(num_more), plan)

    def _ends(self, num_more: int, plan: BatchPlan) -> bool:
        """Tells whether the workers that have another batch are too few for a step."""
        return num_more < (self._num_workers if plan.drop_remainder else 1)

    def _ends_alone(self, source: Source) -> bool:
        """Tells whether the workers' batches are their own, and may be of different number."""
        return isinstance(source, ShardedSource) or (
            isinstance(source, ServedSource) and self._num_workers > 1
        )

    def shard_source_of(self, source: Source, shard: str) -> Source:
        """Returns what of a source this process reads."""
        index = self.replica_ids[0] // len(self.replica_ids)
        return shard_source(source, shard, num_workers=self._num_workers, index=index)

    def _segments(self, source: Source, plan: BatchPlan) -> Sequence[Segment]:
        share = plan.share(self.num_replicas, self.replica_ids, fixed_sizes=self._fixed_sizes)
        return local_batches(source, share)

    def _first_local(self, value: Any) -> Any:
        return value if self._alone else self._strategy.experimental_local_results(value)[0]


class _Made(NamedTuple):
    """What a step has made, on its device still.

    Attributes:
        logs: That are no metrics.
        verdict: Of the check, and the loss.
        moments: When batch, gradients and their sums were there.
        is_traced: Whether the call's time was TensorFlow's tracing.
        is_last_begun: Whether no step after it has begun.
    """

    logs: dict[str, Any]
    verdict: tf.Tensor
    moments: tf.Tensor
    is_traced: bool
    is_last_begun: bool


def _worker_index(resolver: tf.distribute.cluster_resolver.ClusterResolver) -> int:
    """Returns this process's place in the replicas' order: the chief, then workers."""
    has_chief = "chief" in resolver.cluster_spec().jobs
    if resolver.task_type == "chief":
        return 0
    return int(resolver.task_id) + (1 if has_chief else 0)
