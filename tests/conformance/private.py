"""The program of test_private.py: `private.py OUT.npz STRATEGY [REPLICAS]` trains privately, and by Keras's rule."""

import sys
from typing import Any

import keras
import numpy as np
from chosen import chosen

import tfdist

COUNT, BATCH = 90, 16  # five whole batches and a short one
rng = np.random.default_rng(0)
X = rng.normal(size=(COUNT, 8, 8, 1)).astype(np.float32)
WORDS = rng.integers(0, 20, (COUNT, 6))
Y = rng.integers(0, 3, COUNT)
OPEN = {"dp_noise_multiplier": 0.0, "dp_clip_norm": float("inf"), "dp_sampling": "shuffle"}
SEEDED = {"dp_noise_multiplier": 1.5, "dp_noise_seed": 7, "dp_clip_norm": 0.3}
layers = keras.layers


def images() -> list[Any]:
    """Returns layers for images."""
    return [
        keras.Input((8, 8, 1)),
        layers.Conv2D(4, 3, kernel_regularizer="l2"),
        layers.LayerNormalization(),
        layers.Activation("relu"),
        layers.GlobalAveragePooling2D(),
        layers.Dense(3, activity_regularizer=keras.regularizers.L2(0.01)),
    ]


def texts() -> list[Any]:
    """Returns layers for texts."""
    return [keras.Input((6,)), layers.Embedding(20, 4), layers.LSTM(5), layers.Dense(3)]


def recommended() -> list[Any]:
    """Returns layers with a table of tfdist's."""
    return [keras.Input((6,)), tfdist.layers.Embedding(20, 4, combiner="sum"), layers.Dense(3)]


# By name: layers, data, settings of privacy, and what `fit` takes besides.
EXACT: dict[str, tuple[Any, ...]] = {
    "images": (images, X, {**OPEN, "dp_micro_batch_size": 3}, {"class_weight": {0: 1.0, 1: 3.0}}),
    "texts": (texts, WORDS, OPEN, {"on_nan": "stop"}),
    "table": (recommended, WORDS, OPEN, {"sample_weight": np.linspace(0.1, 2, COUNT)}),
}
SAME_SEED: dict[str, tuple[Any, ...]] = {
    "poisson": (images, X, SEEDED, {"on_nan": "stop"}),
    "shuffled": (images, X, {**SEEDED, "dp_sampling": "shuffle"}, {"steps_per_loop": 2}),
}
CASES = [*EXACT, *SAME_SEED, "clip", "noise", "secure_noise"]


def build_model(parts: list[Any], optimizer: Any) -> keras.Model:
    """Returns the model, with the same weights each time."""
    model = keras.Sequential(parts)
    model.compile(
        optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"]
    )
    return model


def fit(run: tfdist.Run, parts: Any, x: Any, privacy: dict[str, Any] | None, options: Any) -> dict[str, Any]:
    """Returns the weights and logs that a fit ends with."""
    keras.utils.set_random_seed(3)
    with run.strategy.scope():
        # Of a row that occurs several times Keras's Adam squares the parts one by one, and not their sum.
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9) if parts is texts else keras.optimizers.Adam(0.01)
        model = build_model(parts(), optimizer)
    asked = None if privacy is None else tfdist.PrivacyOptions(**privacy)
    history = run.fit(model, x, Y, batch_size=BATCH, epochs=2, verbose=0, privacy=asked, **options)
    weights = [np.asarray(w, np.float64).ravel() for w in model.get_weights()]
    return {
        "weights": np.concatenate(weights),
        "logs": np.array([values for _, values in sorted(history.history.items())]),
        "names": np.array(sorted(history.history)),
        "iterations": int(model.optimizer.iterations.numpy()),
    }


def take_one_step(run: tfdist.Run, parts: Any, x: Any, y: Any, **privacy: Any) -> tuple[list[Any], list[Any]]:
    """Returns the weights before and after one step of SGD with a learning rate of 1."""
    keras.utils.set_random_seed(3)
    with run.strategy.scope():
        model = build_model(parts(), keras.optimizers.SGD(1.0))
    before = model.get_weights()
    options = tfdist.PrivacyOptions(dp_sampling="shuffle", **privacy)
    run.fit(model, x, y, batch_size=len(x), verbose=0, privacy=options)
    return before, model.get_weights()


def wide() -> list[Any]:
    """Returns a layer whose weights have no gradient on zeros, but for a few."""
    return [keras.Input((200,)), layers.Dense(100)]


def measure_noise(run: tfdist.Run, seed: int | None) -> dict[str, Any]:
    """Returns what a step adds to weights without a gradient, in units of what it should be."""
    x, y = np.zeros((15, 200), np.float32), np.zeros(15, np.int64)
    before, after = take_one_step(
        run, wide, x, y, dp_noise_multiplier=3.0, dp_clip_norm=0.5, dp_noise_seed=seed
    )
    return {"added": (after[0] - before[0]).ravel() * len(x) / (3.0 * 0.5)}


def main(out: str, strategy: str, replicas: int | None) -> None:
    """Writes what each case ends with."""
    run = tfdist.initialize(strategy=strategy, num_replicas=replicas)
    found: dict[str, Any] = {}
    for name in chosen(CASES):
        if name in EXACT:
            parts, x, privacy, options = EXACT[name]
            found |= {f"{name}/plain/{k}": v for k, v in fit(run, parts, x, None, options).items()}
            found |= {f"{name}/private/{k}": v for k, v in fit(run, parts, x, privacy, options).items()}
        elif name in SAME_SEED:
            found |= {f"{name}/{k}": v for k, v in fit(run, *SAME_SEED[name]).items()}
        elif name == "clip":
            options = {"dp_noise_multiplier": 0.0, "dp_clip_norm": 0.2, "dp_micro_batch_size": 4}
            before, after = take_one_step(run, images, X[:13], Y[:13], **options)
            found |= {f"clip/{i}": b - a for i, (b, a) in enumerate(zip(before, after, strict=True))}
        else:
            added = measure_noise(run, 5 if name == "noise" else None)
            found |= {f"{name}/{k}": v for k, v in added.items()}
    if run.is_chief:
        np.savez(out, **found)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else None)
