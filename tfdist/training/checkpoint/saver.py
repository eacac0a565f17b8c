"""Takes a fit's state at the boundaries of steps, and brings it back: in one process or on every worker alike."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from tfdist.cluster.membership import Membership
from tfdist.errors import Preempted, Regroup
from tfdist.runtime.strategies import is_peer_loss
from tfdist.training.checkpoint.callback_state import restore_callbacks, take_callbacks
from tfdist.training.checkpoint.member import Member
from tfdist.training.checkpoint.owners import sharing_state
from tfdist.training.checkpoint.snapshot import Snapshot, apply_snapshot, read_checkpoint, take_snapshot
from tfdist.training.checkpoint.store import Checkpoints, CheckpointWriter
from tfdist.training.checkpoint.vote import Vote
from tfdist.training.input_position import check_order
from tfdist.training.model_loop import Loop
from tfdist.training.plan import Place

_log = logging.getLogger("tfdist")
# Of a checkpoint's file that crosses at once: all of it would be in memory several times.
_SENT_BYTES = 64 * 2**20


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
        self.place = Place(0)
        self.kept: dict[str, Callable[[], Any]] = {}
        self._checkpoints = checkpoints
        self._loop = loop
        self._model = model
        self._callbacks = callbacks
        self._say = say
        self._order = dict(order or {})
        self._writer = None if checkpoints is None or not is_chief else CheckpointWriter(checkpoints)
        self._has_told_of_slow_writing = False
        self._member: Member | None = None
        if members is not None and num_steps is not None:
            self._member = Member(
                membership=members,
                carried=carried,
                loop=loop,
                model=model,
                steps_per_epoch=num_steps,
                is_chief=is_chief,
            )
        member = self._member
        self._vote = Vote(
            every_secs=None if checkpoints is None else checkpoints.every_secs,
            is_chief=is_chief,
            has_news=lambda: member is not None and member.membership.has_news,
            all_reduce_sum=loop.all_reduce_sum,
        )

    def __enter__(self) -> Saver:
        if self.is_saving:
            self._vote.__enter__()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._vote.__exit__()
        if self._writer is not None and error is None:
            self._writer.wait()
        elif self._writer is not None:
            with contextlib.suppress(Exception):  # The error that is on its way says more.
                self._writer.wait()
        if self._member is not None and isinstance(error, tf.errors.OpError) and is_peer_loss(error):
            # The others cannot be asked any more.
            raise Regroup(self._take(*self._member.rescue(), metrics_are_parts=True)) from error

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
        if self._member is not None:
            self._member.begin()
        if self._member is not None and self._member.membership.generation > 0:
            snapshot = self._member.agree()
            apply_snapshot(snapshot, self._model)
        else:
            snapshot, path = self._apply_newest()
        if snapshot is not None:
            # An epoch of fewer steps than the data ends inside a pass.
            check_order(
                snapshot.extra.get("order", {}), self._order, step=snapshot.place.step + snapshot.step
            )
            restore_callbacks(self._callbacks, snapshot.extra.get("callbacks", {}), snapshot.arrays)
            if self._member is not None:
                self._member.go_on_from(snapshot)
        if snapshot is not None and path is not None:
            why = self._checkpoints.why if self._checkpoints is not None else ""
            where = _render_place(snapshot.epoch, snapshot.step)
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
        newest = self._checkpoints.read_newest() if self._writer is not None else None
        snapshot, path = newest or (None, None)
        with contextlib.ExitStack() as stack:
            if self._loop.num_readers > 1:
                # From the chief to all: its folder need not be theirs, and nobody may see another than it did.
                copy = stack.enter_context(_copy_to_all(path, self._loop))
                snapshot = read_checkpoint(copy) if copy is not None else snapshot
            if snapshot is not None:
                apply_snapshot(snapshot, self._model)
                self._loop.restore_sync(snapshot.arrays)
        return snapshot, path

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
            outlives_variables=self._member is not None,
        )

    def is_due(self, step: int) -> bool:
        """Tells whether a checkpoint follows zero-based `step` of an epoch by its number."""
        every = None if self._checkpoints is None else self._checkpoints.every_steps
        return every is not None and (step + 1) % every == 0

    def is_boundary(self, step: int) -> bool:
        """Says, once a step and in order, whether the state is to be saved when zero-based `step` is finished."""
        if self._checkpoints is None:
            return False
        if self._member is not None:
            self._member.note_step(step + 1)
        return self._vote.count_step() or self.is_due(step)

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
            self._vote.hold()
            if self._member is not None:
                self._member.note_epoch(epoch)
        metrics = [] if at_epoch_end else self._loop.snapshot_metrics()
        self._vote.note_save()
        must = at_epoch_end or self._vote.is_stopping
        with sharing_state(self._model):
            if self._writer is not None and self._writer.is_busy and not must:
                self._tell_of_slow_writing(epoch, step)
            elif self._writer is not None:
                # At an epoch's end too where the next one goes on with the same pass.
                is_inside = not at_epoch_end or self.place.step > 0
                input_state = self._loop.snapshot_input() if is_inside else b""
                self._writer.write(self._take(epoch, step, metrics, input_state=input_state))
        if self._vote.is_stopping:
            self._leave(epoch, step)
        if self._vote.is_regrouping:
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
            where = _render_place(epoch, step)
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


def _render_place(epoch: int, step: int) -> str:
    return f"after epoch {epoch}" + (f" and {step} steps" if step else "")


@contextlib.contextmanager
def _copy_to_all(path: Path | None, loop: Loop) -> Iterator[Path | None]:
    """Gives every process but the chief a copy of the chief's file, block by block; None where it has none."""
    (size,) = loop.all_reduce_sum([float(path.stat().st_size) if path is not None else 0.0])
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
            block = loop.broadcast(file.read(_SENT_BYTES) if path is not None else b"")
            if copy is not None:
                file.write(block)
        if copy is not None:
            file.flush()
        yield copy
