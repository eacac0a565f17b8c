"""One started process and its group; and the reaper that outlives the launcher."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tfdist.cluster.spec import Task
from tfdist.errors import LaunchError
from tfdist.launcher.process import reaper
from tfdist.launcher.process.fork import ForkedProcess
from tfdist.launcher.process.logs import TaskOutput


class Child:
    """A task's process, leader of a session and process group of its own.

    It is not reaped before `reap` is called: until then neither its id nor its group's can be given to a
    stranger, so killing the group is safe even after the leader has ended.

    Args:
        output: Where what it prints goes.
        command: Program and arguments.
        env: Its whole environment.
        fds: Descriptors that it inherits, by their numbers here.
        forks: Whether it is a fork of this process, which has imported what the program needs.

    Raises:
        LaunchError: If the program cannot be started.
    """

    takes_orders = False  # whether its stdin is kept open for the launcher

    def __init__(
        self,
        output: TaskOutput,
        command: Sequence[str],
        env: Mapping[str, str],
        fds: Sequence[int] = (),
        *,
        forks: bool = False,
    ) -> None:
        self.task: Task = output.task
        self.output = output
        self.exit_code: int | None = None
        self.asked_to_end = False
        self.fault = ""  # why it was killed, where we know
        self.has_lost_host = False  # ended because its machine cannot be reached
        self.process: subprocess.Popen[bytes] | ForkedProcess
        self.process = ForkedProcess(command, env, fds) if forks else self._start(command, env, fds)
        self.group = self.process.pid
        self.exit_fd = _open_exit_fd(self.process.pid)

    def _start(
        self, command: Sequence[str], env: Mapping[str, str], fds: Sequence[int]
    ) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE if self.takes_orders else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                env=dict(env),
                start_new_session=True,
                pass_fds=fds,
            )
        except OSError as error:
            raise LaunchError(
                f"cannot start {command[0]!r} ({error.strerror}): correct the command"
            ) from None

    @property
    def is_alive(self) -> bool:
        """Whether the process has not been seen to end."""
        return self.exit_code is None

    @property
    def stop_mark(self) -> str | None:
        """What stays the same while the process is stopped, as by SIGSTOP; None if it is not."""
        return read_stop_mark(self.process.pid)

    def decode(self, stream: str, data: bytes) -> list[tuple[str, bytes]]:
        """Says which of the task's streams brought what a pipe, `stdout` or `stderr`, did: nothing at its end."""
        return [(stream, data)]

    def poll(self) -> bool:
        """Returns True once, when the end is first seen; `exit_code` is then set, 128 + n for signal n."""
        if self.exit_code is not None:
            return False
        if hasattr(os, "waitid"):
            state = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if state is None:
                return False
            self.exit_code = state.si_status + (0 if state.si_code == os.CLD_EXITED else 128)
        else:  # macOS before Python 3.13, where nothing is forked
            assert isinstance(self.process, subprocess.Popen)
            code = self.process.poll()
            if code is None:
                return False
            self.exit_code = code if code >= 0 else 128 - code
        return True

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to the process alone."""
        self._send_here(number)

    def _send_here(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(self.process.pid, number)

    def signal_group(self, number: signal.Signals) -> None:
        """Sends a signal to the process and all that it has started in its group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.group, number)

    def cut(self) -> None:
        """Ends the process here alone, which for a task on another machine breaks the connection to it."""
        self._send_here(signal.SIGKILL)

    def reap(self) -> None:
        """Waits for the process, which must have ended or been killed, and closes its pipes."""
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


class Reaper:
    """The small process that kills the job of a mark, its `TFDIST_JOB`, if this one dies without a farewell.

    Raises:
        LaunchError: If it cannot be started.
    """

    def __init__(self, mark: str) -> None:
        # Without the variable an outer job's reaper, which kills by it, would take this one for a task.
        env = {name: value for name, value in os.environ.items() if name != reaper.MARK_VARIABLE}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(Path(reaper.__file__)), mark],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                env=env,
                start_new_session=True,
            )
        except OSError as error:
            raise LaunchError(
                f"cannot start {sys.executable!r} ({error.strerror}): check the Python"
            ) from None

    def add(self, group: int) -> None:
        """Puts a process group under guard."""
        self._tell(str(group))

    def dismiss(self) -> None:
        """Ends the guard; the job is over."""
        self._tell(reaper.FAREWELL)
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()

    def _tell(self, line: str) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # somebody has killed the guard; the job goes on
                self._process.stdin.write(f"{line}\n".encode())


def read_stop_mark(pid: int) -> str | None:
    """Returns how often a process that is stopped, as by SIGSTOP, had to wait so far; None of one that is not.

    Whoever stops once more waits once more, even if it did nothing in between.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:  # no /proc on this system, or just gone
        return None
    found = re.search(r"^State:\tT.*^voluntary_ctxt_switches:\t(\d+)", status, re.MULTILINE | re.DOTALL)
    return found[1] if found else None


def _open_exit_fd(pid: int) -> int | None:
    """Opens a descriptor that becomes readable when a process ends, where the system has such a thing."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None
