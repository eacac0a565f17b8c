"""A task's record of its own progress: a small file that the launcher reads to tell work from a hang."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

VARIABLE = "TFDIST_HEARTBEAT"  # Where the launcher wants the file.
# At this signal a task writes the stacks of its threads to stderr. Not SIGUSR1: schedulers announce the end with it.
DUMP_SIGNAL = signal.SIGUSR2
_SIZE_BYTES = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beat:
    """What a task has done last.

    Attributes:
        state: `started` (it can dump its stacks), `preparing` (its first step is being compiled), `working` (steps
            follow each other), `busy` (between two steps a callback or a checkpoint takes its time), `resting` (the
            program does something of its own, for as long as it likes), `waiting` (ready to join the others) or `told`
            (it serves others, and SIGTERM told it to end).
        step: Optimizer steps since the run began.
        num_beats: How often it has written; one that works writes more and more.
        begun: When the record began, in nanoseconds of the machine's monotonic clock: anew in each cluster it joins.
    """

    state: str
    step: int = 0
    num_beats: int = 0
    begun: int = 0


def render_beat(beat: Beat) -> bytes:
    """Renders a record, always of the same size, so that writing one over another leaves nothing of it."""
    return f"{beat.state} {beat.step} {beat.num_beats} {beat.begun}".ljust(_SIZE_BYTES - 1).encode() + b"\n"


def parse_beat(content: bytes) -> Beat | None:
    """Undoes `render_beat`; None for anything else, such as a file that is not written yet."""
    words = content.decode(errors="replace").split()
    if len(content) != _SIZE_BYTES or len(words) != 4 or not "".join(words[1:]).isdigit():
        return None
    step, num_beats, begun = map(int, words[1:])
    return Beat(state=words[0], step=step, num_beats=num_beats, begun=begun)


def read_beat(path: str | Path) -> Beat | None:
    """Returns a task's record, or None while it has none."""
    try:
        return parse_beat(Path(path).read_bytes())
    except OSError:
        return None


class Heartbeat:
    """Keeps this task's record in a file; without a launcher that reads it, it does nothing."""

    def __init__(self, path: str | None) -> None:
        self._fd: int | None = None
        self._step = self._num_beats = 0
        self._begun = time.monotonic_ns()
        if path is None:
            return
        with contextlib.suppress(OSError):  # a launcher that is gone must not end the work
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            faulthandler.register(DUMP_SIGNAL, all_threads=True)
        self._write("started")

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Heartbeat:
        """Returns the one that the launcher has asked for."""
        return cls(environ.get(VARIABLE))

    def beat(self, step: int | None = None) -> None:
        """Tells that a step is done; a few microseconds.

        Args:
            step: Optimizer steps since the run began; None where none was made, as in evaluation.
        """
        if step is not None:
            self._step = step
        self._write("working")

    def prepare(self) -> None:
        """Tells that the first step comes next, which TensorFlow may compile for long."""
        self._write("preparing")

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Tells that no step is made meanwhile, here nor by those that wait for this task."""
        self._write("busy")
        yield
        self._write("working")

    def rest(self) -> None:
        """Tells that no steps follow for now."""
        self._write("resting")

    def wait(self) -> None:
        """Tells that this task could join the others."""
        self._write("waiting")

    def tell(self) -> None:
        """Tells that SIGTERM came to a task that serves: the one that runs the program is to save first."""
        self._write("told")

    def _write(self, state: str) -> None:
        if self._fd is None:
            return
        self._num_beats += 1
        beat = Beat(state=state, step=self._step, num_beats=self._num_beats, begun=self._begun)
        with contextlib.suppress(OSError):
            os.pwrite(self._fd, render_beat(beat), 0)
