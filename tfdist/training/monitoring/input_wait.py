"""How much of an epoch's training time goes by with waiting for input."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from tfdist.training.monitoring.clock import now_after, on_host


class InputWait:
    """Adds up waits and the time of the steps that they are part of.

    Args:
        now: Reads a clock, in seconds.
    """

    def __init__(self, *, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Forgets the epoch before."""
        self._wait_secs = self._total_secs = 0.0
        self._last = self._now()

    def end_step(self, wait_secs: float, *, counts: bool) -> None:
        """Adds the time since the last step.

        Args:
            wait_secs: How much of it was waiting.
            counts: False leaves a step out, as one in which TensorFlow compiles should be.
        """
        now = self._now()
        if counts:
            self._wait_secs += wait_secs
            self._total_secs += now - self._last
        self._last = now

    @property
    def share(self) -> float | None:
        """Waiting time ÷ time, 0..1; None where no step has counted."""
        return min(self._wait_secs / self._total_secs, 1.0) if self._total_secs > 0 else None


def timed_next(iterator: Iterator[Any]) -> tuple[Any, tf.Tensor, tf.Tensor]:
    """Takes the next element, in a graph too.

    Returns:
        The element, when it had come (seconds since 1970, float64 scalar) and the seconds that it took (likewise);
        zeros where the clock cannot be read.
    """
    start = now_after(())
    with tf.control_dependencies([start]):
        element = next_element(iterator)
    end = now_after(element)
    with on_host():
        return element, end, end - start


def next_element(iterator: Iterator[Any]) -> Any:
    """Takes the next element, in one graph as often as wanted: at 32 times TensorFlow suspects an endless loop.

    It counts by the object, so each element is taken through another one of the same iterator.
    """
    parts = tf.nest.flatten(iterator, expand_composites=True)
    return next(tf.nest.pack_sequence_as(iterator, parts, expand_composites=True))
