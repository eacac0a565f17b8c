"""Where the time of a sync run's steps goes, on each worker.

A step waits for its batch (`input`), runs forward and back until its first gradients can cross (`compute`), adds them
up with the other workers', while it runs back through the other layers (`exchange`), and updates weights and metrics,
of which the call of its graph is part (`update`). `between` two calls come callbacks, logs and checkpoints.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from tfdist.training.monitoring.input_wait import InputWait

# A worker that computes so many times as long as the median holds up the others.
STRAGGLER = 1.5
# Steps in one call of a graph, where that pays: a quarter of the calls is left, and no step waits long for the last.
LOOP = 4
# What loops save must be so many times what they cost, and this share of the time at least.
MARGIN, LEAST_SHARE = 2.0, 0.05
# A host that waits for the GPU for this share of the time does not hold it up.
WAITS = 0.1
_NAMES = ("input", "compute", "exchange", "update", "between")


# Wide: sums, one for each thing that a step spends time on.
class StepTimes:
    """Adds up an epoch's times; steps in which TensorFlow compiles are left out.

    Args:
        num_workers: That step together.
        rank: This worker's place.
        is_ahead: Whether the host hands out steps to a GPU before it knows of the ones before. Of a step's time it then
            knows only how long it waits for the GPU: if it does, `compute` is all but `input`, for what the host does
            itself costs nothing meanwhile.
        now: Reads a clock, in seconds.
    """

    def __init__(
        self,
        *,
        num_workers: int,
        rank: int,
        is_ahead: bool = False,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.rank = rank
        self._is_ahead = is_ahead
        self._num_workers = num_workers
        self._now = now
        self._workers: list[dict[str, float]] = []
        self._trace_secs = self._longest_trace_secs = 0.0
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Forgets the epoch before."""
        self._compute_secs = self._exchange_secs = self._between_secs = self._total_secs = 0.0
        self._num_steps = 0
        self._last = self._called_at = self._now()

    def begin_call(self) -> None:
        """Notes that a graph is called now, for a step or several."""
        self._called_at = self._now()

    def end_step(self, compute_secs: float, exchange_secs: float, *, counts: bool) -> None:
        """Adds a step.

        Args:
            compute_secs: From its batch until its first gradients were ready to cross; of a GPU, how long the host has
                waited for it.
            exchange_secs: From then until all sums were there; waiting for slower workers is part of it.
            counts: False leaves it out.
        """
        now = self._now()
        if counts:
            self._compute_secs += compute_secs
            self._exchange_secs += exchange_secs
            self._between_secs += max(self._called_at - self._last, 0.0)
            self._total_secs += now - self._last
            self._num_steps += 1
        else:
            self._trace_secs = max(self._trace_secs, now - self._last)
        self._last = now

    def end_epoch(self, input_wait: InputWait, all_reduce_sum: Callable[[list[float]], list[float]]) -> None:
        """Brings all workers' times together; every worker must call it."""
        width = len(_NAMES) + 1
        own = [0.0] * (width * self._num_workers)
        if self._num_steps and self._compute_secs:
            wait_secs = (input_wait.share or 0.0) * self._total_secs
            compute_secs, between_secs = self._compute_secs, self._between_secs
            if self._is_ahead and compute_secs > WAITS * self._total_secs:
                compute_secs, between_secs = self._total_secs - wait_secs, 0.0
            known = (wait_secs, compute_secs, self._exchange_secs)
            update_secs = self._total_secs - sum(known) - between_secs
            secs = (*known, max(update_secs, 0.0), between_secs)
            means = [s / self._num_steps for s in secs]
            own[width * self.rank : width * (self.rank + 1)] = [*means, self._trace_secs]
        found = all_reduce_sum(own) if self._num_workers > 1 else own
        self._workers = [
            dict(zip(_NAMES, found[start : start + width], strict=False))
            for start in range(0, len(found), width)
        ]
        self._longest_trace_secs = max(found[width - 1 :: width])

    @property
    def step_secs(self) -> float | None:
        """Mean seconds of a step of the epoch before, alike on all workers; None where they were not taken."""
        return min((sum(worker.values()) for worker in self._workers), default=0.0) or None

    def loop_size(self, num_steps: int, *, is_traced: bool = True) -> int:
        """Says how many steps one call of a graph should hold from now on, by the epoch's times: alike on all workers.

        Args:
            num_steps: That are still to come.
            is_traced: Whether each step of a loop is traced once more; one that XLA has compiled whole is not.

        Returns:
            `LOOP` if the calls that it saves are worth compiling so many steps, else 1.
        """
        step_secs = self.step_secs or 0.0
        saved_secs = min(worker["update"] + worker["between"] for worker in self._workers) * (1 - 1 / LOOP)
        cost_secs = LOOP * self._longest_trace_secs if is_traced else 0.0
        is_worth = saved_secs * num_steps > MARGIN * cost_secs
        return LOOP if is_worth and saved_secs > LEAST_SHARE * step_secs else 1

    def summary(self) -> dict[str, Any]:
        """Returns `step_secs` (for each worker the mean seconds of a step by what they went to) and `slowest_worker`.

        `straggler` is there too if that worker computes `STRAGGLER` times as long as the median: how many times.
        """
        computes = [worker["compute"] for worker in self._workers]
        if not any(computes):
            return {}
        slowest = computes.index(max(computes))
        found: dict[str, Any] = {
            "step_secs": [{name: round(secs, 6) for name, secs in worker.items()} for worker in self._workers]
        }
        if self._num_workers > 1:
            found["slowest_worker"] = slowest
            ratio = computes[slowest] / max(statistics.median(computes), 1e-9)
            if ratio >= STRAGGLER:
                found["straggler"] = round(ratio, 2)
        return found
