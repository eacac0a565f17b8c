"""Models with a large table, as far as a test can have one, and the same program for every strategy.

Run by Python: `tables.py OUT.npz STRATEGY [REPLICAS]`. STRATEGY `keras` is the reference: `keras.Model.fit`, a dense
layer on one-hot ids, whose gradient has every row, or, for optimizers that give another result on rows, our own layer.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import cases
import keras
import numpy as np
import tensorflow as tf
from chosen import chosen

import tfdist
from tfdist.layers import Embedding
from tfdist.optimizers import LazyAdam
from tfdist.training.checkpoint.snapshot import take_snapshot, write_checkpoint

NUM_ROWS, WIDTH = 21, 4
TABLE = np.random.default_rng(3).normal(size=(NUM_ROWS, WIDTH)).astype(np.float32)
optimizers = keras.optimizers


class OneHot(keras.layers.Layer):
    """One-hot rows of ids, `[batch, ids, NUM_ROWS]`."""

    def call(self, ids: Any) -> Any:
        """Returns them."""
        return tf.one_hot(ids, NUM_ROWS)


# Arguments of the layer, and the optimizer.
CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "sgd": ({}, lambda: optimizers.SGD(0.5)),
    "adagrad": ({}, lambda: optimizers.Adagrad(0.3)),
    "adagrad_3_shards": (
        {"num_shards": 3, "partition": "div"},
        lambda: optimizers.Adagrad(0.3, clipvalue=0.01),
    ),
    "bags": ({"combiner": "mean"}, lambda: optimizers.Adagrad(0.3, global_clipnorm=0.05)),
    "accumulate": ({}, lambda: optimizers.Adagrad(0.3, gradient_accumulation_steps=2)),
    "adam": ({}, lambda: optimizers.Adam(0.05)),
    "adam_together": ({}, lambda: optimizers.Adam(0.05)),
    "rmsprop_clip": ({"combiner": "mean"}, lambda: optimizers.RMSprop(0.05, global_clipnorm=0.05)),
    "lazy_adam": ({}, lambda: LazyAdam(0.05)),
    "bfloat16": ({"dtype": "mixed_bfloat16"}, lambda: optimizers.Adagrad(0.3)),
}
# What tests look at besides equal results.
ALWAYS = ("sgd", "adagrad", "adagrad_3_shards", "lazy_adam")
WITHOUT_REFERENCE = ("lazy_adam", "bfloat16")


def build(name: str, *, one_hot: bool) -> keras.Model:
    """Returns a compiled case."""
    keras.utils.set_random_seed(1)
    arguments, optimizer = CASES[name]
    ids = keras.Input((5,), dtype="int32")
    if one_hot:
        rows = keras.layers.Dense(WIDTH, use_bias=False, name="table")(OneHot()(ids))
    else:
        rows = Embedding(NUM_ROWS, WIDTH, name="table", **arguments)(ids)
    if one_hot or arguments.get("combiner") is None:
        rows = keras.layers.GlobalAveragePooling1D()(rows)
    model = keras.Model(ids, keras.layers.Dense(1, activation="sigmoid")(rows))
    if one_hot:
        model.get_layer("table").set_weights([TABLE])
    else:
        model.get_layer("table").set_table(TABLE)
    model.layers[-1].set_weights([np.full((WIDTH, 1), 0.5, np.float32), np.zeros(1, np.float32)])
    model.compile(optimizer(), "binary_crossentropy")
    return model


def measure(run: Any, name: str) -> dict[str, Any]:
    """Returns what must agree, and where things are."""
    x, y = cases.IDS, cases.BINARY
    options = {"epochs": cases.EPOCHS, "shuffle": False, "verbose": 0}
    if run is None:
        model = build(name, one_hot=name not in WITHOUT_REFERENCE)
        history = model.fit(x, y, batch_size=cases.BATCH, **options)
        outputs = model.predict(x, batch_size=cases.BATCH, verbose=0)
    else:
        with run.strategy.scope():
            model = build(name, one_hot=False)
        if run.strategy_name == "ps" and name.endswith("_together"):
            options |= {"ps": "sync", "on_nan": "stop"}
        history = run.fit(model, (x, y), batch_size=cases.BATCH, **options)
        outputs = run.predict(model, x, batch_size=cases.BATCH)
    layer = model.get_layer("table")
    found = {"loss": history.history["loss"], "predicted": outputs}
    found["table"] = layer.get_table() if isinstance(layer, Embedding) else layer.get_weights()[0]
    found |= {f"dense_{i}": w for i, w in enumerate(model.layers[-1].get_weights())}
    return {f"{name}/{key}": np.asarray(value) for key, value in found.items()} | places(name, model)


def places(name: str, model: keras.Model) -> dict[str, Any]:
    """Returns the ps of each shard and of each slot, and the optimizer's class."""
    shards = getattr(model.get_layer("table"), "shards", [])
    slots = [v for v in model.optimizer.variables if any(s.path.replace("/", "_") in v.path for s in shards)]
    tasks = [tf.DeviceSpec.from_string(v.value.device).task or 0 for v in shards]
    slot_tasks = [tf.DeviceSpec.from_string(v.value.device).task or 0 for v in slots]
    return {
        f"{name}:tasks": tasks,
        f"{name}:slot_tasks": slot_tasks,
        f"{name}:optimizer": type(model.optimizer).__name__,
    }


def keep(run: Any, path: str) -> None:
    """Writes the state of a trained case as one that is too large to be copied, and leaves the file."""
    with run.strategy.scope():
        model = build("lazy_adam", one_hot=False)
    run.fit(model, (cases.IDS, cases.BINARY), batch_size=cases.BATCH, shuffle=False, verbose=0)
    if run.is_chief:
        snapshot = take_snapshot(model, epoch=1, step=0, metrics=[], extra={}, copy_bytes=0)
        write_checkpoint(Path(f"{path}.state.npz"), snapshot)
        np.save(f"{path}.table.npy", model.get_layer("table").get_table())


def bytes_on_each_ps(run: Any) -> list[int]:
    """Returns how much each holds of weights that come large and small in turn."""
    sizes = [4000, 10, 3000, 20, 2000, 10, 2500, 30]
    with run.strategy.scope():
        weights = [keras.Variable(np.zeros(size, "float32")) for size in sizes]
    places = [tf.DeviceSpec.from_string(w.value.device).task for w in weights]
    return [
        sum(4 * size for size, own in zip(sizes, places, strict=True) if own == place)
        for place in sorted(set(places))
    ]


def refused_id(run: Any) -> str:
    """Returns the error of an id beyond the table, which every replica meets."""
    with run.strategy.scope():
        model = build("sgd", one_hot=False)
    try:
        run.fit(
            model,
            (np.full_like(cases.IDS, NUM_ROWS), cases.BINARY),
            batch_size=cases.BATCH,
            verbose=0,
        )
    except tf.errors.InvalidArgumentError as error:
        return str(error)
    return ""


def main(path: str, strategy: str, replicas: str | None = None) -> None:
    """Measures every case, and keeps what the chief saw."""
    run = None
    if strategy != "keras":
        run = tfdist.initialize(strategy=strategy, num_replicas=replicas and int(replicas), seed=1)
    found: dict[str, Any] = {}
    for name in sorted({*chosen(CASES), *ALWAYS}):
        found |= measure(run, name)
    if run is not None:
        keep(run, path)
    if strategy == "ps":
        found["bytes"] = bytes_on_each_ps(run)
    if run is None or run.is_chief:
        np.savez(path, **found, written=path, refused="" if run is None else refused_id(run))
    elif run is not None:
        refused_id(run)


if __name__ == "__main__":
    main(*sys.argv[1:])
