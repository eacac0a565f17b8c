"""A fit that can be killed after any step, and started again.

Run by Python: `resumed.py OUT STRATEGY [REPLICAS]`. In the environment: RESUMED_CHECKPOINTS, the folder;
RESUMED_DIE_AT, the step after which the chief kills itself (0: never); RESUMED_EVERY_SECS instead of every 4 steps;
RESUMED_SYNC: fields of `SyncOptions`, as JSON;
RESUMED_STREAM: `good` or `spoiled` examples come as a stream, for a single epoch.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import cases
import keras
import numpy as np
import tensorflow as tf

import tfdist

EPOCHS, EXAMPLES, BATCH = 4, 205, 10
rng = np.random.default_rng(0)
X = rng.normal(size=(EXAMPLES, 6)).astype(np.float32)
Y = rng.integers(0, 3, EXAMPLES)


class DieAt(keras.callbacks.Callback):
    """Kills this process, as a machine that fails does.

    Args:
        step: After which.
        folder: Where a checkpoint must lie by then: it is written while steps go on.
    """

    def __init__(self, step: int, folder: str) -> None:
        super().__init__()
        self._left = step
        self._folder = folder

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Counts down."""
        self._left -= 1
        if self._left == 0:
            while not any(Path(self._folder).glob("epoch-*")):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)


def build_data(stream: str) -> Any:
    """Returns arrays, or the same as a stream."""
    return tf.data.Dataset.from_tensor_slices((X * (stream == "good"), Y)) if stream else (X, Y)


def main(out: str, strategy: str, replicas: str | None = None) -> None:
    """Trains to the end, or to death."""
    run = tfdist.initialize(strategy=strategy, num_replicas=replicas and int(replicas), seed=1)
    with run.strategy.scope():
        model = cases.dropout()
        model.compile(keras.optimizers.Adam(0.01), model.loss, metrics=["accuracy"])
    die_at = int(os.environ["RESUMED_DIE_AT"]) if run.is_chief else 0
    secs = os.environ.get("RESUMED_EVERY_SECS")
    stream = os.environ.get("RESUMED_STREAM", "")
    folder = os.environ["RESUMED_CHECKPOINTS"]
    stopping = keras.callbacks.EarlyStopping("val_loss", patience=10, restore_best_weights=True)
    history = run.fit(
        model,
        build_data(stream),
        batch_size=BATCH,
        epochs=1 if stream else EPOCHS,
        validation_data=(X[:50], Y[:50]),
        verbose=2,
        callbacks=[DieAt(die_at, folder), stopping],
        sync=tfdist.SyncOptions(exchange="collective", **json.loads(os.environ.get("RESUMED_SYNC", "{}"))),
        checkpoints=tfdist.Checkpoints(
            directory=folder,
            every_steps=None if secs else 4,
            every_secs=float(secs) if secs else None,
        ),
    )
    if run.is_chief:
        found = {f"weight_{i}": v.numpy() for i, v in enumerate([*model.weights, *model.optimizer.variables])}
        found |= {f"history_{name}": values for name, values in history.history.items()}
        best = {f"best_{i}": array for i, array in enumerate(stopping.best_weights)}
        np.savez(out, **found, epochs=history.epoch, best=stopping.best, wait=stopping.wait, **best)


if __name__ == "__main__":
    main(*sys.argv[1:])
