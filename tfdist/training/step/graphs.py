"""The graphs of a synchronous loop: one for each kind of step, and for each number of steps in a call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist.data.segment import Segment
from tfdist.data.sources.source import SelfShardedSource
from tfdist.training.monitoring import clock
from tfdist.training.monitoring.input_wait import timed_next
from tfdist.training.step.compiler import Compiler
from tfdist.training.step.finite_check import SOUND
from tfdist.training.step.replica import ReplicaStep
from tfdist.training.step.single_device import SingleDeviceStep


class StepGraphs:
    """Makes what runs one step or several in a call, and keeps it.

    Args:
        model: Whose steps.
        step: What runs one, of this process's replicas.
        compiler: Says what XLA compiles.
        first_local: Returns the value of this process's first replica.

    Attributes:
        is_traced: Whether the last call's time was TensorFlow's tracing.
    """

    def __init__(
        self,
        *,
        model: keras.Model,
        step: ReplicaStep | SingleDeviceStep,
        compiler: Compiler,
        first_local: Callable[[Any], Any],
    ) -> None:
        self._model = model
        self._step = step
        self._alone = isinstance(step, SingleDeviceStep)
        self._compiler = compiler
        self._first_local = first_local
        self._functions: dict[Any, Callable[..., Any]] = {}
        self._compiled_steps: dict[Any, Callable[..., Any]] = {}
        self.is_traced = False

    def forget(self) -> None:
        """Lets all be made anew."""
        self._functions.clear()

    @property
    def longest_loop(self) -> int:
        """Training steps of a call, at most."""
        return max((size for kind, *_, size in self._functions if kind == "train"), default=1)

    def get(
        self, kind: str, segment: Segment, size: int, *, source: type, is_part: bool, mode: Any
    ) -> Callable[..., Any]:
        """Returns what makes some steps.

        Args:
            kind: `train`, `test` or `predict`.
            segment: Of the batches.
            size: Steps of a call.
            source: The kind of the segment's source.
            is_part: Whether batches are this process's own, and others may have more or fewer.
            mode: What of the workers' way of sharing a graph holds.

        Returns:
            A function of an iterator and, where losses have a limit, of that and maybe the verdict of the step before.
            It returns for each step its outputs, how many processes have more (or None), and the wait for input.
        """
        self.is_traced = False
        # A short batch at a pass's end is not worth compiling: it comes once an epoch.
        is_compiled = self._compiler.is_on and not segment.is_short and not self._model.run_eagerly
        is_compiled = is_compiled and (self._alone or kind == "train")
        key = kind, source, segment.never_empty, self._model.run_eagerly, is_compiled, mode, size
        if key not in self._functions:
            own = issubclass(source, SelfShardedSource)
            one = self._build_one(kind, segment, is_compiled=is_compiled, is_part=is_part, is_own=own)

            def steps(iterator: Any, *limit: Any) -> list[Any]:
                return self._run(one, size, iterator, *limit)

            self._functions[key] = steps if self._model.run_eagerly else tf.function(steps, autograph=False)
        return self._functions[key]

    def _run(self, one: Callable[..., Any], size: int, iterator: Any, *limit: Any) -> list[Any]:
        # After a step that was wrong those that have begun already change nothing: the run ends at that one.
        limit, before = limit[:1], limit[1:]
        found: list[Any] = []
        for _ in range(size):
            verdicts = [self._first_local(found[-1][0][1])] if found else before
            if limit and verdicts:
                limit = (tf.where(verdicts[0][0] == SOUND, limit[0], -np.inf),)
            found.append(one(iterator, *limit))
        return found

    def _build_one(
        self, kind: str, segment: Segment, *, is_compiled: bool, is_part: bool, is_own: bool
    ) -> Callable[..., Any]:
        step, split = self._build_step(kind, segment, is_compiled), segment.split

        def one_step(iterator: Any, *limit: Any) -> Any:
            self.is_traced = tf.inside_function()
            element, batch_at, wait_secs = timed_next(iterator)
            parts, rest = split(element)
            if is_part:
                return *step(parts, None, *limit, has_more=rest), wait_secs
            outputs = step(parts, None if is_own else rest, *limit)
            if self._alone and kind == "train":
                logs, verdict, done = outputs
                done_at = clock.step_time_after(done)
                with clock.on_host():
                    outputs = logs, verdict, tf.stack([batch_at, done_at, done_at])
            return outputs, None, wait_secs

        return one_step

    def _build_step(self, kind: str, segment: Segment, is_compiled: bool) -> Callable[..., Any]:
        step = functools.partial(self._step.run, kind, never_empty=segment.never_empty)
        if not is_compiled:
            return step
        if not self._alone:
            return functools.partial(step, jit=self._compiler.compute)
        # Without the reading, for which there is no such code; one for any number of steps: it is compiled once.
        key = kind, segment.never_empty
        if key not in self._compiled_steps:
            self._compiled_steps[key] = tf.function(step, autograph=False, jit_compile=True)
        return self._compiled_steps[key]
