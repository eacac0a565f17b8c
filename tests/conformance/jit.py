"""The program of test_jit.py: `jit.py OUT.npz STRATEGY [REPLICAS]` every option with XLA and without."""

import sys
import tempfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from chosen import chosen

import tfdist
from tfdist.training.checkpoint.store import CheckpointWriter
from tfdist.training.monitoring.profile import ProfileSteps

COUNT, BATCH = 90, 16  # five whole batches and a short one
rng = np.random.default_rng(0)
X = rng.normal(size=(COUNT, 8, 8, 1)).astype(np.float32)
Y = rng.integers(0, 3, COUNT)
SPOILED = X.copy()
SPOILED[37] = np.nan


def stream() -> tf.data.Dataset:
    """Returns data whose length nobody knows."""
    return tf.data.Dataset.from_tensor_slices((X, Y)).filter(lambda *example: True)


# By name: what `fit` takes besides, and how the model is compiled. Each holds several options, so that all come once.
CASES: dict[str, dict[str, Any]] = {
    "plain": {"fit": {"validation_data": (X[:30], Y[:30])}},
    "stop_clip_accumulate": {
        "fit": {"on_nan": "stop", "steps_per_loop": 2},
        "optimizer": {"clipnorm": 0.5, "gradient_accumulation_steps": 2},
    },
    "skip_ema_weights": {
        "fit": {"train": (SPOILED, Y), "on_nan": "skip", "class_weight": {0: 1.0, 1: 3.0, 2: 0.5}},
        "optimizer": {"use_ema": True, "ema_overwrite_frequency": 3},
    },
    "rollback_decay": {
        "fit": {"train": (SPOILED, Y), "on_nan": "rollback"},
        "optimizer": {"weight_decay": 0.01, "global_clipnorm": 1.0},
        "every_steps": 2,
    },
    "spike_stream": {"fit": {"train": stream, "on_nan": "stop", "max_loss_spike": 50.0}},
    "remainder_loops": {
        "fit": {"drop_remainder": True, "steps_per_loop": 4, "sample_weight": np.linspace(0.1, 2, COUNT)}
    },
    "profile": {"fit": {"on_nan": "stop", "steps_per_loop": 1}, "profile": (2, 4)},
    "bfloat16": {"policy": "mixed_bfloat16"},
    "float16": {"policy": "mixed_float16", "fit": {"on_nan": "stop"}},
}


def build_model(policy: str, optimizer: dict[str, Any]) -> keras.Model:
    """Returns the model, with the same weights each time."""
    keras.utils.set_random_seed(3)
    keras.config.set_dtype_policy(policy)
    layers = keras.layers
    parts = [
        layers.Conv2D(4, 3, kernel_regularizer="l2", use_bias=False),
        layers.BatchNormalization(),
        layers.Activation("relu"),
        layers.GlobalAveragePooling2D(),
        layers.Dense(3, activity_regularizer=keras.regularizers.L2(0.01), dtype="float32"),
    ]
    model = keras.Sequential([keras.Input((8, 8, 1)), *parts])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01, **optimizer), loss, metrics=["accuracy"])
    keras.config.set_dtype_policy("float32")
    return model


def fit(run: tfdist.Run, case: dict[str, Any], jit_compile: str) -> dict[str, Any]:
    """Returns the weights, the logs and the steps that a case ends with."""
    with run.strategy.scope():
        model = build_model(case.get("policy", "float32"), case.get("optimizer", {}))
    options = {**case.get("fit", {})}
    train = options.pop("train", (X, Y))
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = tfdist.Checkpoints(directory=folder, every_steps=case.get("every_steps"))
        callbacks = []
        if "profile" in case:
            first, last = case["profile"]
            callbacks = [ProfileSteps(log_dir=Path(folder) / "profile", first=first, last=last)]
        history = run.fit(
            model,
            train() if callable(train) else train,
            batch_size=BATCH,
            epochs=2,
            verbose=0,
            checkpoints=checkpoints,
            callbacks=callbacks,
            jit_compile=jit_compile,
            **options,
        )
    logs = [values for _, values in sorted(history.history.items())]
    weights = [np.asarray(w, np.float64).ravel() for w in model.get_weights()]
    return {
        "weights": np.concatenate(weights),
        "logs": np.array(logs, np.float64),
        "iterations": int(model.optimizer.iterations.numpy()),
        "predicted": run.predict(model, X[:20], batch_size=8),
    }


def main(out: str, strategy: str, replicas: int | None) -> None:
    """Writes what each case ends with."""
    # One that falls due while the last is being written is left out; a rollback must go to the same one here.
    CheckpointWriter.is_busy = property(lambda self: False)  # type: ignore[assignment]
    run = tfdist.initialize(strategy=strategy, num_replicas=replicas)
    found: dict[str, Any] = {}
    for name in chosen(CASES):
        for jit_compile in ("on", "off"):
            results = fit(run, CASES[name], jit_compile)
            found |= {f"{name}/{jit_compile}/{k}": v for k, v in results.items()}
    if run.is_chief:
        np.savez(out, **found)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else None)
