"""Failures made on purpose, to see a job survive them: `--chaos=kill:worker:1@step=50,stop:ps:0@secs=20`.

`cut` breaks the connection to the machine on which a task runs, with `--hosts`.
"""

import dataclasses
import re
import signal
from collections.abc import Callable, Iterable
from pathlib import Path

from tfdist.cluster.heartbeat import Beat
from tfdist.cluster.spec import Cluster, Task
from tfdist.errors import ConfigError

CUT = "cut"
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
ACTIONS = (*SIGNALS, CUT)
MOMENTS = ("start", "step", "secs", "checkpoint", "end")
_FORM = re.compile(r"(\w+):(\w+)(?::(\d+))?@(\w+)(?:=(\d+(?:\.\d+)?))?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """One failure to make.

    Attributes:
        action: One of `ACTIONS`.
        task: Whom it befalls.
        moment: One of `MOMENTS`: as soon as the task has started, after a step, seconds after the job's start, while a
            checkpoint is being written, after the last step.
        value: Which step, or how many seconds.
    """

    action: str
    task: Task
    moment: str
    value: float = 0.0

    def __str__(self) -> str:
        value = f"={self.value:g}" if self.moment in ("step", "secs") else ""
        return f"{self.action}:{self.task}@{self.moment}{value}"


def parse_chaos(text: str, cluster: Cluster, *, has_hosts: bool = False) -> list[Failure]:
    """Reads a list of failures.

    Args:
        text: Each as ACTION:TASK@MOMENT, with commas between; empty for none.
        cluster: Whose tasks they befall.
        has_hosts: Whether the tasks run on other machines, whose connection can be cut.

    Raises:
        ConfigError: If one is malformed, or names a task that is not there.
    """
    failures = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        match = _FORM.fullmatch(word)
        if match is None:
            raise ConfigError(f"chaos {word!r}: write it as kill:worker:1@step=50")
        action, role, index, moment, value = match.groups()
        for name, known in ((action, ACTIONS), (moment, MOMENTS)):
            if name not in known:
                raise ConfigError(f"chaos {word!r}: {name!r} must be one of {', '.join(known)}")
        if (value is not None) != (moment in ("step", "secs")):
            raise ConfigError(
                f"chaos {word!r}: step and secs take a number, such as step=50; the others none"
            )
        if action == CUT and not has_hosts:
            raise ConfigError(f"chaos {word!r}: there is no connection to cut on one machine; give --hosts")
        task = Task(role, int(index or 0))
        if task not in cluster.tasks:
            known_tasks = ", ".join(map(str, cluster.tasks))
            raise ConfigError(f"chaos {word!r}: there is no {task}; the tasks are {known_tasks}")
        failures.append(Failure(action=action, task=task, moment=moment, value=float(value or 0)))
    return failures


class Chaos:
    """Makes failures, each once in a job's life, restarts included.

    Args:
        failures: What to make.
        run_dir: Where checkpoints appear; None if nobody knows.
        started_at: When the job began, on the clock that `take_due` is told.
    """

    def __init__(self, failures: Iterable[Failure], *, run_dir: str | None, started_at: float) -> None:
        self._left = list(failures)
        self._run_dir = run_dir
        self._started_at = started_at
        self._has_worked = False

    @property
    def is_over(self) -> bool:
        """Whether all were made."""
        return not self._left

    def take_due(self, read: Callable[[Task], Beat | None], cluster: Cluster, now: float) -> list[Failure]:
        """Returns the failures whose moment has come by the tasks' records and the clock, and forgets them."""
        if not self._left:
            return []
        beats = [beat for task in cluster.tasks if (beat := read(task)) is not None]
        self._has_worked |= any(beat.state == "working" for beat in beats)
        due = [failure for failure in self._left if self._is_due(failure, read, beats, now)]
        self._left = [failure for failure in self._left if failure not in due]
        return due

    def _is_due(
        self, failure: Failure, read: Callable[[Task], Beat | None], beats: list[Beat], now: float
    ) -> bool:
        if failure.moment == "start":
            return read(failure.task) is not None
        if failure.moment == "secs":
            return now - self._started_at >= failure.value
        if failure.moment == "step":
            # A worker may be a step behind another; who makes no steps (ps, evaluator) has the furthest one's.
            own = read(failure.task)
            steps = [own.step] if own is not None and own.step else [beat.step for beat in beats]
            return max(steps, default=0) >= failure.value
        if failure.moment == "end":
            return self._has_worked and any(beat.state == "resting" for beat in beats)
        return self._run_dir is not None and any(Path(self._run_dir, "checkpoints").glob(".epoch-*.tmp-*"))
