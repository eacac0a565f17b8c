"""Synchronous steps that do not wait for the last worker, one of which is slow.

Run by Python: `backups.py OUT.npz ps`, with three workers.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import promises
import tensorflow as tf

import tfdist
from tfdist.layers import Embedding
from tfdist.optimizers import LazyAdam

BATCH, STEPS, EPOCHS = 7, 20, 3
COUNT = BATCH * STEPS - 2  # the last batch is short, and the parts are unequal
RATE = 0.5
STOP_SECS, GO_SECS = 0.06, 0.06  # of the slow worker, in turns


def find_worker(index: int) -> int:
    """Returns the process id of a worker beside this process."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            env = (entry / "environ").read_bytes().decode(errors="replace")
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if parent == os.getppid() and f'"task": {{"type": "worker", "index": {index}}}' in env:
            return int(entry.name)
    raise AssertionError(f"there is no worker {index} beside this process")


class Slow(keras.callbacks.Callback):
    """Stops the last worker in short turns during the last epoch, and keeps how many examples were dropped."""

    writes = True
    # In a process of its own: TensorFlow waits for all workers, and lets none of Python's threads run, where it adds or
    # removes a function.
    turns = f"while kill -STOP $0; do sleep {STOP_SECS}; kill -CONT $0; sleep {GO_SECS}; done"

    def __init__(self) -> None:
        super().__init__()
        self.pid = find_worker(2)
        self.num_dropped: list[int] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Begins."""
        if epoch == EPOCHS - 1:
            words = ["sh", "-c", self.turns, str(self.pid)]
            self.process = subprocess.Popen(words, stderr=subprocess.DEVNULL)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Ends, and asks for the measures."""
        if epoch == EPOCHS - 1:
            self.process.kill()
            self.process.wait()
            os.kill(self.pid, signal.SIGCONT)
        self.num_dropped.append(self.params["measures"]()["num_dropped"])


def checked_slope(y_true: Any, y_pred: Any) -> Any:
    """Fails on the worker at a target below zero."""
    with tf.control_dependencies([tf.debugging.assert_non_negative(y_true, "a target below zero")]):
        return promises.slope(tf.identity(y_true), y_pred)


def build(optimizer: Any, loss: Any = promises.slope) -> keras.Model:
    """Returns a model in which everything moves by the same at each step, whichever examples count."""
    x, ids = keras.Input((1,), name="x"), keras.Input((1,), dtype="int32", name="ids")
    rows = keras.layers.Flatten()(Embedding(4, 1, embeddings_initializer="zeros", name="table")(ids))
    moving = keras.layers.BatchNormalization(scale=False, momentum=0.9)(x)
    dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros", name="dense")(x)
    model = keras.Model({"x": x, "ids": ids}, keras.layers.Add()([dense, rows, moving]))
    model.compile(optimizer, loss, metrics=[promises.Count()])
    return model


def with_backups(num_backup_workers: int) -> tfdist.PsOptions:
    """Returns the options of synchronous steps that wait for fewer workers."""
    return tfdist.PsOptions(ps_mode="sync", num_backup_workers=num_backup_workers)


def main(path: str, strategy: str) -> None:
    """Trains, and keeps what there is."""
    run = tfdist.initialize(strategy=strategy, seed=1)
    data = {"x": np.ones((COUNT, 1), np.float32), "ids": np.full((COUNT, 1), 2, np.int32)}
    found: dict[str, Any] = {}
    options = {"batch_size": BATCH, "epochs": EPOCHS, "verbose": 0}
    for name, optimizer in (("sgd", keras.optimizers.SGD), ("lazy_adam", LazyAdam)):
        with run.strategy.scope():
            model = build(optimizer(RATE))
        slow = Slow()
        history = run.fit(model, (data, data["x"]), ps=with_backups(1), callbacks=[slow], **options)
        (normal,) = (layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization))
        found |= {
            f"{name}/count": history.history["count"],
            f"{name}/num_dropped": slow.num_dropped,
            f"{name}/iterations": model.optimizer.iterations.numpy(),
            f"{name}/table": model.get_layer("table").get_table(),
            f"{name}/dense": model.get_layer("dense").get_weights()[0],
            f"{name}/beta": normal.beta.numpy(),
            f"{name}/moving_mean": normal.moving_mean.numpy(),
        }
    try:
        run.fit(model, (data, data["x"]), ps=with_backups(3), **options)
    except tfdist.ConfigError as error:
        found["refused"] = str(error)
    with run.strategy.scope():
        model = build(keras.optimizers.SGD(RATE), checked_slope)
    wrong = np.where(np.arange(COUNT) == COUNT // 2, -1, 1).astype(np.float32)[:, None]
    try:
        run.fit(model, (data, wrong), ps=with_backups(1), **options)
    except tf.errors.InvalidArgumentError as error:
        found["failed"] = str(error)
    history = run.fit(model, (data, data["x"]), ps=with_backups(1), **options | {"epochs": 1})
    found["count_after_a_failure"] = history.history["count"]
    np.savez(path, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
