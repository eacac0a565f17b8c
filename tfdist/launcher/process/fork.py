"""Tasks forked from a launcher that has imported TensorFlow once for all of them.

Importing TensorFlow and Keras takes a process seconds, and the tasks of one machine would do it side by side. A fork
has them at once, shares their memory, and is there at once when a killed task is started again. It is sound because an
import starts nothing: no thread, no device, no server, no random state of TensorFlow's (`tests/unit/test_fork.py` holds
that). What a fork inherits besides is undone in `become`, so that a task sees what a process started anew would see.

Source: the forkserver and `set_forkserver_preload` of Python's multiprocessing, which have the same purpose.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import io
import os
import runpy
import signal
import sys
import tempfile
import threading
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from tfdist.errors import LaunchError

# Read when a library is loaded, not when it is used.
_READ_AT_IMPORT = ("OMP_NUM_THREADS", "TF_CPP_MIN_LOG_LEVEL", "TF_ENABLE_ONEDNN_OPTS")
# There where a process may use NVIDIA's driver.
_GPU_DEVICE = "/dev/nvidiactl"
# Read by the C library at a program's start: as a variable, and as a parameter of `mallopt`.
_MALLOPT = {"MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_TOP_PAD_": -2, "MALLOC_MMAP_THRESHOLD_": -3}
_MALLOPT_MMAP_MAX = -4
_MAX_INT = 2**31 - 1


class ForkedProcess:
    """A program that `can_fork` in a fork of this process: what `subprocess.Popen` is for one started anew.

    Raises:
        LaunchError: If the system has no room for another process.
    """

    stdin = None

    def __init__(self, command: Sequence[str], env: Mapping[str, str], fds: Sequence[int] = ()) -> None:
        self.returncode: int | None = None
        pipes = os.pipe(), os.pipe()
        with open(os.devnull) as nothing:
            # No handler of this process may run in the other.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            try:
                sys.stdout.flush()
                sys.stderr.flush()
                self.pid = os.fork()
                if self.pid == 0:
                    streams = [nothing.fileno(), *(writer for _, writer in pipes)]
                    os.setsid()
                    become(command, env, streams=streams, fds=fds, mask=before)
            except OSError as error:
                raise LaunchError(f"cannot start another task ({error.strerror}): free memory") from None
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                for _, writer in pipes:
                    os.close(writer)
        self.stdout, self.stderr = (io.FileIO(reader) for reader, _ in pipes)

    def wait(self) -> int:
        """Waits for its end and reaps it; returns its exit code, -n for signal n."""
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


def can_fork(command: Sequence[str], *, gpu_device: str = _GPU_DEVICE) -> bool:
    """Says whether a command can run in a fork: `python -m MODULE` or `python SCRIPT` by this interpreter, on Linux.

    Args:
        command: Program and arguments.
        gpu_device: Where it exists nothing is forked: CUDA cannot be brought through a fork, and nobody has tried
            whether TensorFlow's import leaves it alone.
    """
    is_ours = sys.platform == "linux" and len(command) > 1 and command[0] == sys.executable
    if not is_ours or os.path.exists(gpu_device):
        return False
    return not command[1].startswith("-") or command[1] == "-m" and len(command) > 2


def preload(modules: Sequence[str], env: Mapping[str, str]) -> None:
    """Imports what forks shall have, by a task's environment; what cannot be imported they themselves say best."""
    given = {name: env[name] for name in _READ_AT_IMPORT if name in env}
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        with quiet_imports(), contextlib.suppress(ImportError):
            for module in modules:
                importlib.import_module(module)
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    # A collection in a fork would write to every object, and so make a copy of the memory that is shared.
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Keeps back what TensorFlow writes while it is imported, two notes that no log level hides; not if it fails."""
    sys.stderr.flush()
    own = os.dup(2)
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except BaseException:
            kept.seek(0)
            os.write(own, kept.read())
            raise
        finally:
            os.dup2(own, 2)
            os.close(own)


def become(
    command: Sequence[str],
    env: Mapping[str, str],
    *,
    streams: Sequence[int],
    fds: Sequence[int] = (),
    mask: set[Any] | None = None,
) -> NoReturn:
    """Makes this process, just forked, one that was started by a command; never returns.

    Args:
        command: As `can_fork` takes it.
        env: Its whole environment.
        streams: The descriptors that become its stdin, stdout and stderr.
        fds: Others that stay open; all the rest are closed.
        mask: The signals to be blocked from then on.
    """
    code = 1
    try:
        _leave_signals(mask or set())
        _leave_descriptors(streams, fds)
        _take_environment(env)
        # Each would draw what its siblings draw. Python's own generator is seeded anew at each fork.
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed()
        atexit._clear()
        code = _run(command)
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        atexit._run_exitfuncs()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        # At once: above us lies the launcher, whose blocks are not ours to leave.
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(code)


def _leave_signals(mask: set[Any]) -> None:
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _leave_descriptors(streams: Sequence[int], fds: Sequence[int]) -> None:
    copies = [os.dup(fd) for fd in streams]  # one of them may have the number of another's place
    for place, copy in enumerate(copies):
        os.dup2(copy, place, inheritable=True)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in fds:
            with contextlib.suppress(OSError):  # that of the folder itself
                os.close(int(name))
    for fd in fds:
        os.set_inheritable(fd, True)
    for place, name in ((1, "stdout"), (2, "stderr")):
        raw = io.FileIO(place, "w", closefd=False)
        before = getattr(sys, name)
        text = io.TextIOWrapper(
            io.BufferedWriter(raw), encoding=before.encoding, errors=before.errors, line_buffering=True
        )
        setattr(sys, name, text)
        setattr(sys, f"__{name}__", text)
    sys.stdin = sys.__stdin__ = io.TextIOWrapper(  # type: ignore[misc]
        io.BufferedReader(io.FileIO(0, closefd=False)), encoding=sys.stdout.encoding
    )


def _take_environment(env: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)
    _show_environment(env)
    settings = {name: int(env[name]) for name in _MALLOPT if env.get(name, "").isdecimal()}
    if settings:
        mallopt = ctypes.CDLL(None).mallopt
        for name, value in settings.items():
            mallopt(_MALLOPT[name], min(value, _MAX_INT))
        if settings.get("MALLOC_MMAP_THRESHOLD_", 0) > _MAX_INT:
            mallopt(_MALLOPT_MMAP_MAX, 0)


def _show_environment(env: Mapping[str, str]) -> None:
    """Makes /proc/PID/environ tell the truth, by which `tfdist.launcher.process.reaper` finds what is left of a job.

    The kernel shows the memory in which a program's environment lay when it was started, which nobody reads any more
    after `_take_environment`. What does not fit there is not shown.
    """
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    start, end = int(fields[47]), int(fields[48])
    first = sorted(env, key=lambda name: not name.startswith("TFDIST_") and name != "TF_CONFIG")
    text = b"".join(os.fsencode(f"{name}={env[name]}") + b"\0" for name in first)
    if start:
        ctypes.memmove(start, text[: end - start].ljust(end - start, b"\0"), end - start)


def _run(command: Sequence[str]) -> int:
    """Runs the program as Python's own command line would, and returns its exit code."""
    try:
        if command[1] == "-m":
            sys.argv, sys.path[0] = list(command[2:]), os.getcwd()
            runpy.run_module(command[2], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = list(command[1:]), os.path.dirname(os.path.realpath(command[1]))
            runpy.run_path(command[1], run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:
        trace = _find_own_trace(error.__traceback__)
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _find_own_trace(trace: types.TracebackType | None) -> types.TracebackType | None:
    """Leaves out how the program was started."""
    while trace is not None and trace.tb_frame.f_code.co_filename in (
        __file__,
        runpy.__file__,
        "<frozen runpy>",
    ):
        trace = trace.tb_next
    return trace
