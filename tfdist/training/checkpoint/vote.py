"""What workers agree on between two steps: whether a clock, a signal or a changed cluster asks to save the state."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

# How often workers agree, in seconds: to do so is an exchange.
_SECS = 1.0
_MAX_STEPS = 1000


class Vote:
    """Asks all workers what one of them alone may know; a context in which SIGTERM is heard.

    Args:
        every_secs: The chief wants the state to be saved so often; None: its clock asks for nothing.
        is_chief: Whether this process is the chief.
        has_news: Tells whether the cluster is to be formed anew.
        all_reduce_sum: Returns the sums over all processes.

    Attributes:
        is_stopping: Whether some process was told to end by SIGTERM, as all have agreed.
        is_regrouping: Whether the cluster is to be formed anew, as all have agreed.
    """

    def __init__(
        self,
        *,
        every_secs: float | None,
        is_chief: bool,
        has_news: Callable[[], bool],
        all_reduce_sum: Callable[[list[float]], list[float]],
    ) -> None:
        self.is_stopping = self.is_regrouping = False
        self._every_secs = every_secs if is_chief else None
        self._has_news = has_news
        self._all_reduce_sum = all_reduce_sum
        self._was_told = False
        self._num_steps, self._last, self._next = 0, 0, 1
        self._last_at = self._saved_at = time.monotonic()
        self._previous_handler: Any = None

    def __enter__(self) -> Vote:
        # After the strategy was built, which puts TensorFlow's own handler in place.
        if threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGTERM, self._note_signal)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)

    def count_step(self) -> bool:
        """Counts a step, after which every process calls it; says whether the state is to be saved for its sake."""
        self._num_steps += 1
        return self._num_steps >= self._next and self.hold()

    def note_save(self) -> None:
        """Starts the clock anew."""
        self._saved_at = time.monotonic()

    def hold(self) -> bool:
        """Lets all processes agree, each of which must call it; says whether the state is to be saved now."""
        now = time.monotonic()
        is_due = self._every_secs is not None and now - self._saved_at >= self._every_secs
        secs = max(now - self._last_at, 1e-6)
        num_due, num_told, num_with_news, total_secs, num_voters = self._all_reduce_sum(
            [float(is_due), float(self._was_told), float(self._has_news()), secs, 1.0]
        )
        self.is_stopping, self.is_regrouping = num_told > 0, num_with_news > 0
        steps = round((self._num_steps - self._last) * _SECS * num_voters / total_secs)
        self._last, self._last_at = self._num_steps, now
        self._next = self._num_steps + min(max(1, steps), _MAX_STEPS)
        return num_due > 0 or self.is_stopping or self.is_regrouping

    def _note_signal(self, number: int, frame: Any) -> None:
        del number, frame
        self._was_told = True
