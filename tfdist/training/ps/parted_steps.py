"""Steps that all workers of `ps` make together: each computes a part of the batch, and their sum is applied once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist import keras_internals
from tfdist.training.plan import BatchPlan
from tfdist.training.ps.dispatch import Dispatch, timed
from tfdist.training.ps.in_flight import PartsInFlight
from tfdist.training.ps.message import PackedFunction, Scheduled
from tfdist.training.ps.scheduler import Call, Scheduler
from tfdist.training.ps.sync_step import SyncPsStep
from tfdist.training.ps.worker_input import Part, WorkerInput


class PartedSteps:
    """Divides each global batch among the workers.

    Args:
        model: Built.
        step: What a worker computes, and how the sum is applied.
        scheduler: Hands the parts out.
        dispatch: Is told how long they took.
        num_workers: Who share a batch.

    Attributes:
        num_spare: So many workers' parts, the last ones, are left out of a step.
        num_dropped: Examples that were left out.
    """

    def __init__(
        self,
        *,
        model: keras.Model,
        step: SyncPsStep,
        scheduler: Scheduler,
        dispatch: Dispatch,
        num_workers: int,
    ) -> None:
        self.num_spare = 0
        self.num_dropped = 0
        self._model = model
        self._step = step
        self._scheduler = scheduler
        self._dispatch = dispatch
        self._num_workers = num_workers
        self._in_flight = PartsInFlight(
            num_places=num_workers, fetch=scheduler.fetch, end_late=self._end_late
        )
        self._apply_functions: dict[Any, Callable[..., Any]] = {}

    def wait_for_late(self) -> None:
        """Waits for the parts that were left out, whose workers are busy with them."""
        self._in_flight.wait_for_late()

    def run(
        self, feed: WorkerInput, parts: Sequence[Part], plan: BatchPlan, *, step: int, number: int
    ) -> tuple[list[Any], dict[str, Any], Any]:
        """Makes a step.

        Args:
            feed: Gives workers their examples.
            parts: Of the batch, one for each worker at most.
            plan: Of the epoch.
            step: In the epoch, from 0.
            number: Of the step since the model was made, which random numbers follow.

        Returns:
            Of each part that counts what it adds to the metrics' state; the logs that are no metrics; and the check's
            verdict and the loss.
        """
        results, shares = self._compute(feed, parts, plan, step=step, number=number)
        states, extras, losses = zip(*results, strict=True)
        total = sum(shares)
        verdict = self._apply(shares, np.sum(losses, dtype=np.float32) / total, plan)
        extra = {name: sum(own[name] for own in extras) / total for name in extras[0]}
        return list(states), extra, verdict

    def _compute(
        self, feed: WorkerInput, parts: Sequence[Part], plan: BatchPlan, *, step: int, number: int
    ) -> tuple[list[Any], list[float]]:
        """Returns the results of the parts that count, and of each worker's place the share of its part, or 0."""
        num_examples = sum(part.size or 0 for part in parts)
        calls: dict[int, tuple[Part, Call, float]] = {}

        def start(part: Part, place: int) -> Scheduled:
            share = (part.size or 0) / num_examples
            call = self._call(feed, part, plan, numbers=[number, place, share])
            scheduled, trace_secs = self._scheduler.schedule(call, "train")
            calls[place] = part, call, trace_secs
            return scheduled

        # Those that nobody has time for are not always the last ones.
        first = step % len(parts) if self.num_spare else 0
        starts = [functools.partial(start, part) for part in [*parts[first:], *parts[:first]]]
        ended = self._in_flight.run(starts, num_wanted=min(len(parts), self._num_workers - self.num_spare))
        for _, call, trace_secs in calls.values():
            if call.is_new:
                self._dispatch.end_compile(trace_secs, num_steps=1)
        shares = [0.0] * (self._num_workers if self.num_spare else len(parts))
        for place, (_, secs) in ended.items():
            self._dispatch.end_closure(float(secs), num_steps=1)
            shares[place] = (calls[place][0].size or 0) / num_examples
        self.num_dropped += num_examples - sum(calls[place][0].size or 0 for place in ended)
        return [result for result, _ in ended.values()], shares

    def _call(self, feed: WorkerInput, part: Part, plan: BatchPlan, *, numbers: list[float]) -> Call:
        key = ("part", part.size, plan.shuffle, plan.seed)
        is_new = key not in feed.closures
        if is_new:
            feed.closures[key] = self._build(feed.read(part.size, plan))
        args = feed.pack([part]), tf.constant(numbers, tf.float64)
        return Call(closure=feed.closures[key], args=args, is_new=is_new)

    def _build(self, read: Callable[..., Any]) -> PackedFunction:
        def part_of_step(packed: Any, numbers: Any) -> Any:
            step, place = tf.cast(numbers[0], tf.int64), tf.cast(numbers[1], tf.int32)
            return self._step.compute_part(read(packed, 0), place, tf.cast(numbers[2], tf.float32), step)

        return PackedFunction(timed(part_of_step))

    def _end_late(self, result: Any) -> None:
        self._dispatch.end_closure(float(result[1]), num_steps=1)

    def _apply(self, shares: list[float], loss: Any, plan: BatchPlan) -> Any:
        limits = [] if plan.loss_limit is None else [tf.constant(plan.loss_limit(), tf.float32)]
        num_parts, all_count = len(shares), not self.num_spare
        key = (num_parts, len(limits), all_count)
        if key not in self._apply_functions:
            self._apply_functions[key] = tf.function(
                lambda shares, loss, *limit: self._step.apply_parts(
                    num_parts, loss, *limit, shares=None if all_count else shares
                ),
                autograph=False,
            )
        # Not on a worker, where it might be run again if that dies. A ps, which spares the chief's part, does not see
        # the others: where there are several the chief calls them, and what is computed of a weight is beside it.
        state = keras_internals.all_variables(self._model, keras_internals.find_optimizers(self._model))
        places = {keras_internals.native(v).device for v in state}
        with tf.device(places.pop() if len(places) == 1 else "/job:chief/task:0/device:CPU:0"):
            args = tf.constant(shares, tf.float32), tf.constant(loss, tf.float32)
            return self._apply_functions[key](*args, *limits).numpy()
