"""What a strategy promises beside equal numbers, measured from inside every process of a run.

Run by Python: `promises.py OUT_DIR STRATEGY [REPLICAS]`; each process that runs the program writes OUT_DIR/INDEX.npz
with what it saw. STRATEGY `keras` measures plain Keras where it has the same thing to offer.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import cases
import keras
import numpy as np
import tensorflow as tf
from building import build_in_scope
from chosen import chosen

EVEN = 20  # Examples that two batches of ten hold without a rest.
STEPS = 40
LATE_SECS = 1.0


class Count(keras.metrics.Metric):
    """Counts examples."""

    def __init__(self) -> None:
        super().__init__(name="count")
        self.total = self.add_weight(name="total", initializer="zeros")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Adds a batch."""
        self.total.assign_add(tf.cast(tf.shape(y_true)[0], "float32"))

    def result(self) -> Any:
        """Returns the examples counted."""
        return self.total.value


def slope(y_true: Any, y_pred: Any) -> Any:
    """A loss whose gradient is one whatever the weights are: after n steps of rate r they have moved by n·r."""
    return tf.reduce_mean(y_pred - tf.stop_gradient(0 * tf.cast(y_true, y_pred.dtype)), axis=-1)


def linear(rate: float) -> keras.Model:
    """Returns a model of one weight for ones, trained by `slope`, that counts examples."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    model.compile(keras.optimizers.SGD(rate), slope, metrics=[Count()])
    return model


def masked() -> keras.Model:
    """Returns a model whose weights move by the dropout masks that were drawn, averaged over two examples."""
    inputs = keras.Input((64,))
    dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")
    model = keras.Model(inputs, dense(keras.layers.Dropout(0.5, seed=5)(inputs)))
    model.compile(keras.optimizers.SGD(1.0), slope)
    return model


def frozen_auc() -> keras.Model:
    """Returns a model that does not learn: its training metrics are those of the whole data."""
    model = cases.embedding()
    model.compile(
        keras.optimizers.SGD(0.0), "binary_crossentropy", metrics=[keras.metrics.AUC(name="auc"), Count()]
    )
    return model


def plain_batch_norm() -> keras.Model:
    """Returns a classifier whose normalization uses each replica's own statistics."""
    layers = keras.layers
    model = keras.Sequential([keras.Input((6,)), layers.BatchNormalization(), layers.Dense(3)])
    model.compile(keras.optimizers.SGD(0.1), _crossentropy())
    return model


def _crossentropy() -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class Indexed:
    """Examples read one by one, as from a PyTorch dataset."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, place: int) -> tuple[Any, Any]:
        return self.x[place], self.y[place]


class Trainer:
    """Runs models under a strategy, or under plain Keras, with one meaning."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def build(self, build: Callable[[], keras.Model]) -> keras.Model:
        """Makes a model in scope, from seed 1."""
        return build_in_scope(self.run, build)

    def fit(self, model: keras.Model, data: Any, batch: int, **options: Any) -> Any:
        """Fits, in the data's order."""
        if self.run is not None:
            return self.run.fit(model, data, batch_size=batch, shuffle=False, verbose=0, **options)
        return model.fit(*data, batch_size=batch, shuffle=False, verbose=0, **options)

    def evaluate_and_predict(self, model: keras.Model) -> dict[str, Any]:
        """Evaluates and predicts in batches that leave a rest."""
        x, y = cases.IDS, cases.BINARY
        if self.run is not None:
            results = self.run.evaluate(model, x, y, batch_size=4, return_dict=True)
            outputs = self.run.predict(model, x, batch_size=4)
        else:
            results = model.evaluate(x, y, batch_size=4, verbose=0, return_dict=True)
            outputs = model.predict(x, batch_size=4, verbose=0)
        return {"predicted": outputs} | {f"evaluated_{name}": value for name, value in results.items()}


def copies(run: Any, model: keras.Model) -> Iterator[np.ndarray]:
    """Yields every local replica's weights, flat."""
    replicated = run is not None and run.strategy_name in ("mirrored", "multiworker")
    for index in range(len(run.strategy.extended.worker_devices) if replicated else 1):
        local = [v.value for v in model.weights]
        if replicated:
            local = [run.strategy.experimental_local_results(v)[index] for v in local]
        yield np.concatenate([np.ravel(v.numpy()).astype("float64") for v in local])


def counts(trainer: Trainer) -> dict[str, Any]:
    """Takes many steps of one length."""
    ones = np.ones((STEPS * 2, 1), np.float32)
    model = trainer.build(lambda: linear(0.5))
    trainer.fit(model, (ones, ones), 2, epochs=1, steps_per_epoch=1)
    start = float(model.get_weights()[0][0, 0])
    history = trainer.fit(model, (ones, ones), 2, epochs=2)
    return {
        "moved": start - float(model.get_weights()[0][0, 0]),
        "iterations": int(model.optimizer.iterations.numpy()),
        "counts": history.history["count"],
    }


def masks(trainer: Trainer) -> dict[str, Any]:
    """Looks at dropout from outside."""
    model = trainer.build(masked)
    wide = np.ones((2, 64), np.float32)
    moves = []
    for _ in range(2):
        before = model.get_weights()[0] if model.built else 0.0
        trainer.fit(model, (wide, wide[:, :1]), 2)
        moves.append(before - model.get_weights()[0])
    return {"masks": np.asarray(moves)}


def totals(trainer: Trainer) -> dict[str, Any]:
    """Adds up over examples, in training, evaluation and prediction."""
    model = trainer.build(frozen_auc)
    history = trainer.fit(model, (cases.IDS, cases.BINARY), 5)
    seen = {"auc": history.history["auc"][0], "auc_count": history.history["count"][0]}
    return seen | trainer.evaluate_and_predict(model)


def repeated(trainer: Trainer) -> dict[str, Any]:
    """Does the same twice."""
    weights = []
    for _ in range(2):
        model = trainer.build(cases.dropout)
        trainer.fit(model, (cases.X, cases.Y), cases.BATCH, epochs=2)
        weights.append(np.concatenate([np.ravel(w) for w in model.get_weights()]))
    return {"repeated": np.asarray(weights)}


def statistics(trainer: Trainer) -> dict[str, Any]:
    """Trains what replicas keep statistics of."""
    model = trainer.build(plain_batch_norm)
    trainer.fit(model, (cases.X, cases.Y), cases.BATCH, epochs=1)
    return {
        "copies": np.asarray(list(copies(trainer.run, model))),
        "finite": all(np.isfinite(w).all() for w in model.get_weights()),
    }


def bfloat16(trainer: Trainer) -> dict[str, Any]:
    """Computes in it."""
    keras.mixed_precision.set_dtype_policy("mixed_bfloat16")
    model = trainer.build(lambda: cases.classifier(lambda: keras.optimizers.SGD(0.1)))
    history = trainer.fit(model, (cases.X, cases.Y), cases.BATCH, epochs=2)
    keras.mixed_precision.set_dtype_policy("float32")
    dtypes = [model.layers[1].compute_dtype, model.layers[1].kernel.dtype]
    return {"bfloat16": np.asarray(history.history["loss"]), "bfloat16_dtypes": dtypes}


def callbacks(trainer: Trainer, folder: Path, name: str) -> dict[str, Any]:
    """Stops early, writes, and looks at every batch."""
    model = trainer.build(lambda: cases.classifier(lambda: keras.optimizers.SGD(0.0)))
    batches: list[int] = []
    history = trainer.fit(
        model,
        (cases.X, cases.Y),
        cases.BATCH,
        epochs=6,
        callbacks=[
            keras.callbacks.EarlyStopping("loss", patience=1),
            keras.callbacks.CSVLogger(str(folder / f"{name}.csv")),
            keras.callbacks.ModelCheckpoint(str(folder / f"{name}.keras")),
            keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: batches.append(batch)),
        ],
    )
    return {"epochs": len(history.history["loss"]), "batches": batches}


def leaving(trainer: Trainer) -> dict[str, Any]:
    """Ends a fit late on the chief, when the others have nothing left to do."""
    ended_at = [0.0]
    is_late = trainer.run is not None and trainer.run.is_chief

    def end_late(logs: Any = None) -> None:
        time.sleep(LATE_SECS * is_late)
        ended_at[0] = time.monotonic()

    model = trainer.build(lambda: linear(0.5))
    ones = np.ones((4, 1), np.float32)
    trainer.fit(
        model, (ones, ones), 2, epochs=1, callbacks=[keras.callbacks.LambdaCallback(on_train_end=end_late)]
    )
    return {"ended_at": ended_at[0], "left_at": time.monotonic()}


def forms(trainer: Trainer) -> dict[str, Any]:
    """Trains on the same examples given in every form."""
    x, y = cases.X[:EVEN], cases.Y[:EVEN]
    examples = tf.data.Dataset.from_tensor_slices((x, y))

    def own(context: tf.distribute.InputContext) -> tf.data.Dataset:
        examples = tf.data.Dataset.from_tensor_slices((x, y))
        per_replica = examples.batch(cases.BATCH // context.num_replicas_in_sync, drop_remainder=True)
        return per_replica.shard(context.num_input_pipelines, context.input_pipeline_id).repeat()

    ways: dict[str, tuple[Any, dict[str, Any]]] = {"arrays": ((x, y), {})}
    if trainer.run is not None:
        ways["stream"] = (examples, {})
        ways["unknown_length"] = (examples.filter(lambda x, y: True), {})
        ways["indexed"] = (Indexed(x, y), {})
        ways["own"] = (own, {"steps_per_epoch": EVEN // cases.BATCH})
    found = {}
    for name, (data, options) in ways.items():
        model = trainer.build(lambda: cases.classifier(lambda: keras.optimizers.SGD(0.1)))
        trainer.fit(model, data, cases.BATCH, epochs=2, **options)
        steps = [float(model.optimizer.iterations.numpy())]
        found[f"form_{name}"] = np.concatenate([*(np.ravel(w) for w in model.get_weights()), steps])
    return found


def main(out: str, strategy: str, replicas: str | None = None) -> None:
    """Measures, and writes what this process saw."""
    run, name = None, "keras"
    if strategy != "keras":
        import tfdist

        run = tfdist.initialize(strategy=strategy, num_replicas=replicas and int(replicas), seed=1)
        name = str(run.task or "alone").replace(":", "-")
    trainer = Trainer(run)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "counts": lambda: counts(trainer),
        "masks": lambda: masks(trainer),
        "totals": lambda: totals(trainer),
        "repeated": lambda: repeated(trainer),
        "statistics": lambda: statistics(trainer),
        "callbacks": lambda: callbacks(trainer, Path(out), name),
        "leaving": lambda: leaving(trainer),
        "forms": lambda: forms(trainer),
        "bfloat16": lambda: bfloat16(trainer),
    }
    seen: dict[str, Any] = {}
    for part in chosen(parts):
        seen |= parts[part]()
    np.savez(Path(out) / f"{name}.npz", **seen)


if __name__ == "__main__":
    main(*sys.argv[1:])
