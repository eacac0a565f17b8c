"""How a ps run shares out its steps: several in a closure, staleness in bounds.

Run by Python: `ps_steps.py OUT.npz STRATEGY`; the number of workers says what is looked at. STRATEGY `keras` is the
reference. Batches of 5 make four full ones and a short one of 22 examples; two workers share a full
one unequally.
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
import nan_steps
import numpy as np
import promises
import tensorflow as tf
from chosen import chosen

import tfdist
from tfdist.training.checkpoint.store import CheckpointWriter

cases.BATCH = nan_steps.BATCH = BATCH = 5
SKIPPED = slice(10, 15)  # the batch with nan_steps.BAD: the third, the first of its closure
NUM_STEPS = 48  # of an epoch, where staleness is looked at
# Options of `fit`; each with the cases that it must not change.
LOOPS: dict[str, Any] = {"pairs": {"steps_per_loop": 2}, "fours": {"steps_per_loop": 4}}
CASES = ("sgd", "batch_norm", "adamw_ema", "accumulate", "own_step", "two_players", "dropout", "embedding")

TOGETHER = (
    "sgd",
    "adam",
    "adamw_ema",
    "accumulate",
    "accumulate_ema",
    "schedule",
    "class_weight",
    "own_step",
    "embedding",
    "two_outputs",
)
cases.CASES["adam"] = cases.Case(
    lambda: cases.classifier(lambda: cases.optimizers.Adam(0.01)), (cases.X, cases.Y)
)
SKIPPING = ("sgd", "batch_norm", "adamw_ema")
SKIPPING_TOGETHER = tuple(name for name in SKIPPING if name in TOGETHER)


class Measures(keras.callbacks.Callback):
    """Keeps what a run measures, as `metrics.jsonl` does."""

    writes = True

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, float] = {}

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Asks for it."""
        self.found = self.params["measures"]()


def slow_slope(y_true: Any, y_pred: Any) -> Any:
    """As `promises.slope`, but the gradient takes long enough for others to step meanwhile."""
    x = tf.eye(400) + tf.reduce_mean(tf.stop_gradient(y_pred))
    for _ in range(10):
        x = tf.linalg.l2_normalize(x @ x, axis=0)
    never = tf.minimum(tf.reduce_sum(tf.square(x)), 0.0)
    return promises.slope(y_true, y_pred * (1.0 + never))


def slow_linear() -> keras.Model:
    """Returns a model whose weight moves by 0.5 a step."""
    model = promises.linear(0.5)
    model.compile(keras.optimizers.SGD(0.5), slow_slope, metrics=[promises.Count()])
    return model


def with_options(case: Any, **options: Any) -> Any:
    """Returns the case with more for `fit`."""
    return case._replace(options=case.options | options)


def run_one(run: Any) -> dict[str, Any]:
    """Several steps in a closure, one worker."""
    found: dict[str, Any] = {}
    for loop, options in LOOPS.items():
        for name in chosen(CASES, f"{loop}/"):
            found[f"{loop}/{name}"] = cases.run_tfdist(run, with_options(cases.CASES[name], **options))
    # Somebody looks at each batch.
    watch: list[float] = []
    look = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: watch.append(logs["loss"]))
    case = with_options(cases.CASES["sgd"], callbacks=[look], steps_per_loop=2)
    found["watched/sgd"] = cases.run_tfdist(run, case)
    found["watched"] = {"losses": np.asarray(watch)}
    for name in SKIPPING:
        planted = nan_steps.PLANTED[name]
        found[f"skip/{name}"], _ = nan_steps.train(run, *planted, on_nan="skip", steps_per_loop=2)
    _, error = nan_steps.train(run, *nan_steps.PLANTED["sgd"], on_nan="stop", steps_per_loop=2)
    with tempfile.TemporaryDirectory() as folder:
        kept = tfdist.Checkpoints(directory=folder, every_steps=3, keep=9)
        data = cases.CASES["sgd"].data
        nan_steps.train(run, cases.CASES["sgd"], data, checkpoints=kept, steps_per_loop=2)
        names = sorted(path.name for path in Path(folder).glob("*.npz"))
    found["said"] = {"error": np.asarray(error), "checkpoints": np.asarray(names)}
    return found


def run_two(run: Any) -> dict[str, Any]:
    """Counts and staleness, two workers."""
    found: dict[str, Any] = {}
    ones = np.ones((2 * NUM_STEPS, 1), np.float32)
    for name, options in {
        "free": {"steps_per_loop": 4},
        "own_choice": {},
        "bound_0": {"ps": tfdist.PsOptions(max_staleness=0)},
        "bound_2": {"ps": tfdist.PsOptions(max_staleness=2)},
        "inverse": {"ps": tfdist.PsOptions(staleness_lr="inverse")},
    }.items():
        keras.utils.set_random_seed(1)
        with run.strategy.scope():
            model = slow_linear()
        run.build(model, (ones, ones))
        start, seen = float(model.get_weights()[0][0, 0]), Measures()
        more = {"batch_size": 2, "epochs": 2, "verbose": 0, "callbacks": [seen], **options}
        history = run.fit(model, (ones, ones), **more)
        found[name] = {
            "moved": start - float(model.get_weights()[0][0, 0]),
            "iterations": int(model.optimizer.iterations.numpy()),
            "count": history.history["count"],
            **seen.found,
        }
    return found


def run_together(run: Any) -> dict[str, Any]:
    """All workers step together."""
    found: dict[str, Any] = {}
    for name in chosen(TOGETHER, "sync/"):
        found[f"sync/{name}"] = cases.run_tfdist(run, with_options(cases.CASES[name], ps="sync"))
    stream = tf.data.Dataset.from_tensor_slices(cases.CASES["sgd"].data)
    keras.utils.set_random_seed(1)
    with run.strategy.scope():
        model = cases.CASES["sgd"].build()
    measures = Measures()
    history = run.fit(
        model,
        stream,
        batch_size=BATCH,
        epochs=cases.EPOCHS,
        shuffle=False,
        verbose=0,
        ps="sync",
        callbacks=[measures],
    )
    found["sync/stream"] = cases.collect(model, history, {}, [])
    found["sync_measures"] = measures.found
    for name in SKIPPING_TOGETHER:
        planted = nan_steps.PLANTED[name]
        found[f"sync_skip/{name}"], _ = nan_steps.train(run, *planted, on_nan="skip", ps="sync")
    for name in ("two_players", "mask", "weights"):
        try:
            cases.run_tfdist(run, with_options(cases.CASES[name], ps="sync"))
        except tfdist.ConfigError as error:
            found[f"refused/{name}"] = {"error": np.asarray(str(error))}
    return found


def main(path: str, strategy: str) -> None:
    """Runs everything in this process and keeps the results."""
    # One that falls due while the last is being written is left out; here each must be there.
    CheckpointWriter.is_busy = property(lambda self: False)  # type: ignore[assignment]
    if strategy == "keras":
        names = {*CASES, *TOGETHER}
        asked = {name for group in (*LOOPS, "sync") for name in chosen(names, f"{group}/")}
        found = {f"plain/{name}": cases.run_keras(cases.CASES[name]) for name in sorted(asked | {"sgd"})}
        for name in SKIPPING:
            found[f"skip/{name}"] = nan_steps.train_plain(nan_steps.PLANTED[name][0], SKIPPED)
        chief = True
    else:
        run = tfdist.initialize(strategy=strategy, seed=1)
        chief = run.is_chief
        found = run_one(run) if run.cluster.num_workers == 1 else run_two(run) | run_together(run)
    if chief:
        np.savez(path, **{f"{name}/{key}": v for name, one in found.items() for key, v in one.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
