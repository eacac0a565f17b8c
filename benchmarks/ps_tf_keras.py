"""The same table under `tf_keras` 2's `fit`, the last official way with parameter servers.

Run on every task of a cluster: `ps_tf_keras.py - OUT.json ROUNDS`. With its own best settings: several steps an
execution, Adagrad that updates rows.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
import tf_keras as keras

NUM_ROWS, WIDTH, BATCH, IDS_PER_EXAMPLE, STEPS = 1_000_000, 16, 512, 26, 80


def build_dataset(context: tf.distribute.InputContext) -> tf.data.Dataset:
    """Returns a worker's batches."""
    del context
    shape = (BATCH * STEPS, IDS_PER_EXAMPLE)
    ids = np.random.default_rng(1).integers(0, NUM_ROWS, shape).astype(np.int32)
    labels = np.random.default_rng(0).integers(0, 2, (shape[0], 1)).astype(np.float32)
    return (
        tf.data.Dataset.from_tensor_slices((ids, labels)).shuffle(10_000).repeat().batch(BATCH).prefetch(-1)
    )


def main(_: str, out: str, rounds: str) -> None:
    """Trains, or serves."""
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    if resolver.task_type in ("worker", "ps"):
        tf.distribute.Server(
            resolver.cluster_spec(), job_name=resolver.task_type, task_index=resolver.task_id, protocol="grpc"
        ).join()
    partitioner = tf.distribute.experimental.partitioners.FixedShardsPartitioner(2)
    strategy = tf.distribute.ParameterServerStrategy(resolver, variable_partitioner=partitioner)
    with strategy.scope():
        ids = keras.Input((IDS_PER_EXAMPLE,), dtype="int32")
        rows = keras.layers.Flatten()(keras.layers.Embedding(NUM_ROWS, WIDTH)(ids))
        hidden = keras.layers.Dense(64, activation="relu")(rows)
        model = keras.Model(ids, keras.layers.Dense(1, activation="sigmoid")(hidden))
        model.compile(keras.optimizers.Adagrad(0.05), "binary_crossentropy", steps_per_execution=10)
    data = keras.utils.experimental.DatasetCreator(build_dataset)
    secs = []
    for _ in range(2 + int(rounds)):
        start = time.perf_counter()
        model.fit(data, epochs=1, steps_per_epoch=STEPS, verbose=0)
        secs.append(time.perf_counter() - start)
    Path(out).write_text(json.dumps({"secs": secs[2:]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
