"""Keras callbacks that leave a run's numbers on disk, and the choice of who runs which callback."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfdist.training.epoch_clock import EpochClock
from tfdist.training.run_dir import RunDir

# Keras's own callbacks that write files, print, or send. The others only read the logs, which are the same on
# every worker, and act on the model: they must run everywhere, or the workers part ways.
_WRITERS = (
    keras.callbacks.BackupAndRestore,
    keras.callbacks.CSVLogger,
    keras.callbacks.ModelCheckpoint,
    keras.callbacks.ProgbarLogger,
    keras.callbacks.RemoteMonitor,
    keras.callbacks.TensorBoard,
)


def writes(callback: Any) -> bool:
    """Says whether a callback is for the chief alone.

    Args:
        callback: A Keras callback. Its attribute `writes`, if it has one, decides.

    Returns:
        True if it writes files, prints or sends.
    """
    own_word = getattr(callback, "writes", None)
    return isinstance(callback, _WRITERS) if own_word is None else bool(own_word)


def split_callbacks(callbacks: Any, *, is_chief: bool) -> tuple[list[Any], list[Any]]:
    """Chooses the callbacks that this task runs.

    Args:
        callbacks: What `fit` was given: None, one callback, a sequence, or a `keras.callbacks.CallbackList`.
        is_chief: Whether this task writes.

    Returns:
        The callbacks to run here and those left to the chief, each in the order given.
    """
    if callbacks is None:
        given: list[Any] = []
    elif isinstance(callbacks, Sequence):
        given = list(callbacks)
    else:
        given = list(getattr(callbacks, "callbacks", [callbacks]))
    if is_chief:
        return given, []
    return [c for c in given if not writes(c)], [c for c in given if writes(c)]


class MetricsFile(keras.callbacks.Callback):
    """Appends a line to `metrics.jsonl` after every epoch.

    A line holds `epoch` (from 0, as Keras counts), `step` (optimizer steps since the run began),
    `wall_secs` (since the run began, the time between a stop and a resume left out), `examples_per_sec`
    (training steps only, a short last batch counted as whole), and the epoch's logs. A resumed run first
    drops the lines of the epochs that it trains again.

    Args:
        run_dir: Whose file.
        get_step: Reads the optimizer steps so far; None asks the model's optimizer.
        now: Reads a clock, in seconds.
    """

    writes = True

    def __init__(
        self,
        *,
        run_dir: RunDir,
        get_step: Callable[[], int] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._run_dir = run_dir
        self._get_step = get_step or (lambda: int(self.model.optimizer.iterations.numpy()))
        self._now = now
        self._clock = EpochClock(now=now)

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Starts the clock."""
        self._start = self._now()
        self._earlier_secs: float | None = None
        self._clock.begin_fit()

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Goes on where the file's earlier lines end."""
        if self._earlier_secs is None:
            # Here, since Keras tells callbacks the initial epoch in no other way.
            kept = self._run_dir.drop_metrics_from(epoch)
            self._earlier_secs = float(kept[-1].get("wall_secs", 0.0)) if kept else 0.0
        self._clock.begin_epoch()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Counts the batch; the logs are not looked at."""
        self._clock.begin_batch(batch)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Counts the batch; the logs are not looked at."""
        self._clock.end_batch(batch)

    def on_test_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Stops the clock of the training steps."""
        self._clock.begin_test()

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Writes the epoch's line."""
        record = {
            "epoch": epoch,
            "step": self._get_step(),
            "wall_secs": round((self._earlier_secs or 0.0) + self._now() - self._start, 3),
        }
        secs_per_step, batch_size = self._clock.secs_per_step, self.params.get("global_batch_size")
        if secs_per_step and batch_size:
            record["examples_per_sec"] = round(batch_size / secs_per_step, 1)
        self._run_dir.append_metrics(record | dict(logs or {}))


class TensorBoardScalars(keras.callbacks.Callback):
    """Writes every epoch's logs as TensorBoard events, named and placed as Keras's `TensorBoard` does.

    `train/` and `validation/` hold `epoch_<metric>` by epoch. Keras's own callback also traces the graph and
    reads the model's batch functions, which a distributed run does not have.

    Args:
        run_dir: Whose `tensorboard_dir`.
    """

    writes = True

    def __init__(self, *, run_dir: RunDir) -> None:
        super().__init__()
        self._log_dir = run_dir.tensorboard_dir
        self._writers: dict[str, Any] = {}

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Writes and flushes the epoch's numbers."""
        by_split: dict[str, dict[str, float]] = {"train": {}, "validation": {}}
        for name, value in (logs or {}).items():
            split = "validation" if name.startswith("val_") else "train"
            by_split[split]["epoch_" + name.removeprefix("val_")] = float(value)
        for split, scalars in by_split.items():
            if not scalars:
                continue
            if split not in self._writers:
                self._writers[split] = tf.summary.create_file_writer(str(self._log_dir / split))
            with self._writers[split].as_default(), tf.summary.record_if(True):
                for name, value in scalars.items():
                    tf.summary.scalar(name, value, step=epoch)
            self._writers[split].flush()

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Closes the files."""
        for writer in self._writers.values():
            writer.close()
        self._writers = {}
