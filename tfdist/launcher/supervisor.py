"""Watches the processes of a job: reads what they print, sees them end, and decides what follows."""

import contextlib
import os
import selectors
import shutil
import signal
import sys
import time
from typing import IO

from tfdist.cluster import Cluster, Task
from tfdist.launcher import guard
from tfdist.launcher.children import Child, Guard
from tfdist.launcher.job import Job
from tfdist.launcher.logs import Display, TaskOutput, log_path, open_log, render_prefix
from tfdist.launcher.signals import SignalInbox

SERVER_GRACE_SECS = (
    1.0  # for the workers and ps of a ps job whose chief is gone: they never return by themselves
)
SETTLE_SECS = 60.0  # after this long, workers that outlive their peers are mentioned
_DRAIN_SECS = 1.0
# 128 + SIGHUP, SIGINT, SIGTERM: whoever sent them meant it.
_ASKED_TO_END = (129, 130, 143)
_POLL_SECS = 0.02  # only where the system cannot wake us when a process ends
_CHUNK_BYTES = 2**16


class Supervisor:
    """Starts a job's processes and stays until all have ended.

    The job ends well when every task has ended with 0, or in a ps job when the chief has. It fails with the first
    task that ends otherwise, unless this process had asked for the end already; then all the others are stopped.

    Args:
        job: What to run.
        cluster: Its tasks with their addresses.
        mark: Value of `TFDIST_JOB` that marks the processes of this job.
        num_restarts: Those of `job.max_restarts` that are used up.
    """

    def __init__(self, job: Job, cluster: Cluster, mark: str, *, num_restarts: int = 0) -> None:
        self.num_restarts = num_restarts
        self._job = job
        self._cluster = cluster
        self._mark = mark
        self._children: list[Child] = []
        self._display = Display(job.env)
        self._selector = selectors.DefaultSelector()
        self._cause: Child | None = None
        self._told_by: signal.Signals | None = None
        self._stop_signal: signal.Signals | None = None
        self._kill_at = float("inf")
        self._last_exit_at = float("inf")
        self._num_hidden = 0

    def run(self, envs: dict[Task, dict[str, str]]) -> int:
        """Runs the job to its end.

        Args:
            envs: Each task's whole environment.

        Returns:
            The exit code of the job: 0, that of the first task that failed (128 + n for signal n), or 128 + n if
            this process was told to end by signal n.

        Raises:
            ConfigError: If the run_dir cannot be written.
            LaunchError: If a process cannot be started.
        """
        with contextlib.ExitStack() as stack:
            outputs = {task: stack.enter_context(self._open_output(task)) for task in envs}
            self._envs = envs
            self._guard = Guard(self._mark)
            stack.callback(self._guard.dismiss)
            with SignalInbox(self._kill) as inbox:
                self._selector.register(inbox, selectors.EVENT_READ)
                try:
                    for task, env in envs.items():
                        self._start(outputs[task], env)
                    while any(child.is_alive for child in self._children):
                        self._step(inbox)
                finally:
                    self._finish(inbox)
        return self._report()

    def _open_output(self, task: Task) -> contextlib.closing[TaskOutput]:
        log = open_log(self._job.run_dir, task) if self._job.run_dir else None
        return contextlib.closing(TaskOutput(task, log))

    @property
    def is_worth_a_restart(self) -> bool:
        """Whether the job failed because a task was killed, nobody having asked for its end, and may try again."""
        return self._was_killed(self._cause) and self._told_by is None and self._has_restarts_left

    @property
    def _has_restarts_left(self) -> bool:
        return self.num_restarts < self._job.max_restarts

    def _was_killed(self, child: Child | None) -> bool:
        return child is not None and (child.exit_code or 0) > 128 and child.exit_code not in _ASKED_TO_END

    def _start(self, output: TaskOutput, env: dict[str, str]) -> None:
        if sys.stdout.isatty() and output.task == self._cluster.chief:
            prefix = render_prefix(output.task, colour=None)
            env = env | {"COLUMNS": str(max(20, shutil.get_terminal_size().columns - len(prefix)))}
        child = Child(output, self._job.command, env)
        self._children.append(child)
        self._guard.add(child.group)
        for stream in ("stdout", "stderr"):
            pipe = getattr(child.process, stream)
            self._selector.register(pipe, selectors.EVENT_READ, (child, stream, pipe))
        if child.exit_fd is not None:
            self._selector.register(child.exit_fd, selectors.EVENT_READ)

    def _step(self, inbox: SignalInbox) -> None:
        self._read(self._wait_secs())
        inbox.clear()
        now = time.monotonic()
        ended = [child for child in self._children if child.poll()]
        for child in sorted(ended, key=self._exit_order):
            self._note_exit(child, now)
        if self._stop_signal is None and (inbox.received or self._display.broken):
            self._obey(inbox.received[0] if inbox.received else signal.SIGPIPE)
        elif inbox.received and self._told_by is None:
            self._kill()  # the tasks are being stopped anyway: the person at the keyboard is tired of waiting
        if self._stop_signal is not None:
            self._ask_to_end(self._stop_signal)
        if now >= self._kill_at:
            self._kill()
        if now - self._last_exit_at > SETTLE_SECS:
            self._last_exit_at = float("inf")
            alive = ", ".join(str(child.task) for child in self._children if child.is_alive)
            self._say(f"{alive} still run {SETTLE_SECS:g} s after the others ended; Ctrl-C ends them")

    def _wait_secs(self) -> float:
        if any(child.is_alive and child.exit_fd is None for child in self._children):
            return _POLL_SECS
        return max(0.0, min(1.0, self._kill_at - time.monotonic()))

    def _read(self, timeout_secs: float) -> None:
        """Takes what the tasks have printed by now."""
        for key, _ in self._selector.select(timeout_secs):
            if key.data is None:
                continue
            self._take(*key.data)

    def _take(self, child: Child, stream: str, pipe: IO[bytes]) -> None:
        data = pipe.read(_CHUNK_BYTES)
        if not data:
            self._selector.unregister(pipe)
        lines = child.output.receive(stream, data)
        if self._cause is not None and child is not self._cause:
            self._num_hidden += len(lines)  # what the others say now is the echo of the failure
            return
        self._display.show(child.task, stream, lines)

    def _exit_order(self, child: Child) -> tuple[bool, bool]:
        """Orders ends that were seen in the same moment, on a busy machine, from likely cause to likely echo."""
        is_good_end = self._job.has_chief and child.task.type == "chief" and child.exit_code == 0
        is_killed = (child.exit_code or 0) > 128
        return not is_good_end, not is_killed

    def _note_exit(self, child: Child, now: float) -> None:
        self._forget_exit_fd(child)
        if self._stop_signal is not None:
            return
        is_worker = self._job.has_chief and child.task.type == "worker"
        if is_worker and self._was_killed(child) and self._has_restarts_left:
            self._replace(child)
        elif child.exit_code != 0:
            self._cause = child
            if any(other.is_alive for other in self._children):
                self._say(f"{child.task} {_render_exit(child.exit_code)}; stopping the others")
            # Before another try there is nothing to wait for: what the others could save is what they share.
            grace_secs = SERVER_GRACE_SECS if self.is_worth_a_restart else self._job.grace_secs
            self._stop(signal.SIGTERM, grace_secs)
        elif not self._job.has_chief:
            self._last_exit_at = now
        elif child.task.type == "chief":
            self._stop(signal.SIGTERM, SERVER_GRACE_SECS)

    def _replace(self, child: Child) -> None:
        """Starts a ps job's worker again on its own port: the chief gives its work to others until it is back."""
        self.num_restarts += 1
        self._say(
            f"{child.task} {_render_exit(child.exit_code)}; starting it again "
            f"({self.num_restarts} of {self._job.max_restarts})"
        )
        self._start(child.output, self._envs[child.task])

    def _forget_exit_fd(self, child: Child) -> None:
        if child.exit_fd is not None:
            self._selector.unregister(child.exit_fd)
            os.close(child.exit_fd)
            child.exit_fd = None

    def _obey(self, number: signal.Signals) -> None:
        self._told_by = number
        if number == signal.SIGPIPE:  # nobody reads our output any more, as after `| head`
            self._stop(signal.SIGTERM, self._job.grace_secs)
            return
        self._say(
            f"{number.name}: asking the tasks to end (up to {self._job.grace_secs:g} s; "
            "another signal kills them at once)"
        )
        self._stop(number, self._job.grace_secs)

    def _stop(self, number: signal.Signals, grace_secs: float) -> None:
        self._stop_signal = number
        self._kill_at = time.monotonic() + grace_secs

    def _ask_to_end(self, number: signal.Signals) -> None:
        """Passes the signal on; in a ps job to the chief first, which may need the servers to save its work."""
        alive = [child for child in self._children if child.is_alive]
        if self._job.has_chief:
            chief = [child for child in alive if child.task.type == "chief"]
            if not chief:
                self._kill_at = min(self._kill_at, time.monotonic() + SERVER_GRACE_SECS)
            alive = chief or alive
        for child in alive:
            if not child.asked_to_end:
                child.asked_to_end = True
                child.signal_group(number)

    def _kill(self) -> None:
        self._kill_at = float("inf")
        for child in self._children:
            if child.is_alive:
                child.signal_group(signal.SIGKILL)

    def _finish(self, inbox: SignalInbox) -> None:
        """Ends what is left (also of finished tasks: whatever they started) and takes the last output."""
        guard.kill_job([child.group for child in self._children], self._mark)
        for child in self._children:
            self._forget_exit_fd(child)
        self._selector.unregister(inbox)
        deadline = time.monotonic() + _DRAIN_SECS
        while self._selector.get_map() and time.monotonic() < deadline:
            self._read(deadline - time.monotonic())
        self._selector.close()
        for child in self._children:
            child.reap()

    def _report(self) -> int:
        """Shows the first cause, as the last thing, and gives the job's exit code."""
        cause = self._cause
        if cause is None or cause.exit_code is None:
            return 128 + self._told_by if self._told_by else 0
        if self._num_hidden and self._job.run_dir:
            self._say(f"{self._num_hidden} later lines of the other tasks are in {self._job.run_dir}/logs")
        # A mistake in the settings is one line: once is enough.
        is_said = (
            cause.exit_code == 2 and cause.output.tail and cause.output.tail[-1] == self._display.last_shown
        )
        if cause.output.tail and not is_said:
            self._say(f"the last lines of {cause.task}, the first task to fail:")
            self._display.show(cause.task, "stderr", list(cause.output.tail))
        end = f"; whole output: {log_path(self._job.run_dir, cause.task)}" if self._job.run_dir else ""
        if self.is_worth_a_restart:
            end += f"; starting all tasks again ({self.num_restarts + 1} of {self._job.max_restarts})"
        self._say(f"{cause.task} {_render_exit(cause.exit_code)}{end}")
        return cause.exit_code

    def _say(self, text: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # nobody listens; the tasks must still be looked after
            print(f"tfdist.launch: {text}", file=sys.stderr, flush=True)


def _render_exit(code: int | None) -> str:
    if code is None:
        return "did not end"
    if code <= 128:
        return f"exited with code {code}"
    try:
        return f"was killed by {signal.Signals(code - 128).name} (exit code {code})"
    except ValueError:
        return f"exited with code {code}"
