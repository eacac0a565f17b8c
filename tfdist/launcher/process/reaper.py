"""Kills what is left of a job; also a tiny program that does so when the launcher dies.

A launcher that is killed by SIGKILL can clean up nothing itself. So it starts this file as a process beside the
tasks, writes it the process group of every task that it starts, and keeps the pipe open. When the pipe ends
without a farewell, the launcher is dead, and the reaper kills the whole job.

Uses only the standard library and nothing of tfdist, so that it starts at once: `python -I -S reaper.py MARK`.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterable

FAREWELL = "end"
MARK_VARIABLE = "TFDIST_JOB"


def kill_job(groups: Iterable[int], mark: str) -> None:
    """Kills process groups, if they are still there, and every process whose environment carries the mark of the job.

    The mark finds what a group does not: a process that made itself a session of its own, and one that was
    started in the moment in which the launcher died.
    """
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
    for _ in range(20):  # again until none is found: a process may have forked while we looked
        found = _find_marked(mark)
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _find_marked(mark: str) -> list[int]:
    wanted = f"{MARK_VARIABLE}={mark}".encode()
    found = []
    try:
        names = os.listdir("/proc")
    except OSError:  # no /proc on this system: then the groups have to do
        return []
    for name in names:
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                environ = file.read()
        except OSError:  # gone, or another user's
            continue
        if wanted in environ.split(b"\0"):
            found.append(int(name))
    return found


def main() -> None:
    """Reads process groups, one a line, until the pipe ends; then kills, unless the last line is a farewell."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the reaper must outlive whatever ends the launcher
    groups = []
    for line in sys.stdin:
        if line.strip() == FAREWELL:
            return
        groups.append(int(line))
    kill_job(groups, sys.argv[1])
    time.sleep(0.2)
    kill_job((), sys.argv[1])  # a task that was between fork and exec shows its environment only now


if __name__ == "__main__":
    main()
