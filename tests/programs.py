"""Runs Python programs for the tests, each in a fork of one process that has imported TensorFlow and Keras.

A program is what `python -m MODULE ARGS` or `python SCRIPT ARGS` would be: a process of its own with its own
environment, folder, output and exit code, that can be killed by its id; only the seconds of importing are paid once a
test session. The launcher forks its tasks in the same way (`tfdist.launcher.process.fork`): a whole cluster is there at
once.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = str(Path(__file__).parents[1])
_MODULES = (
    "tensorflow",
    "keras",
    "tfdist.commands.execute",
    "tfdist.runtime.server",
    "tfdist.api.initialize",
    "tensorflow_datasets",
    "sklearn.datasets",
)
_server = None


class Program:
    """A started program; what tests need of `subprocess.Popen`."""

    def __init__(self, args, *, cwd=None, env=None, stdout=None, stderr=None):
        self.args = [sys.executable, *map(str, args)]
        self.returncode = None
        request = {
            "command": self.args,
            "cwd": os.fspath(cwd or os.getcwd()),
            "env": dict(os.environ if env is None else env),
        }
        reader, writer = os.pipe()
        with open(os.devnull) as nothing:
            streams = [nothing.fileno(), _number(stdout, 1), _number(stderr, 2)]
            if stderr == subprocess.STDOUT:
                streams[2] = streams[1]
            near, far = socket.socketpair()
            with near, far:
                socket.send_fds(_serve(), [b"run"], [far.fileno(), writer, *streams])
                os.close(writer)
                near.sendall(json.dumps(request).encode() + b"\n")
                self._ended = os.fdopen(reader, "rb", buffering=0)
                self.pid = int(self._ended.readline())

    def poll(self):
        """Returns its exit code, -n for signal n; None while it runs."""
        if self.returncode is None and select.select([self._ended], [], [], 0)[0]:
            self.returncode = int(self._ended.readline())
            self._ended.close()
        return self.returncode

    def wait(self, timeout=None):
        """Waits for its end; returns its exit code."""
        if self.returncode is None and not select.select([self._ended], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.poll()

    def send_signal(self, number):
        """Sends a signal, if it runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        """Tells it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self):
        """Ends it, and waits for its end."""
        self.send_signal(signal.SIGKILL)
        self.wait()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.wait()


def run(args, *, cwd=None, env=None, timeout=280):
    """Runs a program to its end: `subprocess.run([sys.executable, *args], capture_output=True, text=True, …)`."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        program = Program(args, cwd=cwd, env=env, stdout=out, stderr=err)
        try:
            program.wait(timeout)
        except BaseException:
            program.kill()
            raise
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return subprocess.CompletedProcess(program.args, program.returncode, *texts)


def stop():
    """Ends the process that forks; a later program starts another."""
    global _server
    if _server is not None:
        _server[0].close()
        _server[1].wait()
        _server = None


def server_pid():
    """Returns the id of the process that forks, 0 if there is none."""
    return _server[1].pid if _server else 0


def _number(stream, own):
    if stream is None or stream == subprocess.STDOUT:
        return own
    return stream if isinstance(stream, int) else stream.fileno()


def _serve():
    global _server
    if _server is None:
        near, far = socket.socketpair()
        with far:
            path = os.pathsep.join([REPOSITORY, os.environ.get("PYTHONPATH", "")])
            process = subprocess.Popen(
                [sys.executable, __file__, str(far.fileno())],
                pass_fds=[far.fileno()],
                env={**os.environ, "PYTHONPATH": path},
            )
        _server = near, process
    return _server[0]


def _main(number):
    """The process that forks: one more process for each program, which starts it and says when it has ended."""
    from tfdist.launcher.process.fork import preload

    preload(_MODULES, os.environ)
    # Ctrl-C is pytest's to answer.
    inherited = signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    requests = socket.socket(fileno=number)
    while True:
        message, fds, _, _ = socket.recv_fds(requests, 3, 5)
        if not message:
            return
        if os.fork() == 0:
            requests.close()
            signal.signal(signal.SIGINT, inherited)
            _start(*fds)
        for fd in fds:
            os.close(fd)


def _start(asker, status, *streams):
    from tfdist.launcher.process.fork import become

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with socket.socket(fileno=asker) as asking, asking.makefile("rb") as lines:
        request = json.loads(lines.readline())
    pid = os.fork()
    if pid == 0:
        os.chdir(request["cwd"])
        paths = request["env"].get("PYTHONPATH", "").split(os.pathsep)
        sys.path[1:1] = [path for path in paths if path and path not in sys.path[1:]]
        become(request["command"], request["env"], streams=streams)
    for fd in streams:
        os.close(fd)
    os.write(status, b"%d\n" % pid)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        os.write(status, b"%d\n" % code)
    os._exit(0)


if __name__ == "__main__":
    _main(int(sys.argv[1]))
