"""How much of an epoch the workers of a coordinator stand idle, and how many steps a closure must hold against it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfdist.training.monitoring.clock import now_after

# What is lost between two closures may be this share of the workers' time.
_SHARE = 0.03
_MAX_STEPS = 16
# A closure grows by this factor at most: what tracing costs is then known better, and most of the loss is gone early.
_MAX_GROWTH = 4
# Before so many closures, and seconds, their time is not known.
_MIN_CLOSURES, _MIN_SECS = 16, 1.0
# A closure's step is traced once; each call of it in the graph takes this share of that.
_TRACED_EACH = 0.02
# What is won until the run ends must be so many times what tracing costs.
_MARGIN = 2.0
# An epoch gives a worker so many closures at least: at its end all wait for the one who has the last.
_CLOSURES_PER_EPOCH = 4


# Wide: what is on its way to each worker.
class Dispatch:
    """Adds up how long workers were busy, and chooses the steps of a closure.

    A closure measures by its worker's own clock how long it ran. What is left of the workers' time, from an epoch's
    first closure to its last result, is time without work: a closure or its result on the way, a chief that is busy
    scheduling, reading or saving, the wait for the last worker where nothing may be in flight. Left out is the time in
    which TensorFlow compiles: from the scheduling of a function that is new until its first result.

    Args:
        num_workers: Who share the work.
        now: Reads a clock, in seconds.
    """

    def __init__(self, *, num_workers: int, now: Callable[[], float] = time.perf_counter) -> None:
        self._num_workers = num_workers
        self._now = now
        self._num_compiling = 0
        self._compile_secs = 0.0
        self._chosen = 1
        # The number before this one, and how long a step took with it.
        self._before: tuple[int, float] | None = None
        self._is_settled = False
        # Since closures hold so many steps.
        self._lost_before = self._all_busy_secs = self._all_secs = 0.0
        self._num_steps = self._num_closures = 0
        self._busy_secs = self._total_secs = 0.0
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Starts an epoch's share; nothing is in flight."""
        self._lost_before += self._lost_secs
        self._busy_secs = self._total_secs = 0.0
        self._num_compiling = 0
        self._last = self._now()

    def begin_compile(self) -> None:
        """Stops the clock: a function is new."""
        self._num_compiling += 1

    def end_compile(self, secs: float, *, num_steps: int) -> None:
        """Starts the clock again: a new function's first result is there, which the chief took `secs` to trace."""
        self._num_compiling = max(self._num_compiling - 1, 0)
        self._compile_secs = secs / (1 + _TRACED_EACH * num_steps)
        self._last = self._now()

    def end_closure(self, busy_secs: float, *, num_steps: int) -> None:
        """Adds a closure that ran for `busy_secs` on its worker."""
        if self._num_compiling:
            return
        now = self._now()
        self._busy_secs += busy_secs
        self._total_secs += now - self._last
        self._all_secs += now - self._last
        self._last = now
        self._all_busy_secs += busy_secs
        self._num_steps += num_steps
        self._num_closures += 1

    @property
    def share(self) -> float | None:
        """Time that workers had nothing to do ÷ time, 0..1; None where nothing was measured."""
        if self._total_secs <= 0:
            return None
        return min(max(1.0 - self._busy_secs / (self._num_workers * self._total_secs), 0.0), 1.0)

    @property
    def step_secs(self) -> float | None:
        """How long all workers together took for a step lately; None where nothing was measured."""
        return self._all_secs / self._num_steps if self._num_steps else None

    def choose_steps(self, *, num_left: float = math.inf, num_in_epoch: float = math.inf) -> int:
        """Returns how many steps a closure should hold: 1, until more are worth the time to trace them.

        More steps are traced once the time lost with fewer is what tracing them will take, so that a run that ends
        early has lost at most as much again. If they turn out to be slower, it is the former number again, for good.
        """
        if self._is_settled or self._num_closures < _MIN_CLOSURES or self._all_secs < _MIN_SECS:
            return self._chosen
        secs = self.step_secs or 0.0
        if self._before is not None and secs > self._before[1]:
            self._chosen, self._is_settled = self._before[0], True
            return self._chosen
        # What is lost is lost by closures, whatever they hold.
        lost_secs = self._lost_before + self._lost_secs
        lost_by_closure = self._num_workers * lost_secs / self._num_closures
        step_secs = max(self._all_busy_secs / self._num_steps, 1e-9)
        wanted = lost_by_closure / step_secs * (1 - _SHARE) / _SHARE
        most = min(_MAX_STEPS, num_in_epoch / (_CLOSURES_PER_EPOCH * self._num_workers))
        steps = min(2 ** math.ceil(math.log2(max(wanted, 1.0))), self._chosen * _MAX_GROWTH)
        steps = min(steps, 2 ** math.floor(math.log2(max(most, 1.0))))
        won_secs = lost_secs / self._num_steps * (1 - self._chosen / steps) * num_left
        cost_secs = self._compile_secs * (1 + _TRACED_EACH * steps)
        if steps > self._chosen and lost_secs >= cost_secs and won_secs >= _MARGIN * cost_secs:
            self._before = self._chosen, secs
            self._chosen = steps
            self._lost_before, self._all_busy_secs, self._all_secs = -self._lost_secs, 0.0, 0.0
            self._num_steps = self._num_closures = 0
        return self._chosen

    @property
    def _lost_secs(self) -> float:
        """Seconds that a worker has lost in this epoch, the mean of all."""
        return (self.share or 0.0) * self._total_secs


def timed(body: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `body` as a function that returns its results and the seconds it took where it ran (float64)."""
    # A function in a function: it ends when all that it writes is written, not only what it returns is known.
    inner = tf.function(body, autograph=False)

    def run(*args: Any) -> tuple[Any, tf.Tensor]:
        start = now_after(())
        with tf.control_dependencies([start]):
            results = inner(*args)
        return results, now_after(results) - start

    return run
