"""Tells tasks that work from those that are frozen or hang."""

from collections.abc import Iterable
from pathlib import Path

from tfdist.cluster.heartbeat import Beat, read_beat
from tfdist.cluster.spec import Task
from tfdist.launcher.process.children import Child

FROZEN_SECS = 3.0
# Between two looks: longer, and it was the launcher that did not run, as on a machine that was suspended.
_LATE_SECS = FROZEN_SECS / 2
# How long the first step may take: XLA compiles large models for many minutes.
FIRST_STEP_SECS = 3600.0


class Watch:
    """Looks at a job's tasks: at what the system says of their processes, and at their own records in a folder.

    One that makes steps may make none for `hang_timeout_secs`; 0: forever.
    """

    def __init__(self, folder: str, *, hang_timeout_secs: float) -> None:
        self._folder = Path(folder)
        self._hang_timeout_secs = hang_timeout_secs
        self._stopped: dict[Task, tuple[str, float]] = {}
        self._looked_at = 0.0
        self._changed_at: dict[Task, tuple[Beat, float]] = {}

    def path(self, task: Task) -> str:
        """Returns where a task keeps its record."""
        return str(self._folder / f"{task.type}-{task.index}")

    def fresh_path(self, name: str) -> str:
        """Returns where something else may be kept for the tasks, which is not there yet."""
        path = self._folder / name
        path.unlink(missing_ok=True)
        return str(path)

    def forget(self, task: Task) -> None:
        """Removes a task's record, before it is started again."""
        Path(self.path(task)).unlink(missing_ok=True)
        self._stopped.pop(task, None)
        self._changed_at.pop(task, None)

    def read(self, task: Task) -> Beat | None:
        """Returns what a task has done last; None while it has no record."""
        return read_beat(self.path(task))

    def state(self, task: Task | None) -> str | None:
        """Returns the state of a task's record; None while it has none."""
        beat = None if task is None else self.read(task)
        return None if beat is None else beat.state

    def find_frozen(self, children: Iterable[Child], now: float) -> list[Child]:
        """Returns the tasks whose process has been stopped (SIGSTOP) for `FROZEN_SECS`: nothing else would notice."""
        if now - self._looked_at > _LATE_SECS:
            self._stopped.clear()
        self._looked_at = now
        frozen = []
        for child in children:
            mark = child.stop_mark
            if mark is None:
                self._stopped.pop(child.task, None)
                continue
            # One that somebody stops again and again is slow, and not frozen.
            known = self._stopped.get(child.task)
            if known is None or known[0] != mark:
                known = self._stopped[child.task] = mark, now
            if now - known[1] >= FROZEN_SECS:
                frozen.append(child)
        return frozen

    def find_hung(self, children: Iterable[Child], now: float) -> Child | None:
        """Returns a task that makes no steps any more: of several, which wait for each other, the last.

        While one of them is busy between two steps the others may wait for it, as long as it takes.
        """
        hung: list[tuple[int, int, Child]] = []
        is_any_busy = False
        for place, child in enumerate(children):
            beat = self.read(child.task)
            if beat is None:
                continue
            known = self._changed_at.get(child.task)
            if known is None or known[0] != beat:
                self._changed_at[child.task] = (beat, now)
            elif 0 < self.patience_secs(beat) <= now - known[1]:
                hung.append((beat.step, place, child))
            if beat.state == "busy":
                is_any_busy = True
        if is_any_busy:
            # Patience begins anew when it is done.
            self._changed_at = {task: (beat, now) for task, (beat, _) in self._changed_at.items()}
            return None
        return min(hung)[2] if hung else None

    def patience_secs(self, beat: Beat | None) -> float:
        """Returns how long a record may stay as it is; 0: forever."""
        if beat is None:
            return 0.0
        if beat.state == "working":
            return self._hang_timeout_secs
        if beat.state == "preparing" and self._hang_timeout_secs:
            return max(self._hang_timeout_secs, FIRST_STEP_SECS)
        return 0.0
