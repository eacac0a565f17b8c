"""Training on data with one example that makes NaN, in the second batch of each epoch, under each answer to it.

Run by Python: `nan_steps.py OUT.npz STRATEGY [REPLICAS]`. STRATEGY `keras` is the reference: `keras.Model.fit` on the
data without the batches that are not to count.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import cases
import keras
import numpy as np
import tensorflow as tf
from cases import CASES, COUNT, EPOCHS, Case
from chosen import chosen

import tfdist

BATCH, BAD = cases.BATCH, 13
SKIPPED = slice(BATCH, 2 * BATCH)
layers, optimizers = keras.layers, keras.optimizers


def own_root() -> keras.Model:
    """Returns a model whose loss is finite where its gradient is not: the root's slope at zero."""
    inputs = keras.Input((6,))
    x = layers.Dense(4, use_bias=False, name="before_root")(inputs)
    model = keras.Model(inputs, layers.Dense(3)(keras.ops.sqrt(keras.ops.abs(x))))
    model.compile(optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def log_target(y_true: Any, y_pred: Any) -> Any:
    """A loss that is NaN for a negative target, with finite gradients."""
    return tf.square(y_pred - 1.0) + tf.math.log(tf.cast(y_true, y_pred.dtype))


def own_loss() -> keras.Model:
    """Returns a model with `log_target`."""
    model = keras.Sequential([keras.Input((6,)), layers.Dense(1)])
    model.compile(optimizers.SGD(0.1), log_target)
    return model


def plant(array: np.ndarray, value: Any) -> np.ndarray:
    """Returns a copy with one bad example."""
    array = array.copy()
    array[BAD] = value
    return array


NAN_X = plant(cases.X, np.nan)
PLANTED = {
    name: (CASES[name], (NAN_X, *CASES[name].data[1:]))
    for name in (
        "sgd",
        "batch_norm",
        "adamw_ema",
        "accumulate",
        "accumulate_ema",
        "schedule",
        "loss_scale",
        "own_step",
        "two_players",
        "dropout",
    )
}
PLANTED["weights"] = (CASES["weights"], (cases.X, cases.Y, plant(cases.W, np.nan)))
ones = np.ones(COUNT, np.float32)
PLANTED["embedding"] = (
    Case(cases.embedding, (cases.IDS, cases.BINARY, ones)),
    (cases.IDS, cases.BINARY, plant(ones, np.nan)),
)
PLANTED["gradients_only"] = (Case(own_root, (cases.X, cases.Y)), (plant(cases.X, 0.0), cases.Y))
positive = np.abs(cases.X[:, :1]) + 0.5
PLANTED["loss_only"] = (Case(own_loss, (cases.X, positive)), (cases.X, plant(positive, -1.0)))


def train_plain(case: Case, batches: slice) -> dict[str, Any]:
    """Returns what plain Keras makes of the data without some examples."""
    keras.utils.set_random_seed(1)
    model = case.build()
    x, y, w = (*(np.delete(part, batches, axis=0) for part in case.data), None)[:3]
    history = model.fit(x, y, sample_weight=w, batch_size=BATCH, epochs=EPOCHS, shuffle=False, verbose=0)
    return cases.collect(model, history, {}, [])


def train(run: Any, case: Case, data: Any, **options: Any) -> tuple[dict[str, Any], str]:
    """Returns what a strategy makes of the data, and with which error it ended."""
    keras.utils.set_random_seed(1)
    with run.strategy.scope():
        model = case.build()
    error = ""
    try:
        run.fit(model, data, batch_size=BATCH, epochs=EPOCHS, shuffle=False, verbose=0, **options)
    except tfdist.NonFiniteError as caught:
        error = str(caught)
    return cases.collect(model, model.history, {}, []), error


def run_worlds(run: Any) -> dict[str, Any]:
    """Returns what every answer leads to."""
    found: dict[str, Any] = {}
    for name in chosen(PLANTED, "skip/"):
        case, data = PLANTED[name]
        found[f"skip/{name}"], _ = train(run, case, data, on_nan="skip")
    for name in chosen(("sgd", "gradients_only", "loss_only", "own_step"), "stop/"):
        found[f"stop/{name}"], error = train(run, *PLANTED[name], on_nan="stop")
        found[f"stop/{name}"]["error"] = np.asarray(error)
    if not chosen(["rollback"]):
        return found
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = tfdist.Checkpoints(directory=folder)
        found["rollback"], _ = train(run, *PLANTED["sgd"], on_nan="rollback", checkpoints=checkpoints)
        found["rollback"]["checkpoints"] = np.asarray(
            [all_finite(path) for path in Path(folder).glob("*.npz")]
        )
        run.wait_for_others()
    return found


def all_finite(path: Path) -> bool:
    """Whether a checkpoint holds finite numbers alone."""
    with np.load(path) as stored:
        return all(np.isfinite(stored[name]).all() for name in stored.files if name != "__meta__")


def main(path: str, strategy: str, replicas: str | None = None) -> None:
    """Runs everything in this process and keeps the results."""
    if strategy == "keras":
        found = {f"skip/{name}": train_plain(PLANTED[name][0], SKIPPED) for name in chosen(PLANTED, "skip/")}
        # From each epoch's start on behind the bad batch: what came before it is not in the weights.
        found["rollback"] = train_plain(CASES["sgd"], slice(0, 2 * BATCH))
        chief = True
    else:
        run = tfdist.initialize(strategy=strategy, num_replicas=replicas and int(replicas), seed=1)
        found, chief = run_worlds(run), run.is_chief
    if chief:
        np.savez(path, **{f"{name}/{key}": v for name, one in found.items() for key, v in one.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
