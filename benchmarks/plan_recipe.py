"""A recipe to plan for: a perceptron of 400,000 weights, whose gradients a slow link has to carry."""

from __future__ import annotations

import keras
import numpy as np

import tfdist

# Enough for two epochs of the most steps that are timed: one that ends with the data is shorter.
NUM_EXAMPLES, BATCH = 38_400, 64


def build_model() -> keras.Model:
    """Builds the compiled network, from 256 numbers to 10 logits."""
    hidden = [keras.layers.Dense(512, activation="relu") for _ in range(2)]
    model = keras.Sequential([keras.Input((256,)), *hidden, keras.layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss)
    return model


def build_data(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns random numbers and labels."""
    rng = np.random.default_rng(0 if split == "train" else 1)
    count = NUM_EXAMPLES if split == "train" else 64
    return rng.normal(size=(count, 256)).astype(np.float32), rng.integers(0, 10, count)


RECIPE = tfdist.Recipe(build_model=build_model, build_data=build_data, global_batch_size=BATCH, epochs=5)
