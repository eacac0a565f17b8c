"""How often a job may be started again, and with how many workers."""

import time
from collections.abc import Callable

from tfdist.launcher.job import Job


class Restarts:
    """What a job's failures so far leave to try.

    Args:
        job: Its `max_restarts` count within `restart_window_secs`; `num_workers` and `min_workers` bound the size.
        now: Reads a clock, in seconds.
    """

    def __init__(self, job: Job, *, now: Callable[[], float] = time.monotonic) -> None:
        self.num_workers = job.num_workers
        self.num_tries = 0
        self.min_workers = job.min_workers or job.num_workers
        self.failed_at: float | None = None
        self._job = job
        self._now = now
        self._times: list[float] = []

    @property
    def has_left(self) -> bool:
        """Whether another restart is allowed now."""
        return self.num_recent < self._job.max_restarts

    @property
    def num_recent(self) -> int:
        """Restarts within the window: a machine that fails once a week must not end a run of a year."""
        start = self._now() - self._job.restart_window_secs
        self._times = [moment for moment in self._times if moment > start]
        return len(self._times)

    @property
    def is_shrunk(self) -> bool:
        """Whether the job runs with fewer workers than it was meant to."""
        return self.num_workers < self._job.num_workers

    def use(self) -> None:
        """Takes one restart."""
        self._times.append(self._now())
        self.num_tries += 1

    def rescale(self) -> None:
        """Notes a try with all workers, which nothing but their number asked for: it takes no restart."""
        self.num_tries += 1
        self.resize(num_lost=0)

    def resize(self, *, num_lost: int) -> None:
        """Chooses the size of the next try.

        Args:
            num_lost: Workers that died in the last one. Where the job is elastic their places stay empty once, as a
                machine that has just failed may fail again; with 0, all places are taken again.
        """
        self.num_workers = max(self.min_workers, self._job.num_workers - num_lost)
