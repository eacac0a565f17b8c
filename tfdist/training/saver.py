"""Takes a fit's state at the boundaries of steps, and brings it back: in one process or on every worker alike."""

from __future__ import annotations

import collections
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import keras

from tfdist.errors import Preempted
from tfdist.training.checkpoint import Snapshot, apply_snapshot, parse_checkpoint, take_snapshot
from tfdist.training.checkpoint_dir import Checkpoints, CheckpointWriter

# What Keras's own callbacks remember: History, EarlyStopping, ReduceLROnPlateau, ModelCheckpoint. A callback of one's
# own lists the attributes in `state_names`; they must be what JSON can hold.
_STATE_NAMES = ("history", "epoch", "best", "wait", "best_epoch", "stopped_epoch", "cooldown_counter")
_log = logging.getLogger("tfdist")
# How often workers agree on what time says, in seconds: a vote is an exchange.
_VOTE_SECS = 1.0
_MAX_STEPS_BETWEEN_VOTES = 1000


class Loop(Protocol):
    """What the saver needs of a strategy's loop."""

    def snapshot_metrics(self) -> list[Any]:
        """Brings the replicas together, and returns the metrics' state so far; every process must call it."""

    def broadcast(self, content: bytes) -> bytes:
        """Returns the chief's bytes on every process."""

    def vote(self, values: list[float]) -> list[float]:
        """Returns the sums over all processes."""


class Saver:
    """When and what a fit saves.

    Every process asks it the same questions in the same order, and gets the same answers.

    Args:
        checkpoints: The folder and how often; None saves nothing.
        loop: The strategy's loop.
        model: Built.
        callbacks: Whose simple state is kept too.
        is_chief: Whether this process reads and writes.
        say: Takes the line that tells what was resumed.
    """

    def __init__(
        self,
        *,
        checkpoints: Checkpoints | None,
        loop: Loop,
        model: keras.Model,
        callbacks: keras.callbacks.CallbackList,
        is_chief: bool,
        say: Callable[[str], None],
    ) -> None:
        self._checkpoints = checkpoints
        self._loop = loop
        self._model = model
        self._callbacks = callbacks
        self._is_chief = is_chief
        self._say = say
        self._writer = None if checkpoints is None or not is_chief else CheckpointWriter(checkpoints)
        self._num_steps = 0
        self._next_vote, self._last_vote = 1, 0
        self._last_vote_at = self._last_save_at = time.monotonic()
        self._was_told = self._is_stopping = False
        self._previous_handler: Any = None

    def __enter__(self) -> Saver:
        # After the strategy was built, which puts TensorFlow's own handler in place.
        if self._checkpoints is not None and threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGTERM, self._note_signal)
        return self

    def __exit__(self, *exc_info: Any) -> None:
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)
        if self._writer is not None:
            self._writer.wait()

    def restore(self) -> Snapshot | None:
        """Brings the newest whole checkpoint back; None if there is none."""
        if self._checkpoints is None:
            return None
        newest = self._checkpoints.read_newest() if self._is_chief else None
        # From the chief to all: its folder need not be theirs, and nobody may see another checkpoint than it did.
        content = self._loop.broadcast(b"" if newest is None else newest[0])
        if not content:
            return None
        snapshot = parse_checkpoint(content, name=str(newest[1] if newest else "of the chief"))
        apply_snapshot(snapshot, self._model)
        restore_callbacks(self._callbacks, snapshot.extra.get("callbacks", {}))
        if newest is not None:
            where = f"after epoch {snapshot.epoch}" + (f" and {snapshot.step} steps" if snapshot.step else "")
            self._say(f"resumed {where} from {newest[1]}")
        return snapshot

    def is_boundary(self, step: int) -> bool:
        """Says, once a step and in order, whether the state is to be saved when it is finished.

        Args:
            step: Zero-based in its epoch.
        """
        if self._checkpoints is None:
            return False
        self._num_steps += 1
        every = self._checkpoints.every_steps
        due = every is not None and (step + 1) % every == 0
        if self._num_steps >= self._next_vote:
            due |= self._vote()
        return due

    def save(self, *, epoch: int, step: int, at_epoch_end: bool = False) -> None:
        """Saves in the background; every process must call it.

        Args:
            epoch: Epochs finished.
            step: Steps finished of the next one.
            at_epoch_end: The metrics are done with, and their state need not be kept.

        Raises:
            Preempted: If some process was told to end by SIGTERM.
        """
        if self._checkpoints is None:
            return
        if at_epoch_end:
            self._vote()
        metrics = [] if at_epoch_end else self._loop.snapshot_metrics()
        self._last_save_at = time.monotonic()
        must = at_epoch_end or self._is_stopping
        if self._writer is not None and (must or not self._writer.is_busy):
            self._write(self._writer, epoch, step, metrics)
        if self._is_stopping:
            self._leave(epoch, step)

    def _write(self, writer: CheckpointWriter, epoch: int, step: int, metrics: list[Any]) -> None:
        extra = {"callbacks": callback_states(self._callbacks)}
        snapshot = take_snapshot(self._model, epoch=epoch, step=step, metrics=metrics, extra=extra)
        if snapshot.is_finite:
            writer.write(snapshot)
        else:
            _log.warning("%s is not kept: it holds NaN or infinite numbers", snapshot.file_name)

    def _leave(self, epoch: int, step: int) -> None:
        if self._writer is not None:
            self._writer.wait()
            where = f"after epoch {epoch}" + (f" and {step} steps" if step else "")
            self._say(f"SIGTERM: the state {where} is saved; the same command with --resume goes on from it")
        self._loop.vote([0.0] * 4)  # Nobody leaves while the chief still writes.
        raise Preempted

    def _note_signal(self, number: int, frame: Any) -> None:
        del number, frame
        self._was_told = True

    def _vote(self) -> bool:
        """The workers agree whether the chief's clock or somebody's SIGTERM says that the state is to be saved now."""
        assert self._checkpoints is not None
        now, every = time.monotonic(), self._checkpoints.every_secs
        due = self._is_chief and every is not None and now - self._last_save_at >= every
        secs = max(now - self._last_vote_at, 1e-6)
        num_due, num_told, total_secs, num_voters = self._loop.vote(
            [float(due), float(self._was_told), secs, 1.0]
        )
        self._is_stopping = num_told > 0
        steps = round((self._num_steps - self._last_vote) * _VOTE_SECS * num_voters / total_secs)
        self._last_vote, self._last_vote_at = self._num_steps, now
        self._next_vote = self._num_steps + min(max(1, steps), _MAX_STEPS_BETWEEN_VOTES)
        return num_due > 0 or self._is_stopping


def callback_states(callbacks: keras.callbacks.CallbackList) -> dict[str, dict[str, Any]]:
    """Returns what callbacks remember from one epoch to the next, by class and place among those of the class."""
    return {
        key: {name: _plain(vars(callback)[name]) for name in _state_names(callback) if name in vars(callback)}
        for key, callback in _by_class(callbacks)
    }


def restore_callbacks(callbacks: keras.callbacks.CallbackList, states: dict[str, dict[str, Any]]) -> None:
    """Gives callbacks back what `callback_states` took; after `on_train_begin`, which would reset it."""
    for key, callback in _by_class(callbacks):
        for name, value in states.get(key, {}).items():
            setattr(callback, name, value)


def _by_class(callbacks: keras.callbacks.CallbackList) -> Iterator[tuple[str, Any]]:
    # Workers leave the chief's writers out of their lists: a place in the whole list would not be the same everywhere.
    seen: collections.Counter[str] = collections.Counter()
    for callback in callbacks.callbacks:
        name = type(callback).__name__
        yield f"{name} {seen[name]}", callback
        seen[name] += 1


def _state_names(callback: Any) -> Sequence[str]:
    return getattr(callback, "state_names", _STATE_NAMES)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value
