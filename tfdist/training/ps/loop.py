"""The loop of `ps`: the chief hands numbered batches to whichever worker is free; variables live on the ps tasks."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist import keras_internals
from tfdist.cluster.heartbeat import Heartbeat
from tfdist.config.ps_options import PsOptions
from tfdist.data.sources.source import Source
from tfdist.errors import ConfigError
from tfdist.training.metric_parts import aggregation_of, find_whole
from tfdist.training.metrics import add_states, metric_results, select_logs
from tfdist.training.model_loop import Loop
from tfdist.training.plan import BatchPlan, FinishedStep
from tfdist.training.ps.dispatch import Dispatch, timed
from tfdist.training.ps.message import PackedFunction
from tfdist.training.ps.parted_steps import PartedSteps
from tfdist.training.ps.scheduler import Call, Scheduler
from tfdist.training.ps.staleness import summarize
from tfdist.training.ps.sync_step import SyncPsStep
from tfdist.training.ps.worker_input import Part, SentInput, WorkerInput, keep_feeds
from tfdist.training.step.finite_check import SOUND

# For each worker so many steps in flight, or so many closures: enough that a slow one does not hold up the others.
_STEPS_PER_WORKER = 16
_CLOSURES_PER_WORKER = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """Batches that one worker must take together: one, or those whose gradients are accumulated.

    Attributes:
        parts: Of each batch.
        phase: How many batches of the accumulation came before.
        is_boundary: Whether nothing may be in flight behind it.
    """

    parts: list[Part]
    phase: int
    is_boundary: bool

    @property
    def shape(self) -> Any:
        """What must be equal in runs that share a closure."""
        return [part.size for part in self.parts], self.phase


# Wide: the loop joins all that a coordinator has.
class CoordinatorLoop(Loop):
    """Runs epochs, evaluation and prediction of a built model through a `ClusterCoordinator`."""

    def __init__(
        self,
        *,
        coordinator: tf.distribute.coordinator.ClusterCoordinator,
        model: keras.Model,
        num_workers: int,
        heartbeat: Heartbeat,
        batch: Any,
    ) -> None:
        _check_metrics(model, batch)
        super().__init__()
        self._model = model
        self._num_workers = num_workers
        self._options = PsOptions()
        self._step = SyncPsStep(model=model, num_parts=num_workers)
        self._dispatch = Dispatch(num_workers=num_workers)
        self._scheduler = Scheduler(coordinator, self._dispatch, heartbeat)
        self._together = PartedSteps(
            model=model,
            step=self._step,
            scheduler=self._scheduler,
            dispatch=self._dispatch,
            num_workers=num_workers,
        )
        self._find_feed = keep_feeds(coordinator, num_workers, self._position)
        self._staleness: list[float] = []
        self._num_scheduled = 0
        self._num_repeated = 0

    def start(self) -> None:
        """Goes on counting where the model stands: random streams and accumulation follow the step's number."""
        super().start()
        if self._model.optimizer is not None:
            self._num_scheduled = int(keras_internals.batch_counter(self._model.optimizer).numpy())

    def configure(self, options: PsOptions) -> None:
        """Says how the next epochs' steps are shared out.

        Raises:
            ConfigError: If the model's cannot be.
        """
        if options.ps_mode == "sync":
            self._step.check()
        if options.num_backup_workers >= self._num_workers:
            raise ConfigError(
                f"num_backup_workers={options.num_backup_workers} with num_workers={self._num_workers}: somebody's "
                f"part must count; give at most {self._num_workers - 1}, or more workers."
            )
        self._options = options
        self._together.num_spare = options.num_backup_workers
        self.num_replicas = self._num_workers if options.ps_mode == "sync" else 1

    def train_epoch(self, source: Source, plan: BatchPlan) -> Iterator[FinishedStep]:
        """Trains over the plan's steps, yielding once a finished step, with the logs where `plan.wants_logs`."""
        self.input_wait.begin_epoch()
        self._dispatch.begin_epoch()
        self._staleness.clear()
        self._together.num_dropped = 0
        self._state = plan.metrics or self.metric_origins
        if self._options.ps_mode == "sync":
            yield from self._train_together(source, plan)
            return
        extra: dict[str, Any] = {}
        step = plan.first_step
        self._num_repeated, before, num_made = 0, self._count_applied(), 0
        for ((states, extras, report), secs), call, is_boundary in self._results(
            "train", self._train_calls(source, plan)
        ):
            self._dispatch.end_closure(float(secs), num_steps=call.num_steps)
            for i, (fault, loss, staleness) in enumerate(report):
                if i < (len(states[0]) if states else 0):
                    self._state = add_states(self._state, [rows[i] for rows in states])
                self._staleness.append(float(staleness))
                num_made += fault == SOUND or self._step.accumulation_steps > 1
                if fault == SOUND:
                    extra = {name: values[i] for name, values in extras.items()}
                logs = self._logs("train", self._state, extra) if plan.wants_logs(step) else None
                yield FinishedStep(
                    step=step,
                    logs=logs,
                    is_boundary=is_boundary and i == call.num_steps - 1,
                    fault=int(fault),
                    loss=float(loss),
                )
                step += 1
        if before is not None and (after := self._count_applied()) is not None:
            self._num_repeated = after - before - num_made
        self.epoch_logs = self._logs("train", self._state, extra)

    def _count_applied(self) -> int | None:
        """Returns the steps that are in the weights; None where a step of the model's own may count otherwise."""
        if keras_internals.has_own_step(self._model) or self._model.optimizer is None:
            return None
        return int(keras_internals.batch_counter(self._model.optimizer).numpy())

    def _train_together(self, source: Source, plan: BatchPlan) -> Iterator[FinishedStep]:
        self._together.wait_for_late()  # of an epoch that was given up
        feed = self._find_feed(source)
        extra: dict[str, Any] = {}
        for step, parts in enumerate(self._batches(feed, plan, self._num_workers), start=plan.first_step):
            is_boundary = plan.is_boundary(step)
            states, own_extra, (fault, loss) = self._together.run(
                feed, parts, plan, step=step, number=self._num_scheduled
            )
            self._num_scheduled += 1
            if fault == SOUND:
                for state in states:
                    self._state = add_states(self._state, state)
                extra = own_extra
                self._staleness.append(0.0)
            logs = self._logs("train", self._state, extra) if plan.wants_logs(step) else None
            yield FinishedStep(
                step=step, logs=logs, is_boundary=is_boundary, fault=int(fault), loss=float(loss)
            )
            if plan.is_stopped():
                break
        self._together.wait_for_late()
        self.epoch_logs = self._logs("train", self._state, extra)

    @property
    def step_secs(self) -> float | None:
        """How long a step took lately; None where nobody knows."""
        return self._dispatch.step_secs

    def measures(self) -> dict[str, Any]:
        """Returns of the epoch so far `dispatch_share` (see `Dispatch`), and the staleness (see `summarize`).

        With backup workers also `num_dropped`, the examples whose parts were late; and where workers have died
        `num_repeated`, the steps that TensorFlow has run again although they were in the weights already.
        """
        share = self._dispatch.share
        measures = ({} if share is None else {"dispatch_share": share}) | summarize(self._staleness)
        if self._num_repeated:
            measures["num_repeated"] = self._num_repeated
        num_dropped = self._together.num_dropped
        return measures | ({"num_dropped": num_dropped} if self._options.num_backup_workers else {})

    def snapshot_metrics(self) -> list[Any]:
        """Returns the metrics' state so far, once no step is in flight."""
        # Those that an abandoned epoch left would step on with weights that are restored meanwhile.
        self._scheduler.join()
        return self._state

    @property
    def metric_origins(self) -> list[np.ndarray]:
        """What the steps' parts of the metrics' state are counted from: what these start from."""
        return self._step.metric_origins

    def own_metrics(self) -> list[Any]:
        """Returns this process's part of the metrics' state, from its origin."""
        return [state - start for state, start in zip(self._state, self.metric_origins, strict=True)]

    def evaluate(self, source: Source, plan: BatchPlan) -> dict[str, Any]:
        """Returns the metrics over the plan's steps."""
        state = self.metric_origins
        last: dict[str, Any] = {}
        for ((part, extra),), _, _ in self._results("test", self._other_calls("test", source, plan)):
            state, last = add_states(state, part), extra
        return self._logs("test", state, last)

    def predict(self, source: Source, plan: BatchPlan) -> Any:
        """Returns the outputs as arrays in the data's order."""
        results = self._results("predict", self._other_calls("predict", source, plan))
        batches = [outputs for outputs, _, _ in results]
        return tf.nest.map_structure(lambda *parts: np.concatenate(parts), *batches)

    def _logs(self, kind: str, state: list[Any], extra: dict[str, Any]) -> dict[str, Any]:
        return select_logs(metric_results(self._model, state), self._step.returned.get(kind), extra)

    def _results(self, kind: str, calls: Iterable[Call]) -> Iterator[tuple[Any, Call, bool]]:
        return self._scheduler.results(kind, calls, max_steps=self._max_steps)

    def _max_steps(self, num_steps: int) -> int:
        """Returns how many batches may be in flight with closures of so many."""
        if (bound := self._options.max_staleness) is not None:
            # What is in flight is finished in order. A step can miss those before it that were in flight when it began,
            # and those behind it that are when it ends: twice as many, without itself.
            return (bound // 2 + 1) * self._step.accumulation_steps
        return self._num_workers * max(_STEPS_PER_WORKER, _CLOSURES_PER_WORKER * num_steps)

    def _train_calls(self, source: Source, plan: BatchPlan) -> Iterator[Call]:
        feed = self._find_feed(source)
        scales = self._options.staleness_lr == "inverse"
        # Whoever goes back to a batch needs the metrics up to it.
        sums_states = not plan.log_every_steps and plan.loss_limit is None
        for runs in self._grouped(self._runs(feed, plan), functools.partial(self._num_steps, plan)):
            if plan.is_stopped():  # Those that are on their way still count.
                return
            parts = [part for run in runs for part in run.parts]
            sizes = tuple(part.size for part in parts)
            phase = runs[0].phase
            limits = [] if plan.loss_limit is None else [plan.loss_limit()]
            key = ("train", sizes, phase, plan.shuffle, plan.seed, len(limits), sums_states, scales)
            is_new = key not in feed.closures
            if is_new:
                reads = [feed.read(size, plan) for size in sizes]
                feed.closures[key] = self._build_train(
                    reads, phase=phase, sums_states=sums_states, scales_by_staleness=scales
                )
            yield Call(
                closure=feed.closures[key],
                args=(feed.pack(parts), tf.constant([self._num_scheduled, *limits], tf.float64)),
                num_steps=len(parts),
                is_boundary=runs[-1].is_boundary,
                is_new=is_new,
            )
            self._num_scheduled += len(parts)

    def _runs(self, feed: WorkerInput, plan: BatchPlan) -> Iterator[_Run]:
        batches = self._batches(feed, plan)
        step, num_before = plan.first_step, self._num_scheduled
        period = self._step.accumulation_steps
        while True:
            phase = num_before % period
            parts = [batch[0] for batch in itertools.islice(batches, period - phase)]
            if not parts:
                return
            is_boundary = any([plan.is_boundary(step + i) for i in range(len(parts))])
            step, num_before = step + len(parts), num_before + len(parts)
            yield _Run(parts=parts, phase=phase, is_boundary=is_boundary)

    def _grouped(self, runs: Iterator[_Run], num_steps: Callable[[], int]) -> Iterator[list[_Run]]:
        """Yields as many equal runs as a closure is to hold, or one: other numbers would be traced for each."""
        waiting: list[_Run] = []
        for run in runs:
            if waiting and run.shape != waiting[0].shape:
                yield from ([one] for one in waiting)
                waiting = []
            waiting.append(run)
            if len(waiting) >= max(num_steps() // self._step.accumulation_steps, 1):
                yield waiting
                waiting = []
            elif run.is_boundary:
                yield from ([one] for one in waiting)
                waiting = []
        yield from ([one] for one in waiting)

    def _num_steps(self, plan: BatchPlan) -> int:
        in_epoch = float("inf") if plan.num_steps is None else plan.num_steps
        num_steps = self._options.steps_per_loop or self._dispatch.choose_steps(
            num_left=in_epoch * (1 + plan.num_epochs_after), num_in_epoch=in_epoch
        )
        bound = self._options.max_staleness
        return num_steps if bound is None else min(num_steps, max((bound // 2 + 1) // self._num_workers, 1))

    def _other_calls(self, kind: str, source: Source, plan: BatchPlan) -> Iterator[Call]:
        feed = self._find_feed(source)
        for parts in feed.batches(plan):
            size = parts[0].size
            key = (kind, size, plan.shuffle, plan.seed)
            if key not in feed.closures:
                feed.closures[key] = self._build_other(kind, feed.read(size, plan))
            args = feed.pack(parts), tf.constant([self._num_scheduled], tf.float64)
            yield Call(closure=feed.closures[key], args=args)

    def _batches(self, feed: WorkerInput, plan: BatchPlan, num_parts: int = 1) -> Iterator[Any]:
        """Yields a feed's batches; measures how long the chief reads, while which it hands nothing out."""
        batches = feed.batches(plan, num_parts)
        if not isinstance(feed, SentInput):
            yield from batches
            return
        for num_read in itertools.count():
            start = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            # After the first one the step is compiled.
            self.input_wait.end_step(time.perf_counter() - start, counts=num_read != 1)
            yield batch

    def _build_train(self, reads: Sequence[Callable[..., Any]], **options: Any) -> PackedFunction:
        def steps(packed: Any, numbers: Any) -> Any:
            batches = [read(packed, place) for place, read in enumerate(reads)]
            limit = [tf.cast(number, tf.float32) for number in tf.unstack(numbers)[1:]]
            return self._step.train(batches, tf.cast(numbers[0], tf.int64), *limit, **options)

        return PackedFunction(timed(steps))

    def _build_other(self, kind: str, read: Callable[..., Any]) -> PackedFunction:
        def closure(packed: Any, numbers: Any) -> Any:
            batch = read(packed, 0)
            if kind == "predict":
                return self._step.predict(batch)
            return self._step.test([batch], tf.cast(numbers[0], tf.int64))

        return PackedFunction(closure)


def _check_metrics(model: keras.Model, batch: Any) -> None:
    """Makes sure that what each step adds to a metric can be added up: workers step at once, in no order.

    Raises:
        ConfigError: If one cannot.
    """
    whole = find_whole(model, batch)
    other = [v for v in model.metrics_variables if aggregation_of(v) != "sum"]
    if not whole and not other:
        return
    name = whole[0].name if whole else other[0].path
    raise ConfigError(
        f"the metric {name!r} is no sum over examples (a maximum, or a mean of states), and under ps each worker sees "
        "some of them: leave it out, or choose strategy='multiworker', where it gets all examples of a batch."
    )
