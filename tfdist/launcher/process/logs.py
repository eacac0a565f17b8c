"""What tasks print: cut into lines, shown with a prefix, and kept whole in files."""

import collections
import contextlib
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, TextIO

from tfdist.cluster.spec import Task
from tfdist.errors import ConfigError

TAIL_LINES = 20
REFRESH_SECS = 1.0
MAX_LINE_BYTES = 16 * 2**20
_COLOURS = (36, 32, 35, 34, 33, 96, 92, 95, 94)


class LineSplitter:
    """Cuts a stream of bytes into the lines that a person should see.

    A progress bar that redraws itself with carriage returns is seen at most once every `REFRESH_SECS`, and once
    more in the state in which it ends.
    """

    def __init__(self) -> None:
        self._parts: list[bytes] = []  # the line that has not ended yet
        self._size = 0
        self._shown: bytes | None = None  # the state of the unfinished line that was handed out last
        self._shown_at = float("-inf")

    def feed(self, data: bytes, now: float) -> list[bytes]:
        """Takes what was read, cut anywhere, at a clock's reading in seconds; returns lines without their ends."""
        self._parts.append(data)
        self._size += len(data)
        if b"\n" not in data and b"\r" not in data and self._size < MAX_LINE_BYTES:
            return []  # joining only at line ends keeps very long lines linear
        *complete, rest = b"".join(self._parts).split(b"\n")
        lines = []
        for line in complete:
            lines += self._end_line(line)
        if b"\r" in rest:
            state, _, fresh = rest.rpartition(b"\r")
            state = _visible(state)
            rest = state + b"\r" + fresh
            if state and state != self._shown and now - self._shown_at >= REFRESH_SECS:
                lines.append(state)
                self._shown, self._shown_at = state, now
        if len(rest) >= MAX_LINE_BYTES:
            lines += self._end_line(rest)
            rest = b""
        self._parts, self._size = [rest], len(rest)
        return lines

    def finish(self) -> list[bytes]:
        """Ends the stream; returns the last line, if it had no end of its own."""
        rest = b"".join(self._parts)
        self._parts, self._size = [], 0
        return self._end_line(rest) if rest else []

    def _end_line(self, line: bytes) -> list[bytes]:
        text, shown = _visible(line), self._shown
        self._shown = None
        return [] if shown is not None and text == shown else [text]


class TaskOutput:
    """Everything one task prints, on both of its streams; `log` keeps the bytes as they are."""

    def __init__(self, task: Task, log: BinaryIO | None) -> None:
        self.task = task
        self.tail: collections.deque[bytes] = collections.deque(maxlen=TAIL_LINES)
        self._log = log
        self._splitters = {"stdout": LineSplitter(), "stderr": LineSplitter()}

    def receive(self, stream: str, data: bytes) -> list[bytes]:
        """Takes what `stdout` or `stderr` brought, nothing at its end; returns lines to be shown."""
        splitter = self._splitters[stream]
        if data:
            self._keep(data)
            lines = splitter.feed(data, time.monotonic())
        else:
            lines = splitter.finish()
        self.tail.extend(lines)
        return lines

    def close(self) -> None:
        """Closes the log file."""
        if self._log is not None:
            self._log.close()

    def _keep(self, data: bytes) -> None:
        if self._log is None:
            return
        try:
            self._log.write(data)
        except OSError as error:  # a full disk must not end the training that is being watched
            with contextlib.suppress(OSError):
                say(f"the log of {self.task} ends here: {error}")
            self._log.close()
            self._log = None


class Display:
    """Shows lines of many tasks on this process's stdout and stderr, each behind the name of its task.

    NO_COLOR and TERM of `env` say whether in colours.
    """

    def __init__(self, env: Mapping[str, str]) -> None:
        self.broken = False
        self._ended: set[str] = set()
        self.last_shown: bytes | None = None
        plain = bool(env.get("NO_COLOR")) or env.get("TERM") == "dumb"
        self._coloured = {
            name: not plain and stream.isatty()
            for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr))
        }
        self._colours: dict[Task, int] = {}

    def show(self, task: Task, stream: str, lines: list[bytes]) -> None:
        """Writes lines, without their ends, of a task; a reader that has gone away is remembered in `broken`."""
        if not lines or self.broken or stream in self._ended:
            return
        self.last_shown = lines[-1]
        colour = self._colours.setdefault(task, _COLOURS[len(self._colours) % len(_COLOURS)])
        prefix = render_prefix(task, colour=colour if self._coloured[stream] else None)
        try:
            _write(getattr(sys, stream), b"".join(prefix + line + b"\n" for line in lines))
        except OSError as error:
            # What is still buffered would raise again when the interpreter ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), getattr(sys, stream).fileno())
            if isinstance(error, BrokenPipeError):
                self.broken = True
                return
            self._ended.add(stream)  # a full disk must not end the training that is being watched
            with contextlib.suppress(OSError):
                say(f"{stream} ends here: {error}")


def say(text: str) -> None:
    """Prints a line of the launcher's own."""
    print(f"tfdist.launch: {text}", file=sys.stderr, flush=True)


def render_prefix(task: Task, *, colour: int | None) -> bytes:
    """Makes what stands before each line of a task, as in `[worker:1] `, in a colour of ANSI's number."""
    prefix = f"[{task}]"
    return f"\x1b[{colour}m{prefix}\x1b[0m ".encode() if colour is not None else f"{prefix} ".encode()


def log_path(run_dir: str, task: Task) -> Path:
    """Says where the whole output of a task is kept, as in `run_dir/logs/worker-1.log`."""
    return Path(run_dir) / "logs" / f"{task.type}-{task.index}.log"


def open_log(run_dir: str, task: Task) -> BinaryIO:
    """Opens a task's log; what earlier launches left there stays, above a separating line.

    It is unbuffered, so that it can be followed. The folder of the run is made if missing.

    Raises:
        ConfigError: If the folder or file cannot be written.
    """
    path = log_path(run_dir, task)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = path.open("ab", buffering=0)
    except OSError as error:
        raise ConfigError(
            f"run_dir {run_dir!r} cannot be written ({error.strerror}: {error.filename}): choose another --run_dir"
        ) from None
    if log.tell():
        with contextlib.suppress(OSError):  # a full disk
            log.write(f"\n--- launched again {time.strftime('%Y-%m-%d %H:%M:%S')} ---\n".encode())
    return log


def _visible(line: bytes) -> bytes:
    """What a terminal would show of a line with carriage returns, roughly: the part that was drawn last."""
    return next((part for part in reversed(line.split(b"\r")) if part), b"")


def _write(stream: TextIO, data: bytes) -> None:
    if hasattr(stream, "buffer"):
        stream.flush()
        stream.buffer.write(data)
    else:  # a notebook or a test has put its own text stream there
        stream.write(data.decode(errors="replace"))
    stream.flush()
