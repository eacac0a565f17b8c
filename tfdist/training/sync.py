"""The loop of `one_device`, `mirrored` and `multiworker`: every replica takes its part of each global batch."""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist import keras_internals
from tfdist.data import (
    Segment,
    SelfShardedSource,
    ServedSource,
    ShardedSource,
    Source,
    local_batches,
    shard_source,
)
from tfdist.heartbeat import Heart
from tfdist.sync_options import SyncOptions
from tfdist.training.compute import Compute
from tfdist.training.input_position import InputPosition, KeptIterators
from tfdist.training.input_wait import InputWait, timed_next
from tfdist.training.meeting import Meeting
from tfdist.training.metric_parts import find_whole
from tfdist.training.metrics import metric_results, select_logs
from tfdist.training.plan import BatchPlan, FinishedStep
from tfdist.training.replica import ReplicaStep
from tfdist.training.sole_step import SoleStep
from tfdist.training.step_check import SOUND
from tfdist.training.step_times import StepTimes


class SyncLoop:
    """Runs epochs, evaluation and prediction of a built model in lock step over all replicas."""

    def __init__(
        self, *, strategy: tf.distribute.Strategy, model: keras.Model, heart: Heart, batch: Any
    ) -> None:
        self._heart = heart
        self._strategy = strategy
        self._model = model
        self._alone = not tf.distribute.has_strategy() and strategy is tf.distribute.get_strategy()
        num_local = 1 if self._alone else len(strategy.extended.worker_devices)
        resolver = strategy.cluster_resolver
        offset = 0
        if not self._alone and resolver is not None and resolver.task_id is not None:
            offset = _worker_index(resolver) * num_local
        self.num_replicas = strategy.num_replicas_in_sync
        self._num_workers = self.num_replicas // num_local
        self.replica_ids = list(range(offset, offset + num_local))
        optimizers = keras_internals.find_optimizers(model)
        self._fixed_sizes = keras_internals.has_loss_by_output(model)
        self._step: ReplicaStep | SoleStep = (
            SoleStep(model)
            if self._alone
            else ReplicaStep(
                strategy=strategy,
                model=model,
                optimizers=optimizers,
                first_replica=offset,
                whole_metrics=find_whole(model, batch) if self.num_replicas > 1 else (),
            )
        )
        self._functions: dict[Any, Any] = {}
        self._asked_of_compiler: tuple[str, int] | None = None
        self.input_wait = InputWait()
        self._times = StepTimes(num_workers=self._num_workers, rank=self.replica_ids[0] // num_local)
        self._position = InputPosition()
        self._between_tests = KeptIterators()
        self._is_traced = False
        self._is_inside_loop = False
        self._steps_per_loop = 1
        self._meeting: Meeting | None = None

    def share_out(self, options: SyncOptions) -> str:
        """Says how the next epochs' replicas share what they learn.

        Args:
            options: What crosses between workers.

        Returns:
            A line that says what carries it; empty where there is nothing to say.

        Raises:
            ConfigError: If this model's or this strategy's cannot be.
        """
        if isinstance(self._step, SoleStep) or self._num_workers == 1:
            return ""
        if self._meeting is not None and self._meeting.options == options:
            return ""
        self._meeting = Meeting(
            options=options,
            model=self._model,
            step=self._step,
            rank=self._times.rank,
            num_workers=self._num_workers,
            vote=self.vote,
        )
        self._functions.clear()
        return self._meeting.reason

    def choose_compiler(self, jit_compile: str, source: Source, global_batch_size: int) -> str:
        """Says whether XLA compiles the forward and backward passes from now on.

        Args:
            jit_compile: One of `JIT_COMPILE`; "auto" times both on the first examples, and all workers take the faster.
            source: The training examples.
            global_batch_size: Of a step.

        Returns:
            A line that says what was found; empty where nothing was asked for.

        Raises:
            ConfigError: If the model's step cannot be compiled so.
        """
        asked = jit_compile, global_batch_size if jit_compile == "auto" else 0
        if asked == self._asked_of_compiler:
            return ""
        if self._step.jit is not None or jit_compile != "off":
            self._functions.clear()
        self._asked_of_compiler = asked
        self._step.jit = None
        if jit_compile == "off":
            return ""
        compute = Compute(self._model, self._step.metric_names)
        if jit_compile == "on":
            self._step.jit = compute
            return ""
        part = source.sample_batch(max(1, global_batch_size // self.num_replicas))
        parts = [part] * len(self.replica_ids)
        own = [self._step.time_compute(compute, parts, jit=jit) for jit in (False, True)]
        plain_secs, jit_secs = (secs / self._num_workers for secs in self.vote(own))
        self._step.jit = compute if jit_secs < plain_secs else None
        what = "on" if self._step.jit else "off"
        return f"jit_compile={what}: a pass took {1e3 * plain_secs:.1f} ms without XLA, {1e3 * jit_secs:.1f} ms with it"

    def start(self) -> None:
        """Prepares the replicas for training: equal weights are TensorFlow's, different random streams ours."""
        self._step.spread_seeds()
        self.release()
        self._steps_per_loop = 1
        if self._meeting is not None:
            self._meeting.start()

    def release(self) -> None:
        """Lets go of the data."""
        self._position.forget()
        self._between_tests.forget()

    def train_epoch(self, source: Source, plan: BatchPlan) -> Iterator[FinishedStep]:
        """Trains over the plan's steps, yielding once a step, with the logs where `plan.wants_logs`."""
        self._model.reset_metrics()
        self.input_wait.begin_epoch()
        if plan.metrics:
            self._step.set_metric_state(plan.metrics)
        self._times.begin_epoch()
        if self._meeting is not None:
            self._meeting.begin_epoch()
        extra: dict[str, Any] = {}
        is_due = False
        for step, (own, report) in enumerate(self._each("train", source, plan), start=plan.first_step):
            fault, loss, *secs = report.numpy()
            self._times.end_step(*secs, counts=not self._is_traced)
            extra = own if fault == SOUND else extra
            # What falls due inside a loop waits for its end: those after it are done already.
            is_due = plan.is_boundary(step) or is_due
            is_boundary = is_due and not self._is_inside_loop
            is_due = is_due and not is_boundary
            found = step, int(fault), float(loss)
            if self._meeting is not None:
                is_last = plan.num_steps is not None and step == plan.num_steps - 1
                found = self._meeting.after_step(
                    step,
                    int(fault),
                    float(loss),
                    agrees=is_boundary or is_last,
                    is_saved=is_boundary or plan.is_saved,
                    limit=plan.loss_limit,
                )
            yield FinishedStep(
                step=step,
                first_step=found[0],
                logs=self._logs("train", extra) if plan.wants_logs(step) else None,
                is_boundary=is_boundary,
                fault=found[1],
                loss=found[2],
            )
            if plan.is_stopped():
                break
        if self._meeting is not None:
            self._meeting.end_epoch(is_saved=plan.is_saved)
        self._step.average_statistics()
        self.epoch_logs = self._logs("train", extra)
        self._times.end_epoch(self.input_wait, self.vote)
        if plan.steps_per_loop is None and self._steps_per_loop == 1:
            self._steps_per_loop = self._times.loop_size(plan.num_epochs_after * (plan.num_steps or 0))

    @property
    def step_secs(self) -> float | None:
        """How long a step took in the last epoch, alike on all workers; None where nobody knows."""
        return self._times.step_secs

    def measures(self) -> dict[str, Any]:
        """Returns where the epoch's time went, what crossed between workers, and the steps of a call, if several."""
        crossed = {} if self._meeting is None else self._meeting.measures()
        size = max((size for kind, *_, size in self._functions if kind == "train"), default=1)
        return self._times.summary() | crossed | ({"steps_per_loop": size} if size > 1 else {})

    def evaluate(self, source: Source, plan: BatchPlan) -> dict[str, Any]:
        """Returns the metrics over the plan's steps."""
        self._model.reset_metrics()
        # The last batch's, as in Keras: only metrics gather over batches.
        extra = collections.deque(self._each("test", source, plan), maxlen=1)
        return self._logs("test", extra[0] if extra else {})

    def snapshot_metrics(self) -> list[Any]:
        """Averages what replicas keep for themselves, and returns the metrics' state; every process must call it."""
        self._step.average_statistics()
        return self._step.metric_state()

    def snapshot_sync(self) -> dict[str, np.ndarray]:
        """Returns what a checkpoint must hold of the way in which workers share, by name."""
        return {} if self._meeting is None else self._meeting.state()

    def restore_sync(self, arrays: dict[str, np.ndarray]) -> None:
        """Takes what `snapshot_sync` returned."""
        if self._meeting is not None:
            self._meeting.set_state(arrays)

    def snapshot_input(self) -> bytes:
        """Returns where the stream stands that is trained on."""
        return self._position.save()

    def broadcast(self, content: bytes, *, source: int = 0) -> bytes:
        """Returns the bytes of the process with that number on every process."""
        if isinstance(self._step, SoleStep) or self.num_replicas == len(self.replica_ids):
            return content
        if self.replica_ids[0] // len(self.replica_ids) != source:
            content = b""
        size = int(self._step.sum_first(np.array([len(content)], np.int64))[0])
        if size == 0:
            return b""
        words = np.zeros(-(-size // 4), np.int32)
        words.view(np.uint8)[: len(content)] = np.frombuffer(content, np.uint8)
        return self._step.sum_first(words).view(np.uint8)[:size].tobytes()

    @property
    def metric_origins(self) -> list[np.ndarray]:
        """What the processes' parts of the metrics' state are counted from."""
        return self._step.metric_origins

    def own_metrics(self) -> list[Any]:
        """Returns this process's part of the metrics' state, from its origin."""
        return self._step.own_metrics()

    def vote(self, values: list[float]) -> list[float]:
        """Returns the sums over all processes."""
        if isinstance(self._step, SoleStep) or self.num_replicas == len(self.replica_ids):
            return values
        return self._step.sum_first(np.array(values, np.float64)).tolist()

    def predict(self, source: Source, plan: BatchPlan) -> Any:
        """Returns the outputs as arrays in the data's order, on every process."""
        batches = list(self._each("predict", source, plan))
        return tf.nest.map_structure(lambda *parts: np.concatenate([p.numpy() for p in parts]), *batches)

    def _logs(self, kind: str, extra: dict[str, Any]) -> dict[str, Any]:
        if extra and kind == "train" and self._meeting is not None and self._meeting.is_local:
            # Each worker has its share of the mean.
            extra = dict(zip(extra, self.vote([float(value) for value in extra.values()]), strict=True))
        results = metric_results(self._model, self._step.metric_state())
        return select_logs(results, self._step.returned.get(kind), extra)

    def _each(self, kind: str, source: Source, plan: BatchPlan) -> Iterator[Any]:
        step = plan.first_step
        for segment in self._segments(source, plan):
            if kind == "train":
                iterator = self._position.open(segment, source, plan)
            else:
                iterator = self._between_tests.take(segment) or segment.open()
            if self._ends_alone(source) and not self._all_go_on(next(iterator)[1], plan):
                return
            steps = 0
            limit = plan.loss_limit if kind == "train" else None
            while segment.num_steps is None or steps < segment.num_steps:
                limits = () if limit is None else (tf.constant(limit(), tf.float32),)
                self._is_traced = False
                left = None if segment.num_steps is None else segment.num_steps - steps
                size = self._loop_size(source, plan, step, left) if kind == "train" else 1
                function = self._function(kind, source, segment, size)
                if kind == "train":
                    self._times.begin_call()
                try:
                    loop = function(iterator, *limits)
                except tf.errors.OutOfRangeError:
                    break
                for place, (outputs, num_more, wait_secs) in enumerate(loop, start=1):
                    steps += 1
                    step += 1
                    self._is_inside_loop = place < size
                    if kind == "train":
                        self.input_wait.end_step(float(wait_secs), counts=not self._is_traced)
                    else:
                        self._heart.beat()
                    yield tf.nest.map_structure(self._first_local, outputs)
                    if num_more is not None and self._ends(int(self._first_local(num_more)), plan):
                        return
            (self._position if kind == "train" else self._between_tests).keep(segment, iterator)

    def _loop_size(self, source: Source, plan: BatchPlan, step: int, left: int | None) -> int:
        """Returns how many steps, from zero-based `step` on, are one call: all of a loop, or one.

        Args:
            source: The training examples.
            plan: Of the epoch.
            step: The next one.
            left: Steps of this shape that are still to come; None: only the data's end will tell.
        """
        size = plan.steps_per_loop or self._steps_per_loop
        # Where the data may end inside a loop, nobody would hear of the steps before.
        if left is None or left < size or self._ends_alone(source) or self._model.run_eagerly:
            return 1
        # Every other way has a word to say between two steps.
        if self._meeting is not None and not self._meeting.shares_each_step:
            return 1
        return 1 if any(plan.is_watched(inner) for inner in range(step, step + size - 1)) else size

    def _all_go_on(self, has_any: Any, plan: BatchPlan) -> bool:
        (num_more,) = self.vote([float(has_any)])
        return not self._ends(int(num_more), plan)

    def _ends(self, num_more: int, plan: BatchPlan) -> bool:
        """Tells whether the workers that have another batch are too few for a step."""
        return num_more < (self._num_workers if plan.drop_remainder else 1)

    def _ends_alone(self, source: Source) -> bool:
        """Tells whether the workers' batches are their own, and may be of different number."""
        return isinstance(source, ShardedSource) or (
            isinstance(source, ServedSource) and self._num_workers > 1
        )

    @property
    def num_readers(self) -> int:
        """Processes that read the data."""
        return self._num_workers

    def own_part(self, source: Source, shard: str) -> Source:
        """Returns what of a source this process reads."""
        index = self.replica_ids[0] // len(self.replica_ids)
        return shard_source(source, shard, num_workers=self._num_workers, index=index)

    def _segments(self, source: Source, plan: BatchPlan) -> Sequence[Segment]:
        return local_batches(
            source,
            lap=plan.place.lap,
            seed=plan.seed,
            shuffle=plan.shuffle,
            global_batch_size=plan.global_batch_size,
            num_replicas=self.num_replicas,
            replica_ids=self.replica_ids,
            first_step=plan.first_in_pass,
            num_steps=plan.end_in_pass,
            drop_remainder=plan.drop_remainder,
            num_epochs_after=plan.num_epochs_after,
            fixed_sizes=self._fixed_sizes,
        )

    def _function(self, kind: str, source: Source, segment: Segment, size: int) -> Any:
        """Returns what makes `size` steps, and returns for each its outputs, who has more, and the wait for input."""
        way = self._meeting.way() if kind == "train" and self._meeting is not None else None
        is_compiled = isinstance(self._step, SoleStep) and self._step.is_compiled
        key = kind, type(source), segment.never_empty, self._model.run_eagerly, is_compiled, way, size
        if key not in self._functions:
            own, split = isinstance(source, SelfShardedSource), segment.split
            is_part = self._ends_alone(source)
            step = functools.partial(getattr(self._step, kind), never_empty=segment.never_empty)
            if is_compiled and not self._model.run_eagerly:
                # Without the reading, for which there is no such code.
                step = tf.function(step, autograph=False, jit_compile=True)

            def one_step(iterator: Any, *limit: Any) -> Any:
                self._is_traced = tf.inside_function()
                element, wait_secs = timed_next(iterator)
                parts, rest = split(element)
                if is_part:
                    return *step(parts, None, *limit, has_more=rest), wait_secs
                return step(parts, None if own else rest, *limit), None, wait_secs

            def steps(iterator: Any, *limit: Any) -> list[Any]:
                found = [one_step(iterator, *limit)]
                for _ in range(size - 1):
                    if limit:
                        # After a step that was wrong the others change nothing: the run ends at that one.
                        report = self._first_local(found[-1][0][1])
                        limit = (tf.where(report[0] == SOUND, limit[0], -np.inf),)
                    found.append(one_step(iterator, *limit))
                return found

            compiled = steps
            if not self._model.run_eagerly:
                compiled = tf.function(steps, autograph=False)
            self._functions[key] = compiled
        return self._functions[key]

    def _first_local(self, value: Any) -> Any:
        return value if self._alone else self._strategy.experimental_local_results(value)[0]


def _worker_index(resolver: tf.distribute.cluster_resolver.ClusterResolver) -> int:
    """Returns this process's place in the replicas' order: the chief, then workers."""
    has_chief = "chief" in resolver.cluster_spec().jobs
    if resolver.task_type == "chief":
        return 0
    return int(resolver.task_id) + (1 if has_chief else 0)
