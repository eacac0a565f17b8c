"""TensorBoard's profile of some steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf


class ProfileSteps(keras.callbacks.Callback):
    """Profiles the steps `first` to `last` of a fit, counted from 1 over all its epochs, the last one included.

    The first steps of a fit compile: a profile that begins with the tenth, say, shows the steady state.
    """

    writes = True

    def __init__(self, *, log_dir: Path, first: int, last: int) -> None:
        super().__init__()
        self._log_dir = log_dir
        self._first, self._last = first, last
        self._num_steps = 0
        self._is_on = False

    def on_train_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Starts."""
        if self._num_steps + 1 == self._first:
            tf.profiler.experimental.start(str(self._log_dir))
            self._is_on = True

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Counts, and stops."""
        self._num_steps += 1
        if self._num_steps >= self._last:
            self._stop()

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Stops, if the fit is over before."""
        self._stop()

    def _stop(self) -> None:
        if self._is_on:
            self._is_on = False
            tf.profiler.experimental.stop()
