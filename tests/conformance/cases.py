"""Small models and data, each asking one thing of a strategy, and the same program for all of them.

Run by Python: `cases.py OUT.npz STRATEGY [REPLICAS]`. STRATEGY `keras` is the reference: `keras.Model.fit` itself.
22 examples in batches of 10 leave a short last batch of 2, of which some of four replicas get nothing.
Smooth activations keep rounding from growing; SGD shows a gradient of the wrong size, which Adam would hide.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from building import start, weights_of
from chosen import chosen

from tfdist.optimizers import LARS
from tfdist.recipe import load_recipe

BATCH, EPOCHS, COUNT = 10, 2, 22
rng = np.random.default_rng(0)
X = rng.normal(size=(COUNT, 6)).astype(np.float32)
Y = rng.integers(0, 3, COUNT)
W = rng.uniform(0.5, 2, COUNT).astype(np.float32)
IDS = rng.integers(0, 20, (COUNT, 5))
BINARY = (Y > 0).astype(np.float32)[:, None]
layers, optimizers = keras.layers, keras.optimizers
UNET = load_recipe("medical_unet")


class Case(NamedTuple):
    """A compiled model and what it is fitted on."""

    build: Callable[[], keras.Model]
    data: Any
    options: dict[str, Any] = {}


class OwnStep(keras.Model):
    """A subclassed model with its own steps, tracker and log."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = layers.Dense(8, activation="tanh"), layers.Dense(3)
        self.tracker = keras.metrics.Mean(name="own_loss")
        self.loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def call(self, x: Any) -> Any:
        """Returns logits."""
        return self.out(self.hidden(x))

    def train_step(self, data: Any) -> dict[str, Any]:
        """Takes one step of its own."""
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.loss_fn(y, self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        self.tracker.update_state(loss, sample_weight=tf.shape(x)[0])
        return {"own_loss": self.tracker.result(), "last": loss}

    def test_step(self, data: Any) -> dict[str, Any]:
        """Evaluates."""
        x, y = data
        self.tracker.update_state(self.loss_fn(y, self(x)), sample_weight=tf.shape(x)[0])
        return {"own_loss": self.tracker.result()}


class TwoPlayers(keras.Model):
    """Two optimizers, the second of which sees what the first has changed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = layers.Dense(4, activation="tanh"), layers.Dense(3)
        self.first_optimizer = optimizers.SGD(0.1, momentum=0.5)
        self.tracker = keras.metrics.Mean(name="total")

    def build(self, shape: Any) -> None:
        """Makes both players."""
        self.first.build(shape)
        self.second.build((*shape[:-1], 4))
        self.built = True

    def call(self, x: Any) -> Any:
        """Returns logits."""
        return self.second(self.first(x))

    def train_step(self, data: Any) -> dict[str, Any]:
        """Moves one player, then the other."""
        x, y = data
        for player, optimizer in ((self.first, self.first_optimizer), (self.second, self.optimizer)):
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, training=True))
            weights = player.trainable_variables
            gradients = tape.gradient(loss, weights)
            optimizer.apply(gradients, weights)
        self.tracker.update_state(loss, sample_weight=tf.shape(x)[0])
        return {"total": self.tracker.result()}

    def test_step(self, data: Any) -> dict[str, Any]:
        """Evaluates."""
        x, y = data
        self.tracker.update_state(self.compute_loss(x, y, self(x)), sample_weight=tf.shape(x)[0])
        return {"total": self.tracker.result()}


def classifier(optimizer: Callable[[], Any], *, batch_norm: bool = False, **loss: Any) -> keras.Model:
    """Returns a compiled classifier of X, with a regularizer and a constraint."""
    inputs = keras.Input((6,))
    x = layers.Dense(8, activation="tanh")(inputs)
    if batch_norm:
        x = layers.BatchNormalization(synchronized=True)(x)
    outputs = layers.Dense(
        3, kernel_regularizer=keras.regularizers.L2(0.01), kernel_constraint=keras.constraints.NonNeg()
    )(x)
    model = keras.Model(inputs, outputs)
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True, **loss)
    model.compile(optimizer(), loss_fn, metrics=["accuracy"])
    return model


def embedding() -> keras.Model:
    """Returns a model whose embedding gets row-sparse gradients, with an AUC."""
    ids = keras.Input((5,), dtype="int32")
    x = layers.GlobalAveragePooling1D()(layers.Embedding(20, 4)(ids))
    model = keras.Model(ids, layers.Dense(1, activation="sigmoid")(x))
    model.compile(optimizers.Adam(0.01), "binary_crossentropy", metrics=[keras.metrics.AUC(name="auc")])
    return model


def two_outputs() -> keras.Model:
    """Returns a model of dict inputs and two weighted outputs."""
    a, b = keras.Input((6,), name="a"), keras.Input((5,), name="b")
    x = layers.Dense(8, activation="tanh")(layers.Concatenate()([a, b]))
    outputs = {"kind": layers.Dense(3, name="kind")(x), "size": layers.Dense(1, name="size")(x)}
    model = keras.Model({"a": a, "b": b}, outputs)
    kind = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizers.SGD(0.1), {"kind": kind, "size": "mse"}, loss_weights={"kind": 1.0, "size": 0.3})
    return model


def own_step() -> keras.Model:
    """Returns a compiled `OwnStep`."""
    model = OwnStep()
    model.compile(optimizers.SGD(0.1))
    return model


def two_players() -> keras.Model:
    """Returns a compiled `TwoPlayers`."""
    model = TwoPlayers()
    model.compile(optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def dropout() -> keras.Model:
    """Returns a model with random layers."""
    inputs = keras.Input((6,))
    x = layers.Dropout(0.5, seed=3)(layers.Dense(8, activation="tanh")(inputs))
    model = keras.Model(inputs, layers.Dense(3)(layers.GaussianNoise(0.1, seed=4)(x)))
    model.compile(optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def wide() -> keras.Model:
    """Returns a model with a weight large enough for Adam's update in one pass."""
    keras.utils.set_random_seed(3)
    parts = [layers.Dense(640, activation="tanh"), layers.Dense(480, activation="tanh"), layers.Dense(3)]
    model = keras.Sequential([keras.Input((6,)), *parts])
    # An epsilon above the rounding errors of gradients, which Adam would enlarge.
    adam = optimizers.Adam(1e-3, epsilon=1e-3)
    model.compile(adam, keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    return model


def segmenter() -> keras.Model:
    """Returns a model with the loss of medical_unet, and an optimizer that shows a gradient of the wrong size."""
    keras.utils.set_random_seed(3)
    parts = [
        layers.Conv2D(4, 3, padding="same", activation="tanh"),
        layers.Conv2D(1, 1, activation="sigmoid"),
    ]
    model = keras.Sequential([keras.Input((16, 16, 1)), *parts])
    loss = UNET.build_model.__globals__["dice_loss"]
    model.compile(optimizers.SGD(0.1), loss, metrics=[keras.metrics.BinaryIoU([1], name="iou")])
    return model


def tied() -> keras.Model:
    """Returns a model that reads and writes by one table, with a loss that a layer adds."""
    ids = keras.Input((5,), dtype="int32")
    table = layers.ReversibleEmbedding(20, 8)
    x = table(ids)
    for _ in range(2):
        x = x + layers.Dense(8, activation="tanh", activity_regularizer="l2")(layers.LayerNormalization()(x))
    model = keras.Model(ids, table(x, reverse=True))
    model.compile(
        optimizers.SGD(0.1, global_clipnorm=0.2), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    return model


CASES = {
    "sgd": Case(lambda: classifier(lambda: optimizers.SGD(0.1)), (X, Y)),
    "batch_norm": Case(
        lambda: classifier(lambda: optimizers.SGD(0.1, momentum=0.9, global_clipnorm=0.5), batch_norm=True),
        (X, Y),
    ),
    "adamw_ema": Case(
        lambda: classifier(
            lambda: optimizers.AdamW(1e-2, clipnorm=0.1, use_ema=True, ema_overwrite_frequency=2)
        ),
        (X, Y),
    ),
    # Three batches an epoch: a sum of two or four is carried into the next one, or left over.
    "accumulate": Case(
        lambda: classifier(lambda: optimizers.SGD(0.1, momentum=0.9, gradient_accumulation_steps=2)), (X, Y)
    ),
    "accumulate_ema": Case(
        lambda: classifier(
            lambda: optimizers.AdamW(
                1e-2, clipnorm=0.1, use_ema=True, ema_overwrite_frequency=2, gradient_accumulation_steps=4
            )
        ),
        (X, Y),
    ),
    "schedule": Case(
        lambda: classifier(
            lambda: optimizers.SGD(optimizers.schedules.CosineDecay(0.01, 4)), reduction="sum"
        ),
        (X, Y),
    ),
    "weights": Case(
        lambda: classifier(lambda: optimizers.SGD(0.1), reduction="mean_with_sample_weight"), (X, Y, W)
    ),
    "mask": Case(lambda: classifier(lambda: optimizers.SGD(0.1), ignore_class=2), (X, Y)),
    "class_weight": Case(
        lambda: classifier(lambda: optimizers.SGD(0.1)), (X, Y), {"class_weight": {0: 1.0, 1: 3.0, 2: 0.5}}
    ),
    # The scale doubles every two steps, and gradients are divided by it.
    "loss_scale": Case(
        lambda: classifier(
            lambda: optimizers.LossScaleOptimizer(
                optimizers.SGD(0.1, momentum=0.9), initial_scale=8.0, dynamic_growth_steps=2
            )
        ),
        (X, Y),
    ),
    "validation_split": Case(
        lambda: classifier(lambda: optimizers.SGD(0.1)), (X, Y), {"validation_split": 0.25}
    ),
    "embedding": Case(embedding, (IDS, BINARY)),
    "two_outputs": Case(
        two_outputs, ({"a": X, "b": IDS.astype(np.float32) / 10}, {"kind": Y, "size": X[:, :1] * 2})
    ),
    "own_step": Case(own_step, (X, Y)),
    "two_players": Case(two_players, (X, Y)),
    "dropout": Case(dropout, (X, Y)),
    "tied": Case(tied, (IDS, np.roll(IDS, -1, axis=1))),
    "wide": Case(wide, (X, Y)),
    "lars": Case(lambda: classifier(lambda: LARS(20.0, weight_decay=1e-3)), (X, Y)),
    # A loss of each image, averaged over images: some have no lesion, and the parts of a batch differ in size.
    "dice": Case(segmenter, UNET.build_data("test", num_examples=5 * COUNT, image_size=16)),
}


def run_keras(case: Case) -> dict[str, Any]:
    """Returns what plain Keras makes of a case."""
    keras.utils.set_random_seed(1)
    model = case.build()
    x, y, w = (*case.data, None)[:3]
    history = model.fit(
        x, y, sample_weight=w, batch_size=BATCH, epochs=EPOCHS, shuffle=False, verbose=0, **case.options
    )
    results = model.evaluate(x, y, sample_weight=w, batch_size=BATCH, verbose=0, return_dict=True)
    return collect(model, history, results, model.predict(x, batch_size=BATCH, verbose=0))


def run_tfdist(run: Any, case: Case) -> dict[str, Any]:
    """Returns what a strategy makes of a case."""
    keras.utils.set_random_seed(1)
    with run.strategy.scope():
        model = case.build()
    history = run.fit(
        model, case.data, batch_size=BATCH, epochs=EPOCHS, shuffle=False, verbose=0, **case.options
    )
    results = run.evaluate(model, case.data, batch_size=BATCH, return_dict=True)
    outputs = run.predict(model, case.data[:1], batch_size=BATCH)
    return collect(model, history, results, outputs, run)


def collect(
    model: keras.Model, history: Any, results: dict[str, float], outputs: Any, run: Any = None
) -> dict[str, Any]:
    """Returns everything that must agree, flat."""
    found: dict[str, Any] = weights_of(run, model)
    found |= {f"history_{name}": np.asarray(values) for name, values in history.history.items()}
    found |= {f"evaluate_{name}": np.asarray(value) for name, value in results.items()}
    found |= {f"predict_{i}": np.asarray(v) for i, v in enumerate(tf.nest.flatten(outputs))}
    return found | {"iterations": np.asarray(model.optimizer.iterations.numpy())}


def main(path: str, strategy: str, replicas: str | None = None, *, cases: Mapping[str, Case] = CASES) -> None:
    """Runs the cases that are asked for in this process and keeps the results."""
    asked = {name: cases[name] for name in chosen(cases)}
    if strategy == "keras":
        results = {name: run_keras(case) for name, case in asked.items()}
        chief = True
    else:
        run = start(strategy, replicas)
        chief = run.is_chief
        results = {name: run_tfdist(run, case) for name, case in asked.items()}
    if chief:
        np.savez(path, **{f"{name}/{key}": v for name, found in results.items() for key, v in found.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
