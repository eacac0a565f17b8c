"""The contender `tf_keras` of `sync.py`: its `fit` under MultiWorkerMirroredStrategy. Run as `… - cnn OUT WEIGHTS`."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
from sync_models import CONTESTS, EPSILON, LEARNING_RATE, WARM_STEPS, build_data, pin

_, CONTEST, OUT, WEIGHTS = sys.argv[1:]
INDEX = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
pin(INDEX)

import numpy as np  # noqa: E402 - after pinning
import tensorflow as tf  # noqa: E402 - after pinning
import tf_keras as keras  # noqa: E402 - after pinning


class Timer(keras.callbacks.Callback):
    """Notes when steps end."""

    times: list[float] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Notes one."""
        self.times.append(time.perf_counter())


strategy = tf.distribute.MultiWorkerMirroredStrategy()
layers = keras.layers
with strategy.scope():
    model = keras.Sequential(
        [
            keras.Input(CONTESTS[CONTEST].shape),
            *(layers.Conv2D(32, 3, activation="relu"), layers.MaxPooling2D()),
            *(layers.Conv2D(64, 3, activation="relu"), layers.MaxPooling2D()),
            *(layers.Flatten(), layers.Dense(128, activation="relu"), layers.Dense(10)),
        ]
    )
    adam = keras.optimizers.Adam(LEARNING_RATE, epsilon=EPSILON)
    model.compile(adam, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
with np.load(WEIGHTS) as stored:
    model.set_weights([stored[f"w{i}"] for i in range(len(stored.files))])
x, y = build_data(CONTEST)
_, BATCH, STEPS = CONTESTS[CONTEST]


def batches(count: int) -> tf.data.Dataset:
    """Returns so many global batches, of which each worker takes its part."""
    data = tf.data.Dataset.from_tensor_slices((x[: count * BATCH], y[: count * BATCH])).batch(BATCH)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return data.with_options(options)


model.fit(batches(WARM_STEPS), epochs=1, verbose=0)
loss = model.evaluate(batches(2), verbose=0)
model.fit(batches(STEPS), epochs=1, verbose=0, callbacks=[Timer()])
if INDEX == 0:
    secs = Timer.times[-1] - Timer.times[0]
    figures = {"rate": (len(Timer.times) - 1) * BATCH / secs, "loss": float(loss)}
    Path(OUT).write_text(json.dumps(figures))
