"""Keras callbacks that leave a run's numbers on disk, and the choice of who runs which callback."""

import logging
import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from tfdist.config.run_config import RunConfig
from tfdist.config.run_dir import RunDir, append_record
from tfdist.training.metrics import single_numbers
from tfdist.training.monitoring.epoch_clock import EpochClock

_log = logging.getLogger("tfdist")
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
    """Says whether a callback is for the chief alone, since it writes; its attribute `writes`, if any, decides."""
    own_word = getattr(callback, "writes", None)
    return isinstance(callback, _WRITERS) if own_word is None else bool(own_word)


def split_callbacks(callbacks: Any, *, is_chief: bool) -> tuple[list[Any], list[Any]]:
    """Returns those of `fit`'s callbacks that this task runs, and those left to the chief, each in the order given.

    They may be None, one callback, a sequence, or a `keras.callbacks.CallbackList`.
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


class ConfigFile(keras.callbacks.Callback):
    """Makes a run's config the folder's, once it is known to fit what lies there: when the first epoch begins.

    Args:
        run_dir: Whose file.
        config: Of the run.
        environment: Where it takes place, as `RunDir.environment_file` keeps it.
    """

    writes = True

    def __init__(
        self, *, run_dir: RunDir, config: RunConfig, environment: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self._run_dir = run_dir
        self._config = config
        self._environment = environment
        self._is_written = False

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Writes it, once, and again where somebody has removed it."""
        if self._is_written and self._run_dir.config_file.exists():
            return
        try:
            self._run_dir.write_config(self._config, self._environment)
            self._is_written = True
        except OSError as error:
            _warn_of(self._run_dir.config_file, error.strerror or error, "it comes with the next epoch")


class MetricsFile(keras.callbacks.Callback):
    """Appends a line to `metrics.jsonl` after every epoch.

    A line holds `epoch` (from 0, as Keras counts), `step` (optimizer steps since the run began),
    `wall_secs` (since the run began, the time between a stop and a resume left out), `examples_per_sec`
    (training steps only, a short last batch counted as whole), `memory_mb` (the most memory that this process has had,
    in 10**6 bytes), `input_wait` (the share of the steps' time, 0..1,
    in which the chief waited for input), under `ps` `dispatch_share` (the share of the workers' time, 0..1, in which
    they had nothing to do), `staleness_mean` and `staleness_p95` (optimizer steps of others between a gradient's
    reading of the weights and its applying) and `staleness_counts` (how many gradients had a staleness of 0, of 1 and
    so on), with backup workers `num_dropped` (examples whose parts came too late), where a worker has died
    `num_repeated` (steps that were made twice), under a sync strategy `step_secs` (for each worker the mean seconds
    of a step, by what they went to: see `tfdist.training.monitoring.step_times`) and `steps_per_loop` (in one call of
    a graph, if several), under `multiworker` `slowest_worker`, `straggler` (how many times the median it computes,
    where that is much) and `exchange_mb` (megabytes, 10**6 bytes, that the chief has sent), and the epoch's logs. A
    resumed run first drops the lines of the epochs that it trains again.

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
        self._unwritten: list[dict[str, Any]] = []

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
            "memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1),
        }
        secs_per_step, batch_size = self._clock.secs_per_step, self.params.get("global_batch_size")
        if secs_per_step and batch_size:
            record["examples_per_sec"] = round(batch_size / secs_per_step, 1)
        get_share = self.params.get("input_wait")
        if get_share is not None and (share := get_share()) is not None:
            record["input_wait"] = round(share, 4)
        get_measures = self.params.get("measures")
        for name, value in (get_measures() if get_measures else {}).items():
            record[name] = round(value, 4) if isinstance(value, float) else value
        self._unwritten.append(record | dict(logs or {}))
        try:
            while self._unwritten:
                append_record(self._run_dir.metrics_file, self._unwritten[0])
                self._unwritten.pop(0)
        except OSError as error:
            _warn_of(self._run_dir.metrics_file, error.strerror or error, "the line comes with the next one")


class TensorBoardScalars(keras.callbacks.Callback):
    """Writes every epoch's logs as TensorBoard events, named and placed as Keras's `TensorBoard` does.

    `train/` and `validation/` hold `epoch_<metric>` by epoch. Keras's own callback also traces the graph and
    reads the model's batch functions, which a distributed run does not have. A resumed run first drops the numbers of
    the epochs that it trains again.
    """

    writes = True

    def __init__(self, *, run_dir: RunDir) -> None:
        super().__init__()
        self._log_dir = run_dir.tensorboard_dir
        self._writers: dict[str, Any] = {}
        self._unwritten: list[tuple[int, str, dict[str, float]]] = []
        self._has_begun = False

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Knows no epoch yet."""
        self._has_begun = False

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Goes on where the earlier numbers end."""
        if not self._has_begun:
            self._has_begun = True
            for path in self._log_dir.glob("*/events.out.tfevents.*"):
                if path.parent.name in ("train", "validation"):
                    _drop_events_from(path, epoch)

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Writes and flushes the epoch's numbers."""
        by_split: dict[str, dict[str, float]] = {"train": {}, "validation": {}}
        for name, value in (logs or {}).items():
            split = "validation" if name.startswith("val_") else "train"
            by_split[split] |= single_numbers("epoch_" + name.removeprefix("val_"), value)
        self._unwritten += [(epoch, split, scalars) for split, scalars in by_split.items() if scalars]
        try:
            while self._unwritten:
                self._write(*self._unwritten[0])
                self._unwritten.pop(0)
        except tf.errors.OpError as error:
            self._writers = {}  # The next one begins a file of its own: what is in this one nobody knows.
            reason = error.message.splitlines()[0].rpartition("; ")[2]
            _warn_of(self._log_dir, reason, "the numbers come with the next ones")

    def _write(self, epoch: int, split: str, scalars: Mapping[str, float]) -> None:
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


def _warn_of(path: Path, reason: Any, when: str) -> None:
    _log.warning("%s could not be written (%s); training goes on, and %s", path, reason, when)


def _drop_events_from(path: Path, epoch: int) -> None:
    """Forgets the events of epochs that are about to be trained again, and a last one that a crash cut short."""
    events, is_torn = [], False
    try:
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            events.append(record)
    except tf.errors.DataLossError:
        is_torn = True
    kept = [event for event in events if tf.compat.v1.Event.FromString(event).step < epoch]
    # The first only says which version of the format this is.
    kept = kept or events[:1]
    if len(kept) == len(events) and not is_torn:
        return
    temporary = path.with_name(f".{path.name}.tmp")
    with tf.io.TFRecordWriter(str(temporary)) as writer:
        for event in kept:
            writer.write(event)
    os.replace(temporary, path)
