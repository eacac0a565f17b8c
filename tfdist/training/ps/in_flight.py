"""Parts of a batch that workers compute at once, where the batch need not wait for all of them."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tfdist.training.ps.message import Scheduled

_POLL_SECS = 0.0005


class PartsInFlight:
    """Waits for as many parts as are wanted. One that is late keeps its place, and its worker, until it ends.

    Args:
        num_places: How many parts there can be at once: one for each worker.
        fetch: Waits for what was scheduled, and returns what it has returned.
        end_late: Told of each late part's result.
    """

    def __init__(
        self, *, num_places: int, fetch: Callable[[Scheduled], Any], end_late: Callable[[Any], None]
    ) -> None:
        self._num_places = num_places
        self._fetch = fetch
        self._end_late = end_late
        self._late: dict[int, Scheduled] = {}

    def run(self, starts: Sequence[Callable[[int], Scheduled]], *, num_wanted: int) -> dict[int, Any]:
        """Starts parts wherever a place is free; returns place → result, in order, when `num_wanted` have ended.

        Each of `starts` schedules a part at a place; those that find none in time are never called. What else has ended
        by then counts as well.
        """
        waiting = collections.deque(starts)
        running: dict[int, Scheduled] = {}
        while True:
            for place in self._free_places():
                if waiting and place not in running:
                    running[place] = waiting.popleft()(place)
            # Where all are wanted there is nothing to choose from.
            takes_all = num_wanted == len(running) == len(starts)
            ended = {
                place: scheduled for place, scheduled in running.items() if takes_all or scheduled.has_ended
            }
            if len(ended) >= num_wanted:
                break
            time.sleep(_POLL_SECS)
        self._late |= {place: scheduled for place, scheduled in running.items() if place not in ended}
        return {place: self._fetch(ended[place]) for place in sorted(ended)}

    def wait_for_late(self) -> None:
        """Waits until nothing is in flight."""
        while self._late:
            late = self._late.pop(next(iter(self._late)))
            with contextlib.suppress(tf.errors.CancelledError):  # with an epoch that an error has ended
                self._end_late(self._fetch(late))

    def _free_places(self) -> list[int]:
        for place in [p for p, scheduled in self._late.items() if scheduled.has_ended]:
            self._end_late(self._fetch(self._late.pop(place)))
        return [place for place in range(self._num_places) if place not in self._late]
