"""A small regression whose metric adds up the examples' numbers, so that none can be lost or repeated unseen."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

import tfdist

NUM_EXAMPLES = 330  # the last batch of an epoch is a short one
TABLE_ROWS = 2_000_000  # 32 MB that nobody trains: a checkpoint takes its time


class NumbersSeen(keras.metrics.Metric):
    """Adds up the second column of the targets."""

    def __init__(self) -> None:
        super().__init__(name="numbers")
        self.total = self.add_weight(initializer="zeros", name="total")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Takes a batch."""
        del y_pred, sample_weight
        self.total.assign_add(keras.ops.sum(y_true[:, 1]))

    def result(self) -> Any:
        """Returns the sum."""
        return self.total.value


class Table(keras.layers.Layer):
    """Ballast."""

    def build(self, shape: Any) -> None:
        """Makes it."""
        del shape
        self.table = self.add_weight(
            shape=(TABLE_ROWS, 4), initializer="zeros", trainable=False, name="table"
        )

    def call(self, x: Any) -> Any:
        """Adds a zero."""
        return x + self.table[0, 0]


def squared_error(y_true: Any, y_pred: Any) -> Any:
    """Of the first column."""
    return keras.ops.square(y_true[:, :1] - y_pred)


def build_model(*, dropout: float = 0.1) -> keras.Model:
    """Returns a network with dropout, whose random stream must go on where it stopped."""
    layers = [keras.layers.Dense(16, "tanh"), keras.layers.Dropout(dropout), Table(), keras.layers.Dense(1)]
    model = keras.Sequential([keras.layers.Input((4,)), *layers])
    model.compile(keras.optimizers.Adam(0.01), squared_error, metrics=[NumbersSeen()])
    return model


def build_data(split: str) -> Any:
    """Returns `(x, (target, number))`."""
    count = NUM_EXAMPLES if split == "train" else 40
    x = np.random.default_rng(len(split)).normal(size=(count, 4)).astype("float32")
    return x, np.stack([x.sum(-1), np.arange(count)], axis=-1).astype("float32")


RECIPE = tfdist.Recipe(build_model=build_model, build_data=build_data, global_batch_size=16, epochs=5)
