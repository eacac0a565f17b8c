"""The processes of one try of a job: started, listened to, signalled, and none of them left."""

import contextlib
import os
import selectors
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from typing import IO, Any

from tfdist.cluster.spec import Cluster, Task
from tfdist.errors import PEER_LOST_CODE
from tfdist.launcher.events import Event, note_event
from tfdist.launcher.job import Job
from tfdist.launcher.process import reaper
from tfdist.launcher.process.children import Child, Reaper
from tfdist.launcher.process.logs import Display, TaskOutput, open_log, render_prefix, say
from tfdist.launcher.process.signals import SignalInbox
from tfdist.launcher.ssh.executors import Executor

_DRAIN_SECS = 1.0
_CHUNK_BYTES = 2**16
# 128 + SIGHUP, SIGINT, SIGTERM: whoever sent them meant it.
_ASKED_TO_END = (129, 130, 143)


# Wide: a job has many sides: processes, their lines, marks, deadlines.
class Processes:
    """Every process that a try has started, also those that have ended; a context that leaves none behind.

    Their environments have the mark as `TFDIST_JOB`.

    Raises:
        ConfigError: On entering, if the run_dir cannot be written.
    """

    def __init__(
        self,
        job: Job,
        cluster: Cluster,
        mark: str,
        envs: Mapping[Task, dict[str, str]],
        *,
        executor: Executor,
    ) -> None:
        self._executor = executor
        self.all: list[Child] = []
        self.display = Display(job.env)
        self.speaker: Child | None = None  # once set, the others' lines go to their logs alone
        self.num_hidden = 0
        self._job = job
        self._cluster = cluster
        self._mark = mark
        self._envs = envs
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> "Processes":
        with contextlib.ExitStack() as stack:
            self._outputs = {task: stack.enter_context(self._open_output(task)) for task in self._envs}
            self.note(f"starting all: {', '.join(str(task) for task in self._envs)}", kind="start")
            self._guard = Reaper(self._mark)
            stack.callback(self._guard.dismiss)
            self._inbox = stack.enter_context(SignalInbox(self.kill))
            self._selector.register(self._inbox, selectors.EVENT_READ)
            stack.callback(self._finish)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    @property
    def received(self) -> list[signal.Signals]:
        """The signals that were sent to this process."""
        return self._inbox.received

    @property
    def alive(self) -> list[Child]:
        """Those that have not been seen to end."""
        return [child for child in self.all if child.is_alive]

    @property
    def has_room(self) -> bool:
        """Whether all workers would have a place if all tasks were started again, on hosts that are not lost."""
        return self._executor.num_slots >= self._job.num_workers

    @property
    def can_wake(self) -> bool:
        """Whether the end of each is seen at once, without looking for it."""
        return all(child.exit_fd is not None for child in self.alive)

    def start(self, task: Task, extra_env: Mapping[str, str]) -> Child:
        """Starts a task's process, or another one for it, with `extra_env` on top of its environment.

        Raises:
            LaunchError: If it cannot be started.
        """
        env = self._envs[task] | dict(extra_env)
        if sys.stdout.isatty() and task == self._cluster.chief:
            prefix = render_prefix(task, colour=None)
            env["COLUMNS"] = str(max(20, shutil.get_terminal_size().columns - len(prefix)))
        child = self._executor.start(self._outputs[task], self._job.command, env)
        self.all.append(child)
        self._guard.add(child.group)
        for stream in ("stdout", "stderr"):
            pipe = getattr(child.process, stream)
            self._selector.register(pipe, selectors.EVENT_READ, (child, stream, pipe))
        if child.exit_fd is not None:
            self._selector.register(child.exit_fd, selectors.EVENT_READ)
        return child

    def wait(self, timeout_secs: float) -> list[Child]:
        """Shows what the processes print, until something happens or the time is over.

        Returns:
            Those that have ended since the last call.
        """
        self._read(timeout_secs)
        self._inbox.clear()
        ended = [child for child in self.all if child.poll()]
        for child in ended:
            self._forget_exit_fd(child)
        return ended

    def kill(self) -> None:
        """Kills all at once."""
        for child in self.alive:
            child.signal_group(signal.SIGKILL)

    def say(self, text: str, **facts: Any) -> None:
        """Prints a line of the launcher's own, and notes it."""
        # Nobody listens, or the disk is full: the tasks must still be looked after.
        with contextlib.suppress(OSError):
            say(text)
        self.note(text, **facts)

    def note(self, text: str, **facts: Any) -> None:
        """Writes into the launcher's own logs, for whoever asks later what happened; `facts` are those of `Event`."""
        if self._job.run_dir:
            note_event(self._job.run_dir, Event(text=text, **facts))

    def _open_output(self, task: Task) -> contextlib.closing[TaskOutput]:
        log = open_log(self._job.run_dir, task) if self._job.run_dir else None
        return contextlib.closing(TaskOutput(task, log))

    def _read(self, timeout_secs: float) -> None:
        for key, _ in self._selector.select(timeout_secs):
            if key.data is not None:
                self._take(*key.data)

    def _take(self, child: Child, stream: str, pipe: IO[bytes]) -> None:
        data = pipe.read(_CHUNK_BYTES)
        if not data:
            self._selector.unregister(pipe)
        for own_stream, part in child.decode(stream, data):
            lines = child.output.receive(own_stream, part)
            if self.speaker is not None and child is not self.speaker:
                self.num_hidden += len(lines)  # what the others say now is the echo of the failure
            else:
                self.display.show(child.task, own_stream, lines)

    def _forget_exit_fd(self, child: Child) -> None:
        if child.exit_fd is not None:
            self._selector.unregister(child.exit_fd)
            os.close(child.exit_fd)
            child.exit_fd = None

    def _finish(self) -> None:
        """Ends what is left (also of finished tasks: whatever they started) and takes the last output."""
        reaper.kill_job([child.group for child in self.all], self._mark)
        for child in self.all:
            self._forget_exit_fd(child)
        self._selector.unregister(self._inbox)
        deadline = time.monotonic() + _DRAIN_SECS
        while self._selector.get_map() and time.monotonic() < deadline:
            self._read(deadline - time.monotonic())
        self._selector.close()
        for child in self.all:
            child.reap()


def killed_by(exit_code: int) -> signal.Signals | None:
    """Returns the signal that an exit code of 128 + n stands for; None if a program left with it (`sys.exit(-1)`)."""
    try:
        return signal.Signals(exit_code - 128)
    except ValueError:
        return None


def is_no_fault(child: Child | None) -> bool:
    """Says whether a task ended by no fault of its program: it was killed, or lost the others."""
    if child is None or child.exit_code is None:
        return False
    was_killed = killed_by(child.exit_code) is not None and child.exit_code not in _ASKED_TO_END
    return was_killed or child.exit_code == PEER_LOST_CODE


def render_exit(child: Child) -> str:
    """Says how a task ended, as in "exited with code 1"."""
    code = child.exit_code
    if child.fault:
        return child.fault
    if code is None:
        return "did not end"
    if code == PEER_LOST_CODE:
        return f"lost the others (exit code {code})"
    if (number := killed_by(code)) is None:
        return f"exited with code {code}"
    return f"was killed by {number.name} (exit code {code})"
