"""Streams that a tf.data service prepares.

Run by Python: `served.py OUT STRATEGY [REPLICAS]`; SERVICE in the environment is the `data_service`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import sharded
import tensorflow as tf
from chosen import chosen

import tfdist

COUNT = sharded.COUNT


def data(batch_in_python: bool = False) -> tf.data.Dataset:
    """Returns the numbers 0, 1, … as examples; read by Python, they exist in the process that serves them alone."""
    numbers = tf.data.Dataset.range(COUNT)
    if batch_in_python:
        numbers = numbers.map(lambda n: tf.ensure_shape(tf.numpy_function(lambda i: i, [n], tf.int64), []))
    return numbers.map(lambda n: (tf.cast([n], tf.float32) / COUNT, tf.cast([n], tf.float32)))


class Ports(keras.callbacks.Callback):
    """Notes this process's listening sockets, as the command ss prints them."""

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Asks for them."""
        self.lines: list[str] = []
        if shutil.which("ss") is None:
            return
        lines = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout
        self.lines = [line for line in lines.splitlines() if re.search(rf"pid={os.getpid()}\b", line)]


def main(out: str, strategy: str, replicas: str | None = None) -> None:
    """Fits each way, and keeps what each process saw."""
    service = os.environ["SERVICE"]
    run = tfdist.initialize(strategy=strategy, num_replicas=replicas and int(replicas), seed=1)

    def fit(dataset: Any, batch: int = 8, **options: Any) -> tuple[keras.Model, Any]:
        with run.strategy.scope():
            model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
            model.compile(keras.optimizers.Adam(0.01), "mse", metrics=[sharded.Seen()])
        history = run.fit(
            model, dataset, batch_size=batch, epochs=2, verbose=0, data_service=service, **options
        )
        return model, history.history

    found: dict[str, Any] = {}
    ports = Ports()
    ways: dict[str, dict[str, Any]] = {
        "whole": {"callbacks": [ports]},
        "in_order": {"shuffle": False, "validation_data": data()},
        "odd": {"batch": 7},
        "dropped": {"drop_remainder": True},
        "steps": {"steps_per_epoch": 9},
    }
    for name in chosen(ways):
        model, history = fit(data().repeat() if name == "steps" else data(), **ways[name])
        found[f"{name}/seen"] = history["seen"]
        found[f"{name}/steps"] = model.optimizer.iterations.numpy()
        found[f"{name}/weights"] = [w.ravel()[0] for w in model.get_weights()]
        if "val_seen" in history:
            found[f"{name}/validated"] = history["val_seen"]
    if service == "local":
        found["python/seen"] = fit(data(batch_in_python=True))[1]["seen"]
        found["ports"] = ports.lines
    numbers = np.arange(COUNT, dtype=np.float32)[:, None]
    for name, refused, options in (
        ("arrays", (numbers, numbers), {}),
        ("own", lambda context: data().batch(4), {"steps_per_epoch": 2}),
    ):
        try:
            fit(refused, **options)
        except tfdist.ConfigError as error:
            found[f"refused/{name}"] = str(error)
    np.savez(Path(out) / f"{str(run.task or 'alone').replace(':', '-')}.npz", **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
