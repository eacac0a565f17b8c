"""Workers that read their own files, or their own examples, of a stream.

Run by Python: `sharded.py OUT STRATEGY`; FILES in the environment is a folder of TFRecord files of numbers 0, 1, ….
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import tfdist

COUNT, BATCH = 38, 8


class Seen(keras.metrics.Metric):
    """Counts how often each example came."""

    def __init__(self) -> None:
        super().__init__(name="seen")
        self.counts = self.add_weight(name="counts", shape=(COUNT,), initializer="zeros")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Adds a batch."""
        places = tf.cast(tf.reshape(y_true, [-1]), tf.int32)
        self.counts.assign(self.counts + tf.reduce_sum(tf.one_hot(places, COUNT), axis=0))

    def result(self) -> Any:
        """Returns the counts."""
        return self.counts.value


def read(names: list[str]) -> tf.data.Dataset:
    """Returns the numbers in files as examples."""
    numbers = tf.data.TFRecordDataset(names).map(lambda text: tf.strings.to_number([text]))
    return numbers.map(lambda number: (number / COUNT, number))


def main(out: str, strategy: str) -> None:
    """Fits and evaluates each way, and keeps what each process saw."""
    run = tfdist.initialize(strategy=strategy, seed=1)
    names = sorted(str(path) for path in Path(os.environ["FILES"]).iterdir())
    found: dict[str, Any] = {}
    ways: dict[str, dict[str, Any]] = {way: {"shard": way} for way in ("file", "data", "off")}
    ways |= {f"{way}_dropped": {"shard": way, "drop_remainder": True} for way in ("file", "data")}
    ways |= {"file_steps": {"shard": "file", "steps_per_epoch": 3}}
    for name, options in ways.items():
        with run.strategy.scope():
            model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
            model.compile(keras.optimizers.Adam(0.01), "mse", metrics=[Seen()])
        history = run.fit(model, read(names), batch_size=BATCH, epochs=2, verbose=0, **options)
        found[f"{name}/seen"] = history.history["seen"]
        found[f"{name}/steps"] = model.optimizer.iterations.numpy()
        found[f"{name}/weights"] = [w.ravel()[0] for w in model.get_weights()]
        results = run.evaluate(model, read(names), batch_size=BATCH, return_dict=True, shard=options["shard"])
        found[f"{name}/evaluated"] = results["seen"]
    for name, data in (("one_file", read(names[:1])), ("no_file", tf.data.Dataset.range(9))):
        try:
            run.fit(model, data, batch_size=BATCH, shard="file", verbose=0)
        except tfdist.ConfigError as error:
            found[f"refused/{name}"] = str(error)
    np.savez(Path(out) / f"{str(run.task or 'alone').replace(':', '-')}.npz", **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
