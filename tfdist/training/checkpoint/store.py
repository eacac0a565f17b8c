"""A folder of checkpoints: when one is due, which are kept, and a writer that training does not wait for."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tfdist.errors import ConfigError
from tfdist.training.checkpoint.snapshot import Snapshot, read_checkpoint, write_checkpoint

_log = logging.getLogger("tfdist")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Where `fit` keeps its state, and how often it does so besides each epoch's end.

    Attributes:
        directory: The folder, which the chief alone reads and writes.
        every_steps: Optimizer steps between two checkpoints; None: only at an epoch's end.
        every_secs: Seconds between two checkpoints; None: only at an epoch's end.
        keep: How many of the newest are kept.
        why: Why a run goes on from them, for the line that says so.
        config: What each file tells of the run besides its state, as JSON holds it.

    Raises:
        ConfigError: If a number is not positive.

    Examples:
        >>> import tfdist
        >>> tfdist.Checkpoints(directory="checkpoints", every_secs=60).keep
        3
    """

    directory: str | Path
    every_steps: int | None = None
    every_secs: float | None = None
    keep: int = 3
    why: str = ""
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("every_steps", "every_secs", "keep"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"checkpoints: {name}={value}: it must be more than 0.")

    def files(self) -> list[Path]:
        """Returns the checkpoints that lie there, the newest first."""
        return sorted(Path(self.directory).glob("epoch-*-step-*.npz"), reverse=True)

    def read_newest(self) -> tuple[Snapshot, Path] | None:
        """Returns the newest checkpoint that is whole, and its file; None if there is none.

        One that is not whole is passed over with a warning.
        """
        for path in self.files():
            try:
                return read_checkpoint(path), path
            except (ConfigError, OSError) as error:
                _log.warning("%s Going on from the one before.", error)
        return None


class CheckpointWriter:
    """Writes snapshots in a thread, one at a time, and removes the oldest once a newer one is whole.

    A disk that is full or gone is warned of, each time, and so are numbers that are not finite, which are not kept;
    training goes on, and nothing that was whole is removed.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints
        self._thread: threading.Thread | None = None
        self._reason = ""
        self._error: Exception | None = None

    @property
    def is_busy(self) -> bool:
        """Whether the one before is still being written."""
        return self._thread is not None and self._thread.is_alive()

    def write(self, snapshot: Snapshot) -> None:
        """Starts writing, once the one before is done; waits for the end if the snapshot is no copy."""
        self.wait()
        if not snapshot.is_copy:
            self._reason = self._write(snapshot)
            return
        # No daemon: the interpreter waits for it when it ends.
        self._thread = threading.Thread(target=self._try, args=(snapshot,), name="tfdist-checkpoint")
        self._thread.start()

    def wait(self) -> str:
        """Waits until what was started is done.

        Returns:
            Why the last snapshot is not on the disk; empty if it is.

        Raises:
            Exception: What ended the thread, but for a disk's errors, which were warned of.
        """
        if self._thread is not None:
            self._thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._reason

    def _try(self, snapshot: Snapshot) -> None:
        try:
            self._reason = self._write(snapshot)
        except Exception as error:  # noqa: BLE001 - whoever waits is to hear of it
            self._error = error

    def _write(self, snapshot: Snapshot) -> str:
        folder = Path(self._checkpoints.directory)
        path = folder / snapshot.file_name
        if not snapshot.is_finite:
            _log.warning("%s is not kept: it holds NaN or infinite numbers", snapshot.file_name)
            return "it holds NaN or infinite numbers"
        try:
            write_checkpoint(path, snapshot)
        except OSError as error:
            _log.warning(
                "checkpoint %s could not be written (%s); training goes on, and the next one is tried all the same",
                path,
                error.strerror or error,
            )
            return error.strerror or str(error)
        files = self._checkpoints.files()
        # A run goes on from the newest that is whole: those that seem to be newer than this one are damaged.
        place = files.index(path) if path in files else 0
        for damaged in files[:place]:
            with contextlib.suppress(OSError):
                os.replace(damaged, damaged.with_name(f"{damaged.name}.damaged"))
                _log.warning("%s cannot be read, and is now %s.damaged", damaged, damaged.name)
        for old in files[place:][self._checkpoints.keep :]:
            with contextlib.suppress(OSError):
                old.unlink()
        # What a killed process left half-written.
        for torn in folder.glob(".epoch-*.tmp-*"):
            if not torn.name.endswith(f"-{os.getpid()}"):
                with contextlib.suppress(OSError):
                    torn.unlink()
        return ""
