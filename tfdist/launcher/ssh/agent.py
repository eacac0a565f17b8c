"""The agent of a task on another machine: `python -m tfdist.launcher.ssh.agent`, started by ssh.

Its stdin brings a line of JSON that says which port to hold, one that says what to run, then one for each signal, and
empty ones as a sign of life. When stdin ends or is silent the launcher is dead or has lost this machine, and the task
is killed. Its stdout carries frames: the port, the task's output, its record of steps. It ends with the task's exit
code, 128 + n for signal n, and 254 for a program's own 255, by which ssh tells that it has lost the connection.
"""

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from typing import Any, NoReturn

from tfdist.cluster.cores import count_cores
from tfdist.cluster.heartbeat import VARIABLE as HEARTBEAT_VARIABLE
from tfdist.cluster.ports import PortReservation
from tfdist.errors import LaunchError
from tfdist.launcher.job import PMI_FD, PMI_RANK
from tfdist.launcher.process import reaper
from tfdist.launcher.process.children import Reaper, read_stop_mark
from tfdist.launcher.ssh import frames

SILENCE_SECS = 20  # the launcher gives a sign of life much more often
_START_SECS = 120  # until all hosts are ready
_LOOK_SECS = 0.25
_CHUNK_BYTES = 2**16
_DRAIN_SECS = 1.0


def main() -> int:
    """Runs one task, and returns its exit code."""
    # Whoever ends the connection ends stdin; a hangup in between must not leave the task behind.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, _leave)
    signal.alarm(_START_SECS)
    os.write(1, frames.START)
    stdin = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115 - nothing is to be read ahead
    asked = json.loads(stdin.readline() or b"{}")
    try:
        held = PortReservation(1, port=asked.get("port", 0))
    except LaunchError as error:
        print(error, file=sys.stderr)
        return 2
    with held, tempfile.TemporaryDirectory(prefix="tfdist-far-") as folder:
        _send(frames.HELLO, json.dumps({"port": held.ports[0], "cores": count_cores()}).encode())
        line = stdin.readline()
        return _run(json.loads(line), os.path.join(folder, "beat")) if line else 0


def _leave(number: int, frame: Any) -> NoReturn:
    raise SystemExit(128 + signal.SIGKILL)


def _run(asked: dict[str, Any], beat_path: str) -> int:
    # A mark of its own: the others of the job on this machine have agents of theirs.
    mark = f"{asked['env'][reaper.MARK_VARIABLE]}-{os.getpid()}"
    env = {**os.environ, **asked["env"], HEARTBEAT_VARIABLE: beat_path, reaper.MARK_VARIABLE: mark}
    # By way of this agent the task asks the launcher what MPI wants to know.
    own, theirs = socket.socketpair()
    if PMI_RANK in env:
        env[PMI_FD] = str(theirs.fileno())
    watcher = Reaper(mark)  # for where somebody kills this agent, as a machine short of memory may
    try:
        process = subprocess.Popen(
            asked["command"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=env,
            start_new_session=True,
            preexec_fn=_restore_signals,
            pass_fds=[theirs.fileno()],
        )
    except OSError as error:
        print(
            f"cannot start {asked['command'][0]!r} ({error.strerror}): correct the command", file=sys.stderr
        )
        watcher.dismiss()
        return 2
    theirs.close()
    watcher.add(process.pid)
    try:
        return _serve(process, beat_path, own)
    finally:
        reaper.kill_job([process.pid], mark)
        watcher.dismiss()


def _restore_signals() -> None:
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)


def _serve(process: subprocess.Popen[bytes], beat_path: str, pmi: socket.socket) -> int:
    """Passes on what the task says and what it is told, until it ends; returns its exit code."""
    selector = selectors.DefaultSelector()
    asked = pmi.makefile("rb", buffering=0)
    pipes: dict[Any, bytes] = {
        process.stdout: frames.STDOUT,
        process.stderr: frames.STDERR,
        asked: frames.PMI,
    }
    for source in (0, *pipes):
        selector.register(source, selectors.EVENT_READ)
    told = _Orders(process.pid, pmi)
    last: dict[bytes, bytes] = {}
    while process.poll() is None:
        for key, _ in selector.select(_LOOK_SECS):
            if key.fileobj != 0:
                _pass_on(selector, key.fileobj, pipes)
            elif not told.obey():
                return 128 + signal.SIGKILL
        for kind, content in ((frames.BEAT, _read(beat_path)), (frames.STATE, _state(process.pid))):
            if content != last.get(kind, b""):
                last[kind] = content
                _send(kind, content)
    signal.alarm(0)
    selector.unregister(0)
    while selector.get_map() and (ready := selector.select(_DRAIN_SECS)):
        for key, _ in ready:
            _pass_on(selector, key.fileobj, pipes)
    code = process.returncode
    return min(code, 254) if code >= 0 else 128 - code


class _Orders:
    """What the launcher says on stdin: signals for a process group, answers for its MPI, and that it is there."""

    def __init__(self, group: int, pmi: socket.socket) -> None:
        self._group = group
        self._pmi = pmi
        self._rest = b""
        signal.alarm(SILENCE_SECS)

    def obey(self) -> bool:
        """Reads and does it; False where stdin has ended."""
        data = os.read(0, _CHUNK_BYTES)
        signal.alarm(SILENCE_SECS)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in filter(None, lines):
            order = json.loads(line)
            with contextlib.suppress(OSError):  # it has ended
                if "pmi" in order:
                    self._pmi.sendall(order["pmi"].encode())
                else:
                    os.killpg(self._group, order["signal"])
        return bool(data)


def _pass_on(selector: selectors.BaseSelector, pipe: Any, kinds: dict[Any, bytes]) -> None:
    data = pipe.read(_CHUNK_BYTES)
    if data:
        _send(kinds[pipe], data)
    else:
        selector.unregister(pipe)


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


def _state(pid: int) -> bytes:
    return (read_stop_mark(pid) or "").encode()


def _send(kind: bytes, content: bytes) -> None:
    data = frames.render_frame(kind, content)
    while data:
        data = data[os.write(1, data) :]


if __name__ == "__main__":
    sys.exit(main())
