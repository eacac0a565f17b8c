"""The model that was best so far by a number of validation, kept in the run's folder."""

import contextlib
import json
import os
from collections.abc import Mapping
from typing import Any

import keras

from tfdist import keras_internals
from tfdist.config.run_dir import RunDir, read_object, write_atomically
from tfdist.errors import ConfigError
from tfdist.training.checkpoint.owners import blocks_to_save, sharing_state


class KeepBest(keras.callbacks.Callback):
    """Writes `best.keras` and `best.json` when a number is better than it ever was in the run; every process has it.

    Which way is better Keras's `ModelCheckpoint` says, by the metric, unless it is said.

    Args:
        run_dir: Whose files.
        metric: Of the logs, such as `val_accuracy`; `max:val_f1` or `min:val_error` for one that Keras does not know.
        is_chief: Whether this process writes; others hand over what only they hold.

    Raises:
        ConfigError: When logs of validation come that have no such number, or nobody knows what is better.
    """

    def __init__(self, *, run_dir: RunDir, metric: str, is_chief: bool = True) -> None:
        super().__init__()
        self._is_chief = is_chief
        self._run_dir = run_dir
        mode, colon, name = metric.partition(":")
        self._mode, self._metric = (mode, name) if colon else ("auto", metric)
        if self._mode not in ("auto", "max", "min"):
            raise ConfigError(f"keep_best={metric!r}: write a metric's name, or max:NAME or min:NAME.")
        # Keras tells the format by the name's end.
        self._temporary = run_dir.path / f".tmp-{os.getpid()}-best.keras"
        self._checkpoint: keras.callbacks.ModelCheckpoint | None = None

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Writes the model, if it is the best; an epoch that was not validated is passed over."""
        logs = logs or {}
        if self._metric not in logs:
            if self._metric.startswith("val_") and not any(name.startswith("val_") for name in logs):
                return
            raise ConfigError(
                f"keep_best={self._metric!r}: there is no such number; choose one of {', '.join(sorted(logs))}."
            )
        with sharing_state(self.model):
            if self._is_chief:
                self._keep(epoch, logs)

    def _keep(self, epoch: int, logs: Mapping[str, Any]) -> None:
        if self._checkpoint is None:
            before = read_object(self._run_dir.best_file)
            threshold = before["value"] if before.get("metric") == self._metric else None
            self._checkpoint = keras.callbacks.ModelCheckpoint(
                str(self._temporary),
                monitor=self._metric,
                mode=self._mode,
                save_best_only=True,
                initial_value_threshold=threshold,
            )
            self._checkpoint.set_model(self.model)
        try:
            with keras_internals.saving_in_blocks(blocks_to_save(self.model)):
                self._checkpoint.on_epoch_end(epoch, dict(logs))
            if self._temporary.exists():
                os.replace(self._temporary, self._run_dir.best_model_file)
                best = {"metric": self._metric, "value": float(logs[self._metric]), "epoch": epoch}
                write_atomically(self._run_dir.best_file, json.dumps(best) + "\n")
        except ValueError as error:
            if "mode=" not in str(error):
                raise
            raise ConfigError(
                f"keep_best={self._metric!r}: Keras does not know whether more of it is better; say "
                f"max:{self._metric} or min:{self._metric}."
            ) from error
        finally:
            with contextlib.suppress(OSError):
                self._temporary.unlink()
