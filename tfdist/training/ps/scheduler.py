"""Hands closures to a coordinator's workers, and takes their results in order."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tensorflow as tf

from tfdist.cluster.heartbeat import Heartbeat
from tfdist.training.ps.dispatch import Dispatch
from tfdist.training.ps.message import PackedFunction, Scheduled

_RETRY_SECS = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """A closure to schedule.

    Attributes:
        closure: What a worker runs.
        args: With what.
        num_steps: Batches that it takes.
        is_boundary: Whether nothing may be in flight behind it.
        is_new: Whether it is traced now.
    """

    closure: PackedFunction
    args: tuple[Any, ...]
    num_steps: int = 1
    is_boundary: bool = False
    is_new: bool = False


class Scheduler:
    """Keeps a bounded number of steps in flight.

    Args:
        coordinator: Whose workers run the closures.
        dispatch: Is told of what compiles.
        heartbeat: Is told of what is no training.
    """

    def __init__(
        self,
        coordinator: tf.distribute.coordinator.ClusterCoordinator,
        dispatch: Dispatch,
        heartbeat: Heartbeat,
    ) -> None:
        self._coordinator = coordinator
        self._dispatch = dispatch
        self._heartbeat = heartbeat

    def results(
        self, kind: str, calls: Iterable[Call], *, max_steps: Callable[[int], int]
    ) -> Iterator[tuple[Any, Call, bool]]:
        """Schedules every closure once, and yields in order its result and whether nothing is in flight behind it.

        `max_steps` returns how many batches may be in flight with closures of so many.
        """
        pending: collections.deque[tuple[Scheduled, Call, float]] = collections.deque()
        num_steps = 0

        def finish() -> tuple[Any, Call, bool]:
            nonlocal num_steps
            scheduled, call, trace_secs = pending.popleft()
            num_steps -= call.num_steps
            if kind != "train":
                self._heartbeat.beat()
            result = self.fetch(scheduled)
            if call.is_new and kind == "train":
                self._dispatch.end_compile(trace_secs, num_steps=call.num_steps)
            return result, call, call.is_boundary and not pending

        for call in calls:
            while pending and num_steps + call.num_steps > max_steps(call.num_steps):
                yield finish()
            scheduled, trace_secs = self.schedule(call, kind)
            pending.append((scheduled, call, trace_secs))
            num_steps += call.num_steps
            while call.is_boundary and pending:
                yield finish()
        while pending:
            yield finish()

    def schedule(self, call: Call, kind: str) -> tuple[Scheduled, float]:
        """Returns what is on its way, and how long it took to trace a function that is new."""
        start = time.perf_counter()
        if call.is_new and kind == "train":
            self._dispatch.begin_compile()
        value = self._coordinator.schedule(call.closure.function, args=call.args)
        return Scheduled(value, call.closure), time.perf_counter() - start

    def fetch(self, scheduled: Scheduled) -> Any:
        """Waits for a result, or raises the closure's own error, or that for which all were cancelled."""
        while True:
            try:
                return scheduled.closure.unpack(self._coordinator.fetch(scheduled.value))
            except tf.errors.CancelledError:
                self._coordinator.done()  # raises what it was cancelled for, if nobody has heard of it yet
                raise
            except tf.errors.OpError:
                # The worker may have died while its result was on the way: then TensorFlow runs the step elsewhere, and
                # the result will come. An error of the step itself is the coordinator's too: raised here.
                self._coordinator.done()
                time.sleep(_RETRY_SECS)

    def join(self) -> None:
        """Waits until nothing is in flight."""
        self._coordinator.join()
