"""Takes a fit's state at the boundaries of steps, and brings it back: in one process or on every worker alike."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import keras
import numpy as np
import tensorflow as tf

from tfdist import keras_internals
from tfdist.cluster.membership import Membership
from tfdist.errors import Preempted, Regroup
from tfdist.runtime.strategies import is_peer_loss
from tfdist.training.checkpoint.callback_state import restore_callbacks, take_callbacks
from tfdist.training.checkpoint.input_position import check_order
from tfdist.training.checkpoint.snapshot import (
    Snapshot,
    apply_snapshot,
    parse_checkpoint,
    read_checkpoint,
    render_checkpoint,
    take_snapshot,
)
from tfdist.training.checkpoint.store import Checkpoints, CheckpointWriter
from tfdist.training.plan import Place

_log = logging.getLogger("tfdist")
# How often workers agree on what time says, in seconds: a all_reduce_sum is an exchange.
_VOTE_SECS = 1.0
_MAX_STEPS_BETWEEN_VOTES = 1000
# Of a checkpoint's file that crosses at once: all of it would be in memory several times.
_SENT_BYTES = 64 * 2**20


class Loop(Protocol):
    """What the saver, and whoever goes back to what it saved, need of a strategy's loop."""

    @property
    def num_readers(self) -> int:
        """Processes that run the program, each of which reads the data."""

    def start(self) -> None:
        """Prepares for training with the weights that the model has now."""

    def snapshot_metrics(self) -> list[Any]:
        """Brings the replicas together, and returns the metrics' state so far; every process must call it."""

    def snapshot_sync(self) -> dict[str, np.ndarray]:
        """Returns what a checkpoint must hold of the way in which workers share, by name."""

    def restore_sync(self, arrays: dict[str, np.ndarray]) -> None:
        """Takes what `snapshot_sync` returned."""

    def snapshot_input(self) -> bytes:
        """Returns where the input stands; empty where that cannot be saved."""

    def broadcast(self, content: bytes, *, source: int = 0) -> bytes:
        """Returns the bytes of one process, by default the chief's, on every process."""

    @property
    def metric_origins(self) -> list[np.ndarray]:
        """What the processes' parts of the metrics' state are counted from."""

    def own_metrics(self) -> list[Any]:
        """Returns this process's part of the metrics' state, from its origin."""

    def all_reduce_sum(self, values: list[float]) -> list[float]:
        """Returns the sums over all processes."""

    def meet(self) -> None:
        """Returns once every process has called it, and needs nothing of the others for what came before."""


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
        num_steps: Of an epoch; None if unknown.
        order: What the order of an epoch's examples follows from; see `check_order`.
        members: Tells when the cluster is to be formed anew; None if it never is.
        carried: What this process brings along from the cluster before; None if it was not in it.

    Attributes:
        place: Where in the data the epoch began that is trained on.
        kept: What else a snapshot's `extra` holds, by name, and what gives it, plain enough for JSON.
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
        num_steps: int | None = None,
        order: Mapping[str, Any] | None = None,
        members: Membership | None = None,
        carried: Snapshot | None = None,
    ) -> None:
        self._steps_per_epoch = num_steps
        self._order = dict(order or {})
        self._members = members if num_steps is not None else None
        self._carried = carried
        self._epoch = self._step = 0
        self.place = Place(0)
        self.kept: dict[str, Callable[[], Any]] = {}
        self._counted = 0
        self._counted_metrics: list[Any] = []
        self._is_regrouping = False
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
        self._was_told = self._is_stopping = self._has_told_of_slow_writing = False
        self._previous_handler: Any = None

    def __enter__(self) -> Saver:
        # After the strategy was built, which puts TensorFlow's own handler in place.
        if self._checkpoints is not None and threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGTERM, self._note_signal)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)
        if self._writer is not None and error is None:
            self._writer.wait()
        elif self._writer is not None:
            with contextlib.suppress(Exception):  # The error that is on its way says more.
                self._writer.wait()
        if self._members is not None and isinstance(error, tf.errors.OpError) and is_peer_loss(error):
            raise Regroup(self._rescue()) from error

    @property
    def is_saving(self) -> bool:
        """Whether there are checkpoints."""
        return self._checkpoints is not None

    def restore(self) -> Snapshot | None:
        """Brings back the newest whole checkpoint, or what the members of a re-formed cluster carry; None: nothing.

        Raises:
            ConfigError: If it is of another model, or its place in the data is another now.
        """
        snapshot: Snapshot | None
        path: Path | None = None
        if self._members is not None:
            self._counted_metrics = [np.zeros_like(metric) for metric in self._loop.own_metrics()]
        if self._members is not None and self._members.generation > 0:
            snapshot = self._agree()
            apply_snapshot(snapshot, self._model)
        else:
            snapshot, path = self._apply_newest()
        if snapshot is not None:
            # An epoch of fewer steps than the data ends inside a pass.
            check_order(
                snapshot.extra.get("order", {}), self._order, step=snapshot.place.step + snapshot.step
            )
            self._go_on_from(snapshot)
        if snapshot is not None and path is not None:
            where = f"after epoch {snapshot.epoch}" + (f" and {snapshot.step} steps" if snapshot.step else "")
            why = self._checkpoints.why if self._checkpoints is not None else ""
            self._say(f"resumed {where} from {path}" + (f": {why}" if why else ""))
        return snapshot

    def go_back(self) -> Snapshot | None:
        """Brings the weights of the newest whole checkpoint back, in the middle of a run; None if there is none.

        Callbacks keep what they have seen since. Every process must call it.
        """
        if self._writer is not None:
            self._writer.wait()
        return self._apply_newest()[0]

    def _apply_newest(self) -> tuple[Snapshot | None, Path | None]:
        if self._checkpoints is None:
            return None, None
        newest = self._checkpoints.read_newest() if self._is_chief else None
        snapshot, path = newest or (None, None)
        with contextlib.ExitStack() as stack:
            if self._loop.num_readers > 1:
                # From the chief to all: its folder need not be theirs, and nobody may see another than it did.
                copy = stack.enter_context(self._copy_of(path))
                snapshot = read_checkpoint(copy) if copy is not None else snapshot
            if snapshot is not None:
                apply_snapshot(snapshot, self._model)
                self._loop.restore_sync(snapshot.arrays)
        return snapshot, path

    @contextlib.contextmanager
    def _copy_of(self, path: Path | None) -> Iterator[Path | None]:
        """Gives every process but the chief a copy of the chief's file, block by block; None where it has none."""
        (size,) = self._loop.all_reduce_sum([float(path.stat().st_size) if path is not None else 0.0])
        if size == 0:
            yield None
            return
        with contextlib.ExitStack() as stack:
            copy = None
            file: Any
            if path is not None:
                file = stack.enter_context(path.open("rb"))
            else:
                file = stack.enter_context(tempfile.NamedTemporaryFile(suffix=".npz"))
                copy = Path(file.name)
            for _ in range(0, int(size), _SENT_BYTES):
                block = self._loop.broadcast(file.read(_SENT_BYTES) if path is not None else b"")
                if copy is not None:
                    file.write(block)
            if copy is not None:
                file.flush()
            yield copy

    def _go_on_from(self, snapshot: Snapshot) -> None:
        restore_callbacks(self._callbacks, snapshot.extra.get("callbacks", {}), snapshot.arrays)
        self._epoch, self._step, self._counted = snapshot.epoch, snapshot.step, self._count()
        if self._members is not None and snapshot.metrics and self._is_chief:
            # The first replica's; the others have added nothing.
            origins = self._loop.metric_origins
            self._counted_metrics = [m - o for m, o in zip(snapshot.metrics, origins, strict=True)]

    def _agree(self) -> Snapshot:
        """Gives every member the state of the one that came furthest, which may be a step ahead of the others."""
        assert self._members is not None
        own, rank = self._carried, self._members.rank
        steps = [0.0] * self._members.num_members
        if own is not None:
            steps[rank] = 1.0 + own.epoch * (self._steps_per_epoch or 0) + own.step
        steps = self._loop.all_reduce_sum(steps)
        source = steps.index(max(steps))
        content = render_checkpoint(own) if own is not None and rank == source else b""
        snapshot = parse_checkpoint(self._loop.broadcast(content, source=source), name="of a member")
        if not snapshot.extra.get("metrics_are_parts"):
            return snapshot
        # What each has counted itself; the share of those that are gone is gone with them.
        parts = self._counted_metrics if own is None else own.metrics
        if not parts:
            return snapshot
        flat = np.concatenate([np.ravel(part) for part in parts])
        sums = np.split(
            np.array(self._loop.all_reduce_sum(flat.tolist())),
            np.cumsum([np.size(part) for part in parts])[:-1],
        )
        metrics = [
            origin + np.reshape(total, np.shape(part)).astype(part.dtype)
            for origin, total, part in zip(self._loop.metric_origins, sums, parts, strict=True)
        ]
        return dataclasses.replace(snapshot, metrics=metrics)

    def _rescue(self) -> Snapshot:
        """Takes the state after the last step that this process has finished; the others cannot be asked any more."""
        has_moved = self._count() > self._counted
        step = self._step + has_moved
        # Metrics may have moved in a step that the weights have not made.
        metrics = self._loop.own_metrics() if has_moved else self._counted_metrics
        return self._take(self._epoch, step, metrics, metrics_are_parts=True)

    def _take(
        self, epoch: int, step: int, metrics: list[Any], *, input_state: bytes = b"", **extra: Any
    ) -> Snapshot:
        states, arrays = take_callbacks(self._callbacks)
        config = {} if self._checkpoints is None else dict(self._checkpoints.config)
        return take_snapshot(
            self._model,
            epoch=epoch,
            step=step,
            metrics=metrics,
            extra={
                "callbacks": states,
                "config": config,
                "order": self._order,
                **extra,
                **{name: state() for name, state in self.kept.items()},
                "place": dataclasses.astuple(self.place),
            },
            arrays={**arrays, **self._loop.snapshot_sync()},
            input_state=input_state,
            # The variables are gone before a cluster is formed anew.
            outlives_variables=self._members is not None,
        )

    def _count(self) -> int:
        optimizer = self._model.optimizer
        return 0 if optimizer is None else int(keras_internals.batch_counter(optimizer).numpy())

    def is_due(self, step: int) -> bool:
        """Tells whether a checkpoint follows zero-based `step` of an epoch by its number."""
        every = None if self._checkpoints is None else self._checkpoints.every_steps
        return every is not None and (step + 1) % every == 0

    def is_boundary(self, step: int) -> bool:
        """Says, once a step and in order, whether the state is to be saved when it is finished.

        Args:
            step: Zero-based in its epoch.
        """
        if self._checkpoints is None:
            return False
        self._num_steps += 1
        if self._members is not None:
            self._step = step + 1
            self._counted, self._counted_metrics = self._count(), self._loop.own_metrics()
        due = self.is_due(step)
        if self._num_steps >= self._next_vote:
            due |= self._all_reduce_sum()
        return due

    def save(self, *, epoch: int, step: int, at_epoch_end: bool = False) -> None:
        """Saves in the background; every process must call it.

        Args:
            epoch: Epochs finished.
            step: Steps finished of the next one.
            at_epoch_end: The metrics are done with, and their state need not be kept.

        Raises:
            Preempted: If some process was told to end by SIGTERM.
            Regroup: If the cluster is to be formed anew.
        """
        if self._checkpoints is None:
            return
        if at_epoch_end:
            self._all_reduce_sum()
            self._epoch, self._step = epoch, step
            self._counted_metrics = [np.zeros_like(metric) for metric in self._counted_metrics]
        metrics = [] if at_epoch_end else self._loop.snapshot_metrics()
        self._last_save_at = time.monotonic()
        must = at_epoch_end or self._is_stopping
        if self._writer is not None and self._writer.is_busy and not must:
            self._tell_of_slow_writing(epoch, step)
        elif self._writer is not None:
            # At an epoch's end too where the next one goes on with the same pass.
            is_inside = not at_epoch_end or self.place.step > 0
            input_state = self._loop.snapshot_input() if is_inside else b""
            self._writer.write(self._take(epoch, step, metrics, input_state=input_state))
        if self._is_stopping:
            self._leave(epoch, step)
        if self._is_regrouping:
            self._loop.meet()  # Nobody leaves while another still takes part in the exchange before.
            raise Regroup(self._take(epoch, step, metrics))

    def _tell_of_slow_writing(self, epoch: int, step: int) -> None:
        if not self._has_told_of_slow_writing:
            self._has_told_of_slow_writing = True
            self._say(
                f"no checkpoint after epoch {epoch} and {step} steps, nor later ones like it: the one before is still "
                "being written; save less often, or to a faster disk"
            )

    def _leave(self, epoch: int, step: int) -> None:
        if self._writer is not None:
            reason = self._writer.wait()
            where = f"after epoch {epoch}" + (f" and {step} steps" if step else "")
            if reason:
                self._say(
                    f"SIGTERM: the state {where} could NOT be saved ({reason}); the same command with --resume goes on "
                    "from the checkpoint before"
                )
            else:
                self._say(
                    f"SIGTERM: the state {where} is saved; the same command with --resume goes on from it"
                )
        self._loop.meet()  # Nobody leaves while the chief still writes.
        raise Preempted

    def _note_signal(self, number: int, frame: Any) -> None:
        del number, frame
        self._was_told = True

    def _all_reduce_sum(self) -> bool:
        """The workers agree whether the chief's clock or somebody's SIGTERM says that the state is to be saved now."""
        assert self._checkpoints is not None
        now, every = time.monotonic(), self._checkpoints.every_secs
        due = self._is_chief and every is not None and now - self._last_save_at >= every
        secs = max(now - self._last_vote_at, 1e-6)
        has_news = self._members is not None and self._members.has_news
        num_due, num_told, num_with_news, total_secs, num_voters = self._loop.all_reduce_sum(
            [float(due), float(self._was_told), float(has_news), secs, 1.0]
        )
        self._is_stopping, self._is_regrouping = num_told > 0, num_with_news > 0
        steps = round((self._num_steps - self._last_vote) * _VOTE_SECS * num_voters / total_secs)
        self._last_vote, self._last_vote_at = self._num_steps, now
        self._next_vote = self._num_steps + min(max(1, steps), _MAX_STEPS_BETWEEN_VOTES)
        return num_due > 0 or self._is_stopping or self._is_regrouping
